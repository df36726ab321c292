"""The front door: what every request goes through, once, before vLLM sees it.

Pure ASGI. Only listed routes pass. A request for a model is authenticated, read, resolved to one
version, held to its tenant's limits, let in when it is its turn, and given its adapter, which
vLLM's handlers see through context variables and `rora_serve.api.plugin`. Whatever ends it, all
that it took is given back, counted and logged here.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Protocol

from adapters import ResolvedVersion
from adapters.errors import (
    AdapterNotFoundError,
    AuthenticationError,
    DeadlineError,
    EngineDiedError,
    LimitExceededError,
    OverloadedError,
    RoraError,
    StoppingError,
)
from rora_serve.api.allowed import Kind, kind_of
from rora_serve.api.asgi import (
    CLOSING,
    App,
    Exchange,
    Header,
    HungUpError,
    Receive,
    Scope,
    Send,
)
from rora_serve.api.errors import (
    ErrorResponse,
    bad_request,
    internal_error,
    not_authenticated,
    route_not_found,
    to_response,
)
from rora_serve.api.model_request import (
    ModelRequest,
    deadline_seconds,
    headers_for_vllm,
    read_model_request,
)
from rora_serve.api.reception import RECEPTION_STATE, Reception
from rora_serve.lifetime import DIED, Lifetime
from rora_serve.models import ServedAdapter
from rora_serve.request_log import (
    REQUEST_ID_HEADER,
    RequestRecord,
    current_record,
    log_request,
    request_id,
)
from rora_serve.tenants import EVERYBODY, Tenant, presented_key

# The adapter of the request that this task serves; None is the base model.
current_adapter: ContextVar[ServedAdapter | None] = ContextVar("current_adapter", default=None)


class Caller(Protocol):
    """What our own routes ask of whoever sent a request; no right includes another."""

    @property
    def name(self) -> str:
        """What the server calls it."""
        ...

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


# Who sent the request that this task serves.
current_tenant: ContextVar[Caller] = ContextVar("current_tenant", default=EVERYBODY)

ADAPTER_HEADER, TIER_HEADER, LOAD_HEADER = b"x-rora-adapter", b"x-rora-tier", b"x-rora-load-ms"
# What scripts in browsers may read besides what they always may.
EXPOSED_HEADERS = (
    ADAPTER_HEADER, TIER_HEADER, LOAD_HEADER, REQUEST_ID_HEADER, b"retry-after", b"location",
)  # fmt: skip

logger = logging.getLogger(__name__)


class FrontDoor:
    """ASGI middleware in front of vLLM's whole app.

    vLLM makes it from `--middleware` before there is an engine, so what stands behind it is read
    from the app's state, where `rora_serve.api.plugin` puts a Reception.

    Args: app: what vLLM put behind it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            asked = scope["method"]
            if asked == "HEAD":  # whose answer has no body: uvicorn leaves it out
                scope = {**scope, "method": "GET"}
            kind = kind_of(scope["method"], scope["path"])
            if kind is Kind.OPEN:
                await self._app(scope, receive, send)
            else:
                record = RequestRecord(
                    request_id(scope["headers"]), asked, scope["path"], time.monotonic()
                )
                await self._serve(kind, scope, receive, send, record)
        else:  # nothing that we serve speaks WebSocket; refusing before accepting is a 403
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(
        self, kind: Kind, scope: Scope, receive: Receive, send: Send, record: RequestRecord
    ) -> None:
        """Serve a request that is noted, whatever becomes of it."""
        reception: Reception = getattr(scope["app"].state, RECEPTION_STATE)
        exchange = Exchange(receive, send, record)
        scope = {**scope, "headers": headers_for_vllm(scope["headers"], record.request_id)}
        # A connection's requests are one task after the other or the same; reset for the latter.
        token = current_record.set(record)
        try:
            await self._answer(kind, scope, exchange, reception, record)
        except HungUpError:
            pass
        except Exception:
            # Whoever is around this answers.
            record.status = record.status or _SERVER_FAULT
            raise
        finally:
            current_record.reset(token)
            if exchange.hung_up:
                record.finish = "abort"
            reception.metrics.count_request(record)
            log_request(record, now=time.monotonic())

    async def _answer(
        self,
        kind: Kind,
        scope: Scope,
        exchange: Exchange,
        reception: Reception,
        record: RequestRecord,
    ) -> None:
        if kind is Kind.UNKNOWN:
            await exchange.respond(route_not_found(record.method, record.path))
            return
        tenant = EVERYBODY
        if reception.keys is not None:
            try:
                known = reception.keys.tenant_of(presented_key(scope["headers"]))
            except AuthenticationError as error:
                await exchange.respond(not_authenticated(str(error)), [_BEARER])
                return
            if known is None or (kind is Kind.OPERATOR and not known.is_operator):
                await exchange.respond(not_authenticated(), [_BEARER])
                return
            tenant = known
        record.tenant = tenant.name
        token = None if reception.keys is None else current_tenant.set(tenant)
        try:
            if kind is Kind.READING or kind is Kind.OPERATOR or scope["method"] == "GET":
                await self._app(scope, exchange.receive, exchange.send)
            else:
                with reception.lifetime.visit():
                    await self._change(kind, scope, exchange, reception, tenant, record)
        except (StoppingError, EngineDiedError, LimitExceededError, OverloadedError) as error:
            refusal = _refusal(error)
            await exchange.respond(refusal.response, refusal.headers)
        finally:
            if token is not None:
                current_tenant.reset(token)

    async def _change(
        self,
        kind: Kind,
        scope: Scope,
        exchange: Exchange,
        reception: Reception,
        tenant: Tenant,
        record: RequestRecord,
    ) -> None:
        """Serve a request that asks more of the server than to tell what it knows."""
        exchange.instead_of_fault = partial(_answer_of_the_dead, reception.lifetime)
        if kind is Kind.MODEL:
            await _Visit(self._app, scope, exchange, reception, tenant, record).serve()
            return
        if kind is Kind.UPLOAD:  # whose bytes are counted while they are written to disk
            reception.limiter.admit(tenant, time.monotonic())
            try:
                await self._app(scope, exchange.receive, exchange.send)
            finally:
                reception.limiter.done(tenant)
            return
        body = await _read_body(exchange, reception, tenant)
        if body is not None:
            exchange.replay(body)
            # It may wait for the engine, to load or to let go.
            app = self._app(scope, exchange.receive, exchange.send)
            await reception.lifetime.while_alive(app)


