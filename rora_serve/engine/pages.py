"""Pages: memory from the system, in large pages, which goes back when nobody refers to it."""

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import weakref

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
LIBC.mmap.restype = ctypes.c_void_p
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
HUGE_PAGE = 2 * 1024 * 1024
_MAP_FAILED = ctypes.c_void_p(-1).value
_PROT_NONE, _MAP_FIXED = 0, 16
_MADV_COLLAPSE = 25
MADV_POPULATE_WRITE = 23  # finds pages and leaves their content as it is; Linux 5.14


def new_memory(num_bytes: int) -> memoryview:
    """Return memory of this process's own, which goes back when nothing refers to it.

    Whole pieces of 2 MiB are asked for as one page each: with pages of 4 KiB a processor looks up
    an address for every 64 cache lines, and factors are read a fifth slower. What is left over is
    in small pages, so that nothing is rounded up.
    """
    start = _mapped(num_bytes)
    whole = num_bytes // HUGE_PAGE * HUGE_PAGE
    if whole:
        LIBC.madvise(start, whole, mmap.MADV_HUGEPAGE)  # a wish; small pages do as well
    return _unmapped_with_last_reference(start, num_bytes)


class SharedPages:
    """Memory that another process can write to: a file in memory, without a name, and mapped here.

    Linux keeps such files in pages of 4 KiB unless it is asked, since 6.1, to put those of a piece
    into a large one, which costs no copy as long as nothing was written there.

    Args:
        file: its descriptor, which is closed with the last reference to this object.
        num_bytes: that the file has.

    `are_large` tells whether large pages can be had, as far as is known by now.
    """

    def __init__(self, file: int, num_bytes: int) -> None:
        self.file, self.num_bytes = file, num_bytes
        self.are_large = True
        self._found_bytes = 0
        self._changing = threading.Lock()
        weakref.finalize(self, os.close, file).atexit = False
        self._memory = _unmapped_with_last_reference(_mapped(num_bytes, file), num_bytes)

    @classmethod
    def new(cls, num_bytes: int) -> "SharedPages":
        """Return some that no other process knows yet. Raises: OSError: too many files are open."""
        kind = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        pages = cls(os.memfd_create("rora-serve-slot", kind), num_bytes)
        os.ftruncate(pages.file, num_bytes)
        return pages

    @property
    def memory(self) -> memoryview:
        """Their bytes, which stay as long as something refers to them."""
        return self._memory[: self.num_bytes]

    def seal(self, num_bytes: int) -> None:
        """Have so many bytes for good, for another process to write to.

        The rest goes back, and what lacks is added. Who could cut the file would end the process
        that reads it.
        """
        with self._changing:
            os.ftruncate(self.file, num_bytes)
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            if num_bytes > len(self._memory):
                start = _mapped(num_bytes, self.file)
                self._memory = _unmapped_with_last_reference(start, num_bytes)
                self._found_bytes = self._found_bytes // HUGE_PAGE * HUGE_PAGE
            self.num_bytes = num_bytes

    def find_some(self) -> bool:
        """Let the system find the next 2 MiB now; what is written there, by whomever, stays.

        In a virtual machine the host may have to find them too, for milliseconds. Other Python runs
        meanwhile. Returns: whether there were some left.
        """
        with self._changing:
            at = self._found_bytes
            size = min(HUGE_PAGE, self.num_bytes - at)
            if size <= 0:
                return False
            if size < HUGE_PAGE or not self._collapse(at):
                self._populate(at, size)
            self._found_bytes = at + size
            return True

    def _collapse(self, at: int) -> bool:
        self._populate(at, mmap.PAGESIZE)  # a piece without any page can not be collapsed
        if LIBC.madvise(self._address + at, HUGE_PAGE, _MADV_COLLAPSE) == 0:
            return True
        if ctypes.get_errno() == errno.EINVAL:  # and not for lack of a large page now
            self.are_large = False
        return False

    def _populate(self, at: int, size: int) -> None:
        if LIBC.madvise(self._address + at, size, MADV_POPULATE_WRITE):  # an older system
            bytes(self._memory[at : at + size : mmap.PAGESIZE])  # what is read is there

    @property
    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_ubyte.from_buffer(self._memory))


def _mapped(num_bytes: int, file: int = -1) -> int:
    """Map memory, of a file or of none, from where a large page may begin; return its address.

    Raises: OSError: the system refuses.
    """
    size = _mapped_size(num_bytes)
    span = size + HUGE_PAGE
    # Not the allocator's memory, which keeps what was freed; and nothing mapped beyond its ends,
    # where a last piece could grow to a whole page.
    reserved = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _map(None, span, _PROT_NONE, reserved, -1)
    start = _aligned(address, HUGE_PAGE)
    kind = reserved if file < 0 else mmap.MAP_SHARED
    try:
        _map(start, size, mmap.PROT_READ | mmap.PROT_WRITE, kind | _MAP_FIXED, file)
    except OSError:
        LIBC.munmap(address, span)
        raise
    if start > address:
        LIBC.munmap(address, start - address)
    LIBC.munmap(start + size, address + span - start - size)
    return start


def _map(address: int | None, size: int, access: int, flags: int, file: int) -> int:
    found = LIBC.mmap(address, size, access, flags, file, 0)
    if found == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(found)


def _unmapped_with_last_reference(start: int, num_bytes: int) -> memoryview:
    """Return what `_mapped` did. It is not given back at the end of the process.

    Threads may be in the middle of it then, and the system takes it anyway.
    """
    content = (ctypes.c_ubyte * num_bytes).from_address(start)
    weakref.finalize(content, LIBC.munmap, start, _mapped_size(num_bytes)).atexit = False
    return memoryview(content).cast("B")


def _mapped_size(num_bytes: int) -> int:
    return _aligned(max(num_bytes, 1), mmap.PAGESIZE)


def _aligned(address: int, alignment: int) -> int:
    return -(-address // alignment) * alignment
