"""SideProcess: work in Python that would stop the server's loop, in a process of its own.

Checking a file and laying it out is such work, and in whichever of vLLM's processes it ran, that
process's loop would stand still for as long.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection
from typing import TypeVar, TypeVarTuple

from adapters.errors import StoreError

logger = logging.getLogger(__name__)

NICENESS = 10  # what computes goes first: a tenth of a core for reading, if none is free
# A quarter for loading, which others wait for, and which keeps out of the longest steps by itself
# (rora_serve.engine.first_steps).
LOADING_NICENESS = 5

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class SideProcess:
    """Runs functions in one process, one after the other; it starts with the first, or `start`.

    Args: niceness: of the process.
    """

    def __init__(self, niceness: int = NICENESS) -> None:
        self._niceness = niceness
        self._processes = _new_processes(niceness)
        # One job at a time is the process's: if it dies, only that one fails.
        self._working = asyncio.Lock()

    def start(self) -> None:
        """Start the process now, not with its first job."""
        self._processes.submit(os.getpid)

    async def run(
        self, what: str, job: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Result:
        """Return what `job` returns.

        Args: what: adapter it is about, for the error.
        Raises: StoreError: it ended the process; and whatever it raises.
        """
        loop = asyncio.get_running_loop()
        try:
            async with self._working:
                return await loop.run_in_executor(self._processes, job, *arguments)
        except BrokenProcessPool as error:
            logger.error("the process that reads adapters ended; another one is started")
            self._processes = _new_processes(self._niceness)
            self.start()
            raise StoreError(
                f"{what}: the process that reads adapters was ended while it was read, as a "
                "system without free memory does; try again"
            ) from error

    def close(self) -> None:
        """End the process."""
        self._processes.shutdown(wait=False, cancel_futures=True)


def _new_processes(niceness: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(niceness,))


def leave_computing_cores() -> None:
    """Let the calling thread of vLLM's worker, whose cores compute, run on any other."""
    with suppress(OSError, AttributeError):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))


def follow_parent() -> None:
    """End this process when the one that started it is gone, whatever it does then."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(0)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


def _begin(niceness: int) -> None:
    """Set up the process: only its parent ends it, and nothing of it outlives that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(niceness)
    follow_parent()