class _RefusedError(Exception):
    """A request gets one of our own answers.

    is_given_back: whether it counts against no limit.
    """

    def __init__(self, response: ErrorResponse, headers: Sequence[Header] = ()) -> None:
        super().__init__(response.message)
        self.response = response
        self.headers = headers
        self.is_given_back = response.status in _NOT_OF_THE_SENDERS_MAKING


def _refusal(error: RoraError, model: str = "") -> _RefusedError:
    """Return the answer to a request that this error ends; some say when to come again."""
    headers: Sequence[Header] = ()
    if isinstance(error, LimitExceededError | OverloadedError):
        seconds = max(1, math.ceil(error.retry_after_seconds))
        headers = ((b"retry-after", str(seconds).encode()),)
    elif isinstance(error, StoppingError | EngineDiedError):
        headers = CLOSING
    return _RefusedError(to_response(error, model), headers)


class _Visit:
    """A request for a model, and what it has to give back."""

    def __init__(
        self,
        app: App,
        scope: Scope,
        exchange: Exchange,
        reception: Reception,
        tenant: Tenant,
        record: RequestRecord,
    ) -> None:
        self._app = app
        self._scope = scope
        self._exchange = exchange
        self._reception = reception
        self._tenant = tenant
        self._record = record

    async def serve(self) -> None:
        """Answer it.

        Raises: LimitExceededError: its tenant asks for too much; and whatever the app raises.
        """
        limiter, tenant = self._reception.limiter, self._tenant
        # Before its body takes memory, and the loop's time to be read.
        limiter.admit(tenant, time.monotonic())
        try:
            await self._serve_admitted()
        except (_RefusedError, StoppingError, EngineDiedError, OverloadedError) as error:
            refusal = error if isinstance(error, _RefusedError) else _refusal(error)
            if refusal.is_given_back:
                limiter.give_back(tenant, time.monotonic())
            await self._exchange.respond(refusal.response, refusal.headers)
        finally:
            limiter.spend_tokens(tenant, self._record.charged_tokens, time.monotonic())
            limiter.done(tenant)

    async def _serve_admitted(self) -> None:
        exchange, reception, record = self._exchange, self._reception, self._record
        body = await _read_body(exchange, reception, self._tenant)
        if body is None:
            return
        try:
            request = read_model_request(
                body, record.path, self._tenant, max_model_len=reception.max_model_len
            )
        except ValueError as error:
            raise _RefusedError(bad_request(None, str(error))) from error
        exchange.replay(request.body)
        record.model = request.model
        async with AsyncExitStack() as stack:
            adapter = await reception.lifetime.while_alive(self._let_in(stack, request))
            token = current_adapter.set(adapter)
            try:
                await self._app(self._scope, exchange.receive, exchange.send)
            finally:
                current_adapter.reset(token)

    async def _let_in(self, stack: AsyncExitStack, request: ModelRequest) -> ServedAdapter | None:
        """Return the request's adapter once it is let in; None is the base model.

        Args: stack: gives back, at its end, all that this takes.
        Raises: _RefusedError: it is not let in.
        """
        record, model = self._record, request.model
        try:
            return await self._enter(stack, request)
        except (HungUpError, _RefusedError):
            raise
        except RoraError as error:
            logger.info("%s %s: %s", record.method, record.path, error)
            raise _refusal(error, model or "") from error
        except Exception as error:
            logger.exception("%s %s: opening %.100r", record.method, record.path, model)
            raise _RefusedError(internal_error()) from error

    async def _enter(self, stack: AsyncExitStack, request: ModelRequest) -> ServedAdapter | None:
        directory, record, model = self._reception.directory, self._record, request.model
        try:
            within = deadline_seconds(self._scope["headers"])
        except ValueError as error:
            raise _RefusedError(bad_request(None, str(error))) from error
        deadline = None if within is None else record.arrived_at + within
        if deadline is not None and deadline <= time.monotonic():
            late = DeadlineError("the deadline passed while the request was read; allow more time")
            refusal = _refusal(late)
            refusal.is_given_back = False  # the loop's time for its body was taken all the same
            raise refusal
        is_base = model is None or model in directory.base_names
        name = directory.base_names[0] if is_base else (model or "").partition("@")[0]
        if not (self._tenant.may_use_base if is_base else self._tenant.may_use(name)):
            raise AdapterNotFoundError(f"{name}: tenant {self._tenant.name!r} may not use it")
        # Before it waits, so that names that nobody has wait nowhere.
        resolved = None
        if not is_base:
            resolved = await directory.resolve(model or "")
        record.adapter = name
        is_cold = False
        if resolved is not None:
            record.version = resolved.public_id
            is_cold = not directory.tier.is_ready(resolved.version.weights_digest)
        place = self._reception.admission.place(
            tenant=self._tenant.name,
            adapter=name,
            weight=self._tenant.weight,
            cost=request.num_sequences,
            is_cold=is_cold,
            body_bytes=len(request.body),
            deadline=deadline,
        )
        if resolved is not None:
            # While it waits it counts as running, so that nobody takes its version away.
            waiting = stack.enter_context(ExitStack())
            waiting.enter_context(directory.expecting(resolved))
        await self._exchange.while_connected(stack.enter_async_context(place))
        begun = time.monotonic()
        record.queue_ms = 1000 * (begun - record.arrived_at)
        if resolved is None:
            return None
        # What it was before it waited may be another by now.
        record.tier = directory.tier.tier_of(resolved.version.weights_digest)
        loading = asyncio.timeout(None if deadline is None else deadline - begun)
        try:
            async with loading:
                served = await self._exchange.while_connected(
                    self._opened(stack, model or "", resolved)
                )
        except TimeoutError as error:
            if not loading.expired():
                raise
            seconds = time.monotonic() - begun
            raise DeadlineError(
                f"{name}: it was not loaded in {seconds:.3g} s; allow more time"
            ) from error
        waiting.close()
        record.version = served.resolved.public_id
        record.load_ms = 1000 * (time.monotonic() - begun)
        self._exchange.headers += [
            (ADAPTER_HEADER, record.version.encode()),
            (TIER_HEADER, record.tier.encode()),
            (LOAD_HEADER, f"{record.load_ms:.1f}".encode()),
        ]
        return served

    async def _opened(
        self, stack: AsyncExitStack, model: str, resolved: ResolvedVersion
    ) -> ServedAdapter:
        """Return a version that was loaded, which `stack` closes."""
        directory = self._reception.directory
        try:
            served = await directory.open_version(model, resolved)
        except AdapterNotFoundError:
            # Removed from the store while the request waited, by somebody who could not know of
            # it. Where the name means another version by now, that is what was asked for.
            again = await directory.open(model)
            assert again is not None, "a base model's name has no version"
            served = again
        stack.callback(self._close, served)
        return served

    def _close(self, served: ServedAdapter) -> None:
        self._reception.directory.close(served, was_answered=self._exchange.is_answered)


async def _read_body(exchange: Exchange, reception: Reception, tenant: Tenant) -> bytes | None:
    """Return a request's body, or None if its size or slowness was answered."""
    with reception.bodies.of(tenant.name) as hold:
        return await exchange.read_body(hold)


def _answer_of_the_dead(lifetime: Lifetime) -> ErrorResponse | None:
    """Return what a request gets whose handler failed because the engine died, if it did."""
    return None if lifetime.is_alive else to_response(EngineDiedError(DIED))


_BEARER: Header = (b"www-authenticate", b"Bearer")
_SERVER_FAULT = 500
_NOT_OF_THE_SENDERS_MAKING = (429, 503, 504)
