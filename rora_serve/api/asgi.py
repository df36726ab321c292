"""ASGI in the small: whole bodies, whole answers, and an exchange that notes how it went."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeVar

from rora_serve.api.errors import ErrorResponse, body_too_large, body_too_slow
from rora_serve.request_log import REQUEST_ID_HEADER, RequestRecord

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]
Result = TypeVar("Result")

# Of an answer after which the client does better to ask another server.
CLOSING: Sequence[Header] = ((b"retry-after", b"1"), (b"connection", b"close"))
MAX_BODY_BYTES = 8 * 1024 * 1024  # the worst of which takes the loop a second to read as JSON
MAX_BODY_SECONDS = 60.0
_SERVER_FAULT = 500  # the first status of those
_DISCONNECT: Message = {"type": "http.disconnect"}


class HungUpError(Exception):
    """The client is gone, so that nobody waits for an answer."""


class Exchange:
    """One request and its answer, as the record of it notes them.

    Args:
        receive, send: of the connection.
        record: gets the status, and what answers it.

    headers: that the answer gets besides its own.
    """

    def __init__(self, receive: Receive, send: Send, record: RequestRecord) -> None:
        self._receive = receive
        self._send = send
        self._record = record
        self._body: bytes | None = None
        self._is_whole = False
        self._hung_up = False
        self._is_replaced = False
        # Asked when the app answers with a fault of the server: what is answered instead, if it is.
        self.instead_of_fault: Callable[[], ErrorResponse | None] = lambda: None
        self.headers: list[Header] = [(REQUEST_ID_HEADER, record.request_id.encode())]

    @property
    def is_answered(self) -> bool:
        """Whether all of the answer was sent before the client hung up."""
        return self._is_whole and not self._hung_up

    @property
    def hung_up(self) -> bool:
        """Whether the client did before its answer was whole."""
        return self._hung_up

    def replay(self, body: bytes) -> None:
        """Let `receive` give this body, and then what the connection says."""
        self._body = body

    async def receive(self) -> Message:
        """Return the next message of the request."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._next()

    async def _next(self) -> Message:
        if self._hung_up:
            return _DISCONNECT
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_whole:
            self._hung_up = True
        return message

    async def send(self, message: Message) -> None:
        """Send a message of the answer."""
        if self._is_replaced:
            return
        if message["type"] == "http.response.start" and message["status"] >= _SERVER_FAULT:
            instead = self.instead_of_fault()
            if instead is not None:
                self.instead_of_fault = lambda: None
                await self.respond(instead, CLOSING)
                self._is_replaced = True
                return
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_whole = True

    async def respond(self, response: ErrorResponse, headers: Sequence[Header] = ()) -> None:
        """Send one of our own answers instead of the app's."""
        self._record.refusal = response.code
        all_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(response.body)).encode()),
            *headers,
        ]
        await self.send(
            {"type": "http.response.start", "status": response.status, "headers": all_headers}
        )
        await self.send({"type": "http.response.body", "body": response.body})

    async def read_body(self, hold: Callable[[int], None]) -> bytes | None:
        """Return the request's body, or None if it is too large or slow, which is answered then.

        Args: hold: told of the bytes of each piece before it is kept.
        Raises: HungUpError: the client is gone before its end; and what `hold` raises.
        """
        try:
            async with asyncio.timeout(MAX_BODY_SECONDS):
                return await self._read_pieces(hold)
        except TimeoutError:
            await self.respond(body_too_slow(MAX_BODY_SECONDS), CLOSING)
            return None

    async def _read_pieces(self, hold: Callable[[int], None]) -> bytes | None:
        chunks, size = [], 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise HungUpError
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                await self.respond(body_too_large(MAX_BODY_BYTES))
                return None
            hold(len(chunk))
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def while_connected(self, waiting: Awaitable[Result]) -> Result:
        """Return what `waiting` does, whose body was read; give it up if the client hangs up.

        Raises: HungUpError: it did; and whatever `waiting` raises.
        """
        work = asyncio.ensure_future(waiting)
        listening = asyncio.ensure_future(self._next())
        try:
            await asyncio.wait((work, listening), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise HungUpError
        finally:
            for task in (work, listening):
                task.cancel()
            await asyncio.gather(work, listening, return_exceptions=True)
