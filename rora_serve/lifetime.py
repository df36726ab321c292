"""Lifetime: whether the server takes requests, until it is told to stop or its engine dies.

Knows neither HTTP nor vLLM. Single-threaded: all calls come from one event loop.
"""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from adapters.errors import EngineDiedError, StoppingError

Result = TypeVar("Result")

# In which whoever watches /ready learns that no more requests are wanted; they are still taken.
NOTICE_SECONDS = 2.0
_LOOK_SECONDS = 0.2  # between two looks at the engine
DIED = "The server's engine died; send the request again."

logger = logging.getLogger(__name__)


class Lifetime:
    """Counts requests, so that a stop can wait for them, and refuses those that come too late.

    Args: is_alive: tells whether the engine runs.
    """

    def __init__(self, is_alive: Callable[[], bool]) -> None:
        self._is_alive = is_alive
        self._is_leaving = False
        self._is_closed = False
        self._visits: set[asyncio.Task[Any] | None] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._hurry = asyncio.Event()
        self._died = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs."""
        return not self._died.is_set() and self._is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether more requests are wanted."""
        return not self._is_leaving and self.is_alive

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Count the request of this task, as long as the body of the `with` runs.

        Raises:
            EngineDiedError: nothing can be answered any more.
            StoppingError: the server stops, and takes no new ones.
        """
        self._check_alive()
        if self._is_closed:
            raise StoppingError("The server is stopping; send the request again.")
        task = asyncio.current_task()
        self._visits.add(task)
        self._idle.clear()
        try:
            yield
        finally:
            self._visits.discard(task)
            if not self._visits:
                self._idle.set()

    async def while_alive(self, waiting: Awaitable[Result]) -> Result:
        """Return what `waiting` does, which may wait for the engine; give it up if that dies.

        Raises: EngineDiedError: it did; and whatever `waiting` raises.
        """
        work = asyncio.ensure_future(waiting)
        death = asyncio.ensure_future(self._died.wait())
        try:
            await asyncio.wait((work, death), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise EngineDiedError(DIED)
        finally:
            for task in (work, death):
                task.cancel()
            await asyncio.gather(work, death, return_exceptions=True)

    def watch(self, end: Callable[[], object], *, within: float) -> None:
        """Look after the engine: when it dies, give up what waits for it, and end in the end.

        Args:
            end: called if this process still runs after `within` seconds.
        """
        self._start(self._watch(end, within))

    def drain_on_sigterm(self, drain_seconds: float) -> None:
        """Let a SIGTERM wait for the requests that run, and then act as a SIGINT does.

        /ready is false at once, new requests are refused after NOTICE_SECONDS, and those that were
        taken have all of `drain_seconds`. A second SIGTERM waits for nothing more.

        Args: drain_seconds: 0 stops at once.
        """
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, self._stop_softly, drain_seconds
        )

    async def drain(self, drain_seconds: float) -> None:
        """Return when no request runs any more and none is taken, or the seconds are over."""
        logger.info("stopping: %d requests run", len(self._visits))
        loop = asyncio.get_running_loop()
        end = loop.time() + drain_seconds
        self._is_leaving = True
        await self._pause(self._hurry.wait(), min(NOTICE_SECONDS, drain_seconds))
        self._is_closed = True
        await self._pause(self._idle_or_hurried(), end - loop.time())

    def give_up(self) -> None:
        """Cancel the requests that still run: the engine that is gone would never end them."""
        self._is_leaving = self._is_closed = True
        if self._visits:
            logger.warning("stopping: %d requests are given up", len(self._visits))
        for task in self._visits:
            if task is not None:
                task.cancel()

    def hurry(self) -> None:
        """Let `drain` wait no longer."""
        self._hurry.set()

    def _stop_softly(self, drain_seconds: float) -> None:
        if self._is_leaving:
            self.hurry()
        else:
            self._start(self._stop(drain_seconds))

    async def _stop(self, drain_seconds: float) -> None:
        await self.drain(drain_seconds)
        signal.raise_signal(signal.SIGINT)

    async def _idle_or_hurried(self) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self._hurry)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _pause(self, until: Awaitable[object], seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(until, max(seconds, 0))

    async def _watch(self, end: Callable[[], object], within: float) -> None:
        while self._is_alive():
            await asyncio.sleep(_LOOK_SECONDS)
        logger.error("the engine died: %d requests run", len(self._visits))
        self._died.set()
        await asyncio.sleep(within)
        end()

    def _start(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise EngineDiedError(DIED)
