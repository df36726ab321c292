"""KvMemory: the KV cache's memory, which the system finds while the model is loaded.

vLLM writes zeros to all of it when it makes the cache, and waits. In a virtual machine pages of
2 MiB come from the host, in a millisecond each; in smaller ones prompts take longer.
"""

import ctypes
import mmap
import threading
from contextlib import suppress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rora_serve.engine.pages import HUGE_PAGE, LIBC, MADV_POPULATE_WRITE
from rora_serve.memory import available_memory
from rora_serve.side_process import leave_computing_cores

# Times as much as the cache has to be free, so that vLLM, which looks for room beside what was
# found by then, sees enough.
_MARGIN = 3


class KvMemory(TorchFunctionMode):
    """While this is entered, `torch.zeros` makes the KV cache of memory that was asked for before.

    Args: num_bytes: that the cache takes at most. A thread asks for their pages from now on.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self._num_bytes = num_bytes
        self._is_used = self._is_given_up = False
        self._finding = threading.Lock()
        self._memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system without such pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._populating = threading.Thread(target=self._populate, name="kv-memory", daemon=True)
        self._populating.start()

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Make one tensor of bytes that may be the cache; all others are torch's."""
        options = kwargs or {}
        if func is torch.zeros and options.get("dtype") is torch.int8 and self._is_room(*args):
            with self._finding:
                self._is_used = True
            return torch.frombuffer(self._memory, dtype=torch.int8, count=args[0])
        return func(*args, **options)

    def wait(self) -> None:
        """Wait until all pages are found."""
        self._populating.join()

    def give_up(self) -> None:
        """Give the memory back, unless it is the cache by now."""
        with self._finding:
            self._is_given_up = not self._is_used
        if self._is_given_up:
            self.wait()
            self._memory.madvise(mmap.MADV_DONTNEED)

    def _is_room(self, *size: Any) -> bool:
        """Tell whether these are most of the bytes that were asked for, and nobody's yet."""
        is_most = len(size) == 1 and self._num_bytes // 2 < size[0] <= self._num_bytes
        return is_most and not self._is_used and not self._is_given_up

    def _populate(self) -> None:
        """Ask for one page after the other.

        By writing to it as long as it is nobody's: that way nobody else in the process has to wait
        to map memory, as whoever loads a model does all the time.
        """
        leave_computing_cores()
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for at in range(start, start + self._num_bytes, HUGE_PAGE):
            size = min(HUGE_PAGE, start + self._num_bytes - at)
            with self._finding:
                if self._is_given_up:
                    return
                if not self._is_used:
                    ctypes.memset(at, 0, size)
                    continue
            if LIBC.madvise(at, size, MADV_POPULATE_WRITE):
                return  # an old system; they are found when they are written to


def kv_memory(num_bytes: int | None) -> KvMemory | None:
    """Return memory for a cache of a size that is known, if there is plenty; else vLLM looks."""
    if num_bytes is None or available_memory() < _MARGIN * num_bytes:
        return None
    try:
        return KvMemory(num_bytes)
    except OSError:  # a limit on addresses
        return None
