"""Who may do what, written out: tenants with keys, names, routes, and what each cell answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapters import AdapterConfig, AdapterStore
from adapters.names import DEFAULT_MODEL_NAME as BASE
from rora_serve.tenants import key_lines, new_key
from tests.rora_serve.adapter_server import form
from tests.rora_serve.serving import Server
from tests.rora_serve.span_collector import SpanCollector
from tests.workloads import make_random_adapter

Right = Literal["use", "upload", "manage"]

# What stands in the key file.
GRANTS = {
    "operator": 'use = ["*"]\nupload = ["*"]\nmanage = ["*"]',
    "acme": 'use = ["acme-*", "shared-*"]\nupload = ["acme-*"]\nmanage = ["acme-*"]',
    "globex": 'use = ["globex-*", "shared-*"]\nbase = false',
    "initech": 'manage = ["globex-*"]\nupload = ["shared-*"]\nbase = false',
    "guest": "",
}
# Of a tenant that is in no table: it may ask for anything, and has short answers.
SPARING = "sparing"
SPARING_GRANT = 'use = ["*"]\nmax_tokens = 2'
# What follows from it, by hand; what is not here is not allowed.
NAMES = ("acme-one", "globex-one", "shared-one", "text", "image")
ALL: tuple[Right, ...] = ("use", "upload", "manage")
MAY: Mapping[str, Mapping[str, tuple[Right, ...]]] = {
    "operator": dict.fromkeys(NAMES, ALL) | {BASE: ("use",)},
    "acme": {"acme-one": ALL, "shared-one": ("use",), BASE: ("use",)},
    "globex": {"globex-one": ("use",), "shared-one": ("use",)},
    "initech": {"globex-one": ("manage",), "shared-one": ("upload",)},
    "guest": {BASE: ("use",)},
}
# Names of which there is none, as long as those that there are: answers may not differ in length.
MISSING = {"acme-one": "zzzz-one", "globex-one": "zzzzzz-one", "shared-one": "zzzzzz-one"}


@dataclass(frozen=True)
class Route:
    """A request about a name.

    Args:
        needs: any of these rights.
        done: statuses for whoever may: of the deed, or of what is wrong with this request besides.
        refused: the status for everybody else.
        body: JSON, in which NAME stands for the name. parts: of a form, the same.
    """

    method: str
    path: str
    needs: tuple[Right, ...]
    done: tuple[int, ...] = (200,)
    refused: int = 404
    body: Mapping[str, Any] | None = None
    parts: Mapping[str, str] | None = None
    note: str = ""

    @property
    def id(self) -> str:
        return f"{self.method} {self.path} {self.note}".strip()

    def options(self, name: str) -> dict[str, Any]:
        """Return how to ask it of a name, as httpx has it."""
        if self.parts is not None:
            return form(
                {key: value.replace("NAME", name).encode() for key, value in self.parts.items()}
            )
        if self.body is None:
            return {}
        return {
            "json": {
                key: value.replace("NAME", name) if isinstance(value, str) else value
                for key, value in self.body.items()
            }
        }


_ASK = {"model": "NAME", "prompt": "Hi", "max_tokens": 1}
_MESSAGES = [{"role": "user", "content": "Hi"}]
USE: tuple[Right, ...] = ("use",)
MANAGE: tuple[Right, ...] = ("manage",)

OF_MODELS = (
    Route("POST", "/v1/completions", USE, body=_ASK),
    Route("POST", "/v1/completions", USE, body=_ASK | {"model": "NAME@latest"}, note="@latest"),
    Route("POST", "/v1/completions", USE, body=_ASK | {"stream": True}, note="stream"),
    Route(
        "POST",
        "/v1/chat/completions",
        USE,
        body={"model": "NAME", "messages": _MESSAGES, "max_tokens": 1},
    ),
    Route(
        "POST", "/v1/responses", USE, body={"model": "NAME", "input": "Hi", "max_output_tokens": 1}
    ),
    Route("POST", "/tokenize", USE, body={"model": "NAME", "prompt": "Hi"}),
    Route("POST", "/detokenize", USE, body={"model": "NAME", "tokens": [1, 2]}),
    Route("GET", "/v1/models/NAME", USE),
)
OF_ADAPTERS = (
    Route("GET", "/v1/adapters/NAME", ("use", "manage")),
    Route("POST", "/v1/adapters/NAME/load", MANAGE),
    Route("PUT", "/v1/adapters/NAME/pin", MANAGE),
    Route("DELETE", "/v1/adapters/NAME/pin", MANAGE),
    Route("POST", "/v1/adapters/NAME/unload", MANAGE),
    Route("PUT", "/v1/adapters/NAME/aliases/mine", MANAGE, body={"version": "latest"}),
    # There is no earlier version, and `latest` means the only one.
    Route("POST", "/v1/adapters/NAME/rollback", MANAGE, done=(409,)),
    Route("DELETE", "/v1/adapters/NAME@latest", MANAGE, done=(409,)),
    # Uploads of nothing that could be stored: whoever may learns what is wrong with it.
    Route(
        "POST", "/v1/adapters", ("upload",), done=(422,), refused=403,
        parts={"name": "NAME", "adapter_config.json": "{"},
    ),
    Route(
        "POST", "/v1/adapters", MANAGE, done=(404, 400), refused=403,
        body={"name": "NAME", "path": "/etc"}, note="import",
    ),
    Route(
        "POST", "/v1/load_lora_adapter", MANAGE, done=(404, 400), refused=403,
        body={"lora_name": "NAME", "lora_path": "/etc"},
    ),
    Route("POST", "/v1/unload_lora_adapter", MANAGE, body={"lora_name": "NAME"}),
)  # fmt: skip

# Names that look like globex-one's, or lead to its files, to something that is not careful.
CROSSING = (
    "../names/globex-one", "acme-one/../globex-one", "acme-one/../../names/globex-one.json",
    "..", ".", "/etc/passwd", "etc/passwd", "\\..\\globex-one", "%2e%2e/globex-one",
    "acme-one%2f..%2fglobex-one", "globex%2Done", "file:///etc/passwd",
    "GLOBEX-ONE", "Globex-one", "gl\u043ebex-one", "globex-\u043ene", "\uff47lobex-one",
    "globex\u2010one", "globex\u00adone", "globex-one\u200b", "\u200bglobex-one",
    "\ufeffglobex-one",
    "globex-one.", "globex-one\n", "globex-one\r\n", "globex-one\t", " globex-one", "globex-one ",
    "globex-one\x00", "acme-one\x00globex-one", "globex-one/", "globex-one@", "globex-one@latest",
    "globex-one@@latest", "acme-one@../globex-one", "acme-one@globex-one", "acme-one:globex-one",
    "acme-one,globex-one", "acme-one globex-one", "*", "acme-*", "g*", "[g]lobex-one", "latest",
    "acme-one@sha256:" + "0" * 64, "ACME-ONE", "\u0430cme-one", "acme-one\n", "acme-one.",
    "a" * 5000,
)  # fmt: skip


@dataclass(frozen=True)
class KeyedServer:
    """A server with the tenants above, and their keys.

    collector: of its traces.
    """

    server: Server
    store: AdapterStore
    collector: SpanCollector
    keys: Mapping[str, str] = field(repr=False)

    def bearer(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant]}"}


def write_keys(path: Path, grants: Mapping[str, str] = GRANTS) -> dict[str, str]:
    """Write a key file. Returns: the keys by tenant."""
    keys = {tenant: new_key() for tenant in grants}
    path.write_text(
        "".join(f"{key_lines(name, keys[name])}\n{lines}\n" for name, lines in grants.items())
    )
    path.chmod(0o600)
    return keys


def add_names(store: AdapterStore, folder: Path, base: Path) -> None:
    """Give each of the names an adapter of its own."""
    for seed, name in enumerate(NAMES):
        source = make_random_adapter(
            folder / name,
            base,
            config=AdapterConfig(4, 8, target_modules=("q_proj", "v_proj", "o_proj")),
            modules=("q_proj", "v_proj", "o_proj"),
            seed=200 + seed,
        )
        store.add(source, name=name)
