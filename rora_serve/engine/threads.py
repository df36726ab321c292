"""Threads: compiled functions on the very threads that torch computes with.

Threads of our own would fight with torch's over the cores: OpenMP's look for work for a while after
each loop before they sleep, and vLLM binds torch's to one core each, but no others. So functions
run on torch's, by the call that compilers make for a parallel region. It is GNU's; the OpenMP
libraries of LLVM and Intel offer it too.
"""

import ctypes
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Looked up through this one, names are those of the OpenMP that torch itself is linked to; several
# packages bring one of their own.
_LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_ALONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Threads:
    """Runs C functions of one address on torch's threads.

    Args: count: of threads, one of which is the caller's.

    `thread_num`, `num_threads` and `barrier` are addresses of OpenMP's functions, for use in the
    functions that run; 0 where they run on one thread and must not call them.
    """

    def __init__(self, count: int) -> None:
        self.thread_num = self.num_threads = self.barrier = 0
        self.count = 1
        if count == 1:
            return
        try:
            library = ctypes.CDLL(str(_LIBRARY))
            self._parallel = _PARALLEL(_address(library, "GOMP_parallel"))
            self.thread_num = _address(library, "omp_get_thread_num")
            self.num_threads = _address(library, "omp_get_num_threads")
            self.barrier = _address(library, "GOMP_barrier")
            self.count = count
        except (OSError, AttributeError) as error:
            logger.warning("adapters get one thread, torch's OpenMP was not found (%s)", error)

    def run(self, function: int, argument: int) -> None:
        """Call the function at an address on every thread, and wait for all of them.

        OpenMP may give fewer threads than were asked for, never more.
        """
        if self.count == 1:
            _ALONE(function)(argument)
        else:
            self._parallel(function, argument, self.count, 0)


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None, "a symbol that was found has an address"
    return address
