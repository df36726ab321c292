"""Loader: reads adapters in a process of its own, so that reading stalls neither engine nor server.

Checking a file and laying it out is work in Python, and in whichever of vLLM's processes it ran,
that process's loop would stand still for as long.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import connection
from pathlib import Path

from adapters import ResolvedVersion
from adapters.errors import StoreError
from rora_serve.engine.handover import Draft, hand_over

logger = logging.getLogger(__name__)

_NICENESS = 10  # what computes goes first: a tenth of a core for reading, if none is free


class Loader:
    """Hands adapters of the store to the engine's worker, one after the other.

    Args: socket: where the worker receives them.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._processes = _new_process()
        # One job at a time is the process's: if it dies, only that one fails.
        self._reading = asyncio.Lock()

    async def load(self, lora_int_id: int, resolved: ResolvedVersion) -> int:
        """Load an adapter's weights into the engine. Returns: bytes that they take there.

        Raises:
            ArtifactError: the folder is not what was stored.
            AdapterMismatchError: it does not fit the model.
            StoreError: reading it ended the loader's process.
            EngineSeamError: the engine takes no adapters.
        """
        job = (self._socket, lora_int_id, resolved.folder, resolved.version.weights_digest)
        loop = asyncio.get_running_loop()
        try:
            async with self._reading:
                return await loop.run_in_executor(self._processes, _hand_over, *job)
        except BrokenProcessPool as error:
            logger.error("the loader's process ended; another one is started")
            self._processes = _new_process()
            raise StoreError(
                f"{resolved.public_id}: the process that reads adapters was ended while it was "
                "read, as a system without free memory does; try again"
            ) from error

    def close(self) -> None:
        """End the process."""
        self._processes.shutdown(wait=False, cancel_futures=True)


def _new_process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    processes = ProcessPoolExecutor(1, mp_context=context, initializer=_begin)
    processes.submit(os.getpid)  # starts it now, not with the first adapter
    return processes


@cache
def _draft() -> Draft:
    """Return this process's draft: it does one job at a time."""
    return Draft()


def _hand_over(path: Path, lora_int_id: int, folder: Path, weights_digest: str) -> int:
    return hand_over(path, lora_int_id, folder, weights_digest, draft=_draft())


def _begin() -> None:
    """Set up the process: only its parent ends it, and nothing of it outlives that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICENESS)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(0)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
