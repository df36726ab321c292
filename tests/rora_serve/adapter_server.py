"""An app with our own routes behind the front door, an engine that notes, and ways to ask it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from adapters import AdapterStore, ResolvedVersion
from adapters.receipt import BaseShapes
from rora_serve.admission import Admission
from rora_serve.api.front_door import Caller, FrontDoor, current_tenant
from rora_serve.api.reception import RECEPTION_STATE, Reception
from rora_serve.api.routes import make_routes
from rora_serve.api.views import Views
from rora_serve.catalog import Catalog
from rora_serve.intake import Intake
from rora_serve.key_file import KeyFile
from rora_serve.lifetime import Lifetime
from rora_serve.limits import Limiter
from rora_serve.metrics import Levels, Metrics
from rora_serve.models import ModelDirectory, ServedAdapter, ServedBase
from rora_serve.preload import Preloader
from rora_serve.residency import Residents
from rora_serve.side_process import SideProcess
from tests.adapters.hostile.build import QUERY, VALUE, change_keys, right
from tests.rora_serve.reaching import client_of

BASE = "base"
SHAPES = BaseShapes(
    BASE, "f" * 64, {QUERY: (6, 8), VALUE: (6, 8), "model.layers.0.mlp.up_proj": (9, 8)}, {}
)
MAX_UPLOAD_BYTES = 64 * 1024 * 1024
UNLOAD_SECONDS = 0.05
BOUNDARY = "b-o-u-n-d-a-r-y"


class Engine:
    """Stands for the engine: notes what it holds; what is in `errors` it raises instead.

    is_held_up: whether its loads wait.
    """

    def __init__(self) -> None:
        self.held: dict[int, ResolvedVersion] = {}
        self.errors: list[Exception] = []
        self.is_held_up = False
        self.num_loads = 0

    async def load(self, lora_int_id: int, resolved: ResolvedVersion) -> int:
        self.num_loads += 1
        await asyncio.sleep(0)
        while self.is_held_up:
            await asyncio.sleep(0.01)
        if self.errors:
            raise self.errors.pop()
        assert lora_int_id not in self.held
        self.held[lora_int_id] = resolved
        return resolved.version.num_bytes

    async def drop(self, lora_int_id: int) -> None:
        await asyncio.sleep(0)
        del self.held[lora_int_id]


@dataclass(frozen=True)
class Rights:
    """A tenant whose rights are names."""

    use: tuple[str, ...] = ()
    upload: tuple[str, ...] = ()
    manage: tuple[str, ...] = ()
    may_use_base: bool = False
    name: str = "tenant"

    def may_use(self, name: str) -> bool:
        return name in self.use

    def may_upload(self, name: str) -> bool:
        return name in self.upload

    def may_manage(self, name: str) -> bool:
        return name in self.manage


@dataclass
class AdapterServer:
    """The app, what stands behind it, and what tests let it do."""

    store: AdapterStore
    process: SideProcess
    import_folder: Path
    engine: Engine = field(default_factory=Engine)
    capacity: int = 1_000_000
    admit: Callable[[ResolvedVersion, str], Any] | None = None
    quarantined: dict[str, str] = field(default_factory=dict)  # reasons by version digest
    tenant: Caller | None = None
    is_alive: bool = True
    preloader: Preloader | None = None

    def __post_init__(self) -> None:
        base = ServedBase((BASE,), SHAPES.fingerprint, None)
        self.directory = ModelDirectory(base, self.store, self.engine, capacity=self.capacity)
        self.residents = Residents(self.directory, unload_seconds=UNLOAD_SECONDS)
        self.catalog = Catalog(SHAPES, self.process)

        async def admit(resolved: ResolvedVersion, user: str) -> None:
            if self.admit is not None:
                await self.admit(resolved, user)

        self.intake = Intake(
            self.store,
            SHAPES,
            self.catalog,
            self.process,
            base_names=[BASE],
            import_folders=[self.import_folder],
            admit=admit,
        )
        views = Views(
            self.directory,
            self.residents,
            self.catalog,
            lambda resolved: self.quarantined.get(resolved.version.digest),
        )
        self.lifetime = Lifetime(lambda: self.is_alive)
        self.routes = make_routes(
            self.directory,
            self.residents,
            self.intake,
            views,
            started=7,
            is_ready=self._is_ready,
            max_upload_bytes=MAX_UPLOAD_BYTES,
        )
        self.app = FastAPI(openapi_url=None)
        self.app.router.routes[:0] = self.routes
        self.app.add_middleware(FrontDoor)
        setattr(self.app.state, RECEPTION_STATE, make_reception(self.directory, self.lifetime))

    def _is_ready(self) -> bool:
        return self.lifetime.is_ready and (self.preloader is None or self.preloader.is_done)

    def ask_for_keys(self, keys: KeyFile) -> None:
        """Let in only who has a key, from now on."""
        setattr(self.app.state, RECEPTION_STATE, make_reception(self.directory, keys=keys))

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask as the tenant that is set; every task that this starts has it."""
        token = None if self.tenant is None else current_tenant.set(self.tenant)
        try:
            async with client_of(self.app) as client:
                return await client.request(method, path, **options)
        finally:
            if token is not None:
                current_tenant.reset(token)

    async def upload(self, folder: Path, name: str, **fields: str) -> httpx.Response:
        """Upload an adapter's files as a form."""
        parts = {"name": name.encode(), **{key: text.encode() for key, text in fields.items()}}
        parts |= {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        return await self.ask("POST", "/v1/adapters", **form(parts))

    async def running(self, model: str) -> ServedAdapter:
        """Begin a request that runs until the directory closes it."""
        served = await self.directory.open(model)
        assert served is not None
        return served


def make_reception(
    directory: ModelDirectory,
    lifetime: Lifetime | None = None,
    *,
    keys: KeyFile | None = None,
    max_in_flight: int = 8,
) -> Reception:
    """Return what stands behind the front door, in front of a directory."""

    def read_levels() -> Levels:
        tier = directory.tier
        by_name = directory.bytes_by_name()
        return Levels(by_name, tier.num_bytes, tier.capacity, tier.num_held, 0, 0)

    metrics = Metrics(directory.base_names[0], read_levels)
    return Reception(
        directory,
        Admission(max_in_flight),
        Limiter(),
        metrics,
        lifetime or Lifetime(lambda: True),
        max_model_len=1024,
        keys=keys,
    )


def run(what: Coroutine[Any, Any, None]) -> None:
    """Run one test in a loop of its own."""
    asyncio.run(what)


def form(parts: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the content and headers of a multipart form, each part by its name."""
    content = b"".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
        + text
        + b"\r\n"
        for name, text in parts.items()
    )
    return {"content": content + f"--{BOUNDARY}--\r\n".encode(), "headers": form_headers()}


def form_headers() -> dict[str, str]:
    return {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


async def pieces(path: Path, size: int = 64 * 1024) -> AsyncIterator[bytes]:
    """Yield a file piece by piece, and hold it open for none: who asks may not want them all."""
    for start in range(0, path.stat().st_size, size):
        with path.open("rb") as file:
            file.seek(start)
            piece = file.read(size)
        yield piece


def tree(root: Path) -> dict[str, bytes | None]:
    """Return every file below a folder with its content, and every folder."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


@dataclass
class Place:
    """A server whose store has two versions of "a", below whose import folder lies a third.

    Args: first, second: the versions, as `sha256:<digest>`; the second is the latest.
    """

    server: AdapterServer
    store: AdapterStore
    first: str
    second: str
    third: Path

    def break_record(self) -> None:
        (self.store.root / "names" / "a.json").write_text("{")

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await self.server.ask(method, path, **options)


def make_place(folder: Path, process: SideProcess) -> Place:
    """Make the place in a folder."""
    store = AdapterStore(folder / "store")
    digests = []
    for alpha in (1, 2, 3):
        source = right(folder / "imports" / f"alpha-{alpha}")
        change_keys(source, lora_alpha=alpha)
        if alpha < 3:
            digests.append(f"sha256:{store.add(source, name='a').version.digest}")
    server = AdapterServer(store, process, folder / "imports")
    return Place(server, store, digests[0], digests[1], source)
