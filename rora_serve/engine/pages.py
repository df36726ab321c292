"""Pages: memory from the system, in large pages, which goes back when nobody refers to it."""

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
LIBC.mmap.restype = ctypes.c_void_p
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
HUGE_PAGE = 2 * 1024 * 1024
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_HUGEPAGE = 14


def new_memory(num_bytes: int) -> memoryview:
    """Return memory that goes back to the system when nothing refers to it."""
    return Pages(num_bytes).hold(num_bytes)


class Pages:
    """Memory straight from the system, for a slot of at most `num_bytes`.

    Whole pieces of 2 MiB are asked for as one page each: with pages of 4 KiB a processor looks up
    an address for every 64 cache lines, and factors are read a fifth slower. What is left over is
    in small pages, so that nothing is rounded up.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        size = max(num_bytes, 1)
        span = size + HUGE_PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = LIBC.mmap(None, span, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if address == _MAP_FAILED:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        # Not the allocator's memory, which keeps what was freed; and nothing mapped beyond its
        # ends, where a last piece could grow to a whole page.
        self._start = _aligned(address, HUGE_PAGE)
        if self._start > address:
            LIBC.munmap(address, self._start - address)
        self._end = address + span
        self._cut(size)
        whole = size // HUGE_PAGE * HUGE_PAGE
        if whole:
            LIBC.madvise(self._start, whole, _MADV_HUGEPAGE)  # a wish; small pages do as well
        self._free = _unmapped_with(self, self._start, self._end)

    def touch(self) -> Iterator[None]:
        """Let the system find the pages now, some more with each step. Other Python runs meanwhile.

        Not by one call for all (MADV_POPULATE_WRITE): until it returned, nobody else in the process
        could map or unmap anything.
        """
        for at in range(0, self.num_bytes, HUGE_PAGE):
            ctypes.memset(self._start + at, 0, min(HUGE_PAGE, self.num_bytes - at))
            yield

    def hold(self, num_bytes: int) -> memoryview:
        """Return its first bytes, and give the rest back; of no use afterwards."""
        self._free.detach()
        self._cut(max(num_bytes, 1))
        content = (ctypes.c_ubyte * num_bytes).from_address(self._start)
        _unmapped_with(content, self._start, self._end)
        return memoryview(content).cast("B")

    def _cut(self, size: int) -> None:
        end = _aligned(self._start + size, mmap.PAGESIZE)
        if end < self._end:
            LIBC.munmap(end, self._end - end)
            self._end = end


def _unmapped_with(holder: object, start: int, end: int) -> "weakref.finalize[..., object]":
    """Give memory back when nothing refers to its holder, but not at the end of the process.

    Threads may be in the middle of it then, and the system takes it anyway.
    """
    free: weakref.finalize[..., object] = weakref.finalize(holder, LIBC.munmap, start, end - start)
    free.atexit = False
    return free


def _aligned(address: int, alignment: int) -> int:
    return -(-address // alignment) * alignment
