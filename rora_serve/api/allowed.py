"""Which routes are served; what is not listed here is 404, whatever vLLM's app would do with it."""

import re
from enum import Enum, auto


class Kind(Enum):
    """What a request of a route has to show, and how its body is treated."""

    OPEN = auto()  # for whoever watches the server: no key, no record
    OPERATOR = auto()  # tells of all tenants
    READING = auto()  # ours or vLLM's, without a body
    OWN = auto()  # ours, which look at the caller's rights themselves
    UPLOAD = auto()  # the same, of any size
    MODEL = auto()  # names a model in a JSON body
    UNKNOWN = auto()


# Routes that generate, and so have settings that are a tenant's or the server's.
GENERATING_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
MODEL_ROUTES = GENERATING_ROUTES | {"/tokenize", "/detokenize"}
OPEN_ROUTES = frozenset({"/health", "/ready"})
OPERATOR_ROUTES = frozenset({"/metrics"})
READING_ROUTES = frozenset({"/openapi.json", "/v1/models", "/version"})
MODEL_ROUTE_PREFIX = "/v1/models/"
UPLOAD_ROUTE = "/v1/adapters"
# What stands for a name here may be anything: the store knows the grammar, and looks at no file for
# a name against it.
OWN_ROUTES: tuple[tuple[re.Pattern[str], frozenset[str]], ...] = tuple(
    (re.compile(pattern), frozenset(methods.split()))
    for pattern, methods in (
        ("/v1/adapters", "GET POST"),
        ("/v1/adapters/[^/]+", "GET DELETE"),
        ("/v1/adapters/[^/]+/aliases/[^/]+", "PUT"),
        ("/v1/adapters/[^/]+/(load|unload|rollback)", "POST"),
        ("/v1/adapters/[^/]+/pin", "PUT DELETE"),
        ("/v1/(un)?load_lora_adapter", "POST"),
    )
)


def kind_of(method: str, path: str) -> Kind:
    """Return what kind of route a request is for."""
    kind = Kind.UNKNOWN
    own = _own_methods(path)
    if not path.isprintable():
        pass  # the patterns of routers pass over a line break at the end
    elif method == "POST" and path in MODEL_ROUTES:
        kind = Kind.MODEL
    elif method in own:
        kind = Kind.UPLOAD if method == "POST" and path == UPLOAD_ROUTE else Kind.OWN
    elif method == "GET" and path in OPEN_ROUTES:
        kind = Kind.OPEN
    elif method == "GET" and path in OPERATOR_ROUTES:
        kind = Kind.OPERATOR
    elif method == "GET" and (path in READING_ROUTES or path.startswith(MODEL_ROUTE_PREFIX)):
        kind = Kind.READING
    return kind


def _own_methods(path: str) -> frozenset[str]:
    for pattern, methods in OWN_ROUTES:
        if pattern.fullmatch(path):
            return methods
    return frozenset()
