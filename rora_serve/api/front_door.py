"""The front door: the one place where a request's `model` becomes an adapter, before vLLM sees it.

Pure ASGI. It lets listed routes through, reads `model` once, opens it in the ModelDirectory and
keeps the outcome in a context variable, which vLLM's handlers see through `rora_serve.api.plugin`.
"""

import json
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any, Protocol

from adapters.errors import RoraError
from rora_serve.api.errors import (
    ErrorResponse,
    body_too_large,
    internal_error,
    route_not_found,
    to_response,
)
from rora_serve.models import ModelDirectory, ServedAdapter

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The adapter of the request that this task serves; None is the base model.
current_adapter: ContextVar[ServedAdapter | None] = ContextVar("current_adapter", default=None)


class Tenant(Protocol):
    """What a caller may do with adapters, by their names; no right includes another."""

    @property
    def may_use_base(self) -> bool:
        """Whether requests may go to the base model."""
        ...

    def may_use(self, name: str) -> bool:
        """Tell whether requests may go to an adapter."""
        ...

    def may_upload(self, name: str) -> bool:
        """Tell whether versions may be added."""
        ...

    def may_manage(self, name: str) -> bool:
        """Tell whether aliases may be moved, versions imported, loaded, pinned and removed."""
        ...


class _Everybody:
    """Who asks a server without tenants."""

    may_use_base = True

    def may_use(self, _: str) -> bool:
        return True

    may_upload = may_manage = may_use


# Who sent the request that this task serves.
current_tenant: ContextVar[Tenant] = ContextVar("current_tenant", default=_Everybody())  # noqa: B039

# Routes that name a model in a JSON body.
MODEL_ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    }
)
PLAIN_ROUTES = frozenset(
    {"/health", "/metrics", "/openapi.json", "/ready", "/v1/models", "/version"}
)
MODEL_ROUTE_PREFIX = "/v1/models/"
UPLOAD_ROUTE = "/v1/adapters"
# Our own routes, which take the tenant's rights into account themselves. What stands for a name
# here may be anything: the store knows the grammar, and looks at no file for a name against it.
ADAPTER_ROUTES: tuple[tuple[re.Pattern[str], frozenset[str]], ...] = tuple(
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
MAX_BODY_BYTES = 32 * 1024 * 1024
ADAPTER_HEADER = b"x-rora-adapter"
DIRECTORY_STATE = "rora_directory"

logger = logging.getLogger(__name__)


class FrontDoor:
    """ASGI middleware in front of vLLM's whole app; any route that is not listed is 404.

    vLLM makes it from `--middleware` before there is an engine, so what `model` may mean is read
    from the app's state, where `rora_serve.api.plugin` puts a ModelDirectory.

    Args: app: what vLLM put behind it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:  # nothing that we serve speaks WebSocket; refusing before accepting is a 403
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if not path.isprintable():
            # The patterns of routers pass over a line break at the end.
            await _respond(send, route_not_found(method, path))
        elif method == "POST" and path in MODEL_ROUTES:
            await self._serve_model(scope, receive, send)
        elif method in ("GET", "HEAD") and _is_plain(path):
            await self._app(scope, receive, send)
        elif method in _adapter_methods(path):
            await self._serve_own(scope, receive, send)
        elif method == "OPTIONS" and (
            path in MODEL_ROUTES or _is_plain(path) or _adapter_methods(path)
        ):
            await self._app(scope, receive, send)  # a browser's question; vLLM's CORS answers
        else:
            await _respond(send, route_not_found(method, path))

    async def _serve_own(self, scope: Scope, receive: Receive, send: Send) -> None:
        # An upload is counted while it is written to disk; other bodies end up in memory.
        if scope["method"] != "GET" and scope["path"] != UPLOAD_ROUTE:
            body = await _read_body(receive)
            if body is None:
                await _respond(send, body_too_large(MAX_BODY_BYTES))
                return
            receive = _replay(body, receive)
        await self._app(scope, receive, send)

    async def _serve_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive)
        if body is None:
            await _respond(send, body_too_large(MAX_BODY_BYTES))
            return
        model = _requested_model(body)
        adapter = None
        directory: ModelDirectory = getattr(scope["app"].state, DIRECTORY_STATE)
        if model is not None:
            try:
                adapter = await directory.open(model)
            except RoraError as error:
                logger.info("%s %s: %s", scope["method"], scope["path"], error)
                await _respond(send, to_response(error, model))
                return
            except Exception:
                logger.exception("%s %s: opening %.100r", scope["method"], scope["path"], model)
                await _respond(send, internal_error())
                return
        if adapter is None:
            await self._app(scope, _replay(body, receive), send)
            return
        exchange = _Exchange(_replay(body, receive), send, adapter)
        # Each request is its own task or comes after the last one of its connection; reset for the
        # latter.
        token = current_adapter.set(adapter)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            current_adapter.reset(token)
            directory.close(adapter, was_answered=exchange.is_answered)


def _is_plain(path: str) -> bool:
    return path in PLAIN_ROUTES or path.startswith(MODEL_ROUTE_PREFIX)


def _adapter_methods(path: str) -> frozenset[str]:
    for pattern, methods in ADAPTER_ROUTES:
        if pattern.fullmatch(path):
            return methods
    return frozenset()


async def _read_body(receive: Receive) -> bytes | None:
    """Return the request's body, or None if it is above the limit."""
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            return None
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _requested_model(body: bytes) -> str | None:
    """Return `model` of a JSON body; None where it is no text or empty, which vLLM judges."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return None
    model = parsed.get("model") if isinstance(parsed, dict) else None
    return model if isinstance(model, str) and model else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body again, and then what the connection says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class _Exchange:
    """A request with an adapter: names it in the answer, and notes whether that came to its end."""

    def __init__(self, receive: Receive, send: Send, adapter: ServedAdapter) -> None:
        self._receive = receive
        self._send = send
        self._header = (ADAPTER_HEADER, adapter.resolved.public_id.encode())
        self._is_whole = False
        self._hung_up = False

    @property
    def is_answered(self) -> bool:
        """Whether all of the answer was sent before the client hung up."""
        return self._is_whole and not self._hung_up

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_whole:
            self._hung_up = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), self._header]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_whole = True


async def _respond(send: Send, response: ErrorResponse) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(response.body)).encode()),
    ]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
