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

_TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
_ALONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Threads:
    """Runs C functions of one address on torch's threads.

    Args: count: of threads, one of which is the caller's.

    It has one thread, its `count`, where torch's OpenMP was not found, whatever was `asked_for`.
    `thread_num`, `num_threads` and `barrier` are addresses of OpenMP's functions, for use in the
    functions that run; 0 where they run on one thread and must not call them.
    """

    def __init__(self, count: int) -> None:
        self.thread_num = self.num_threads = self.barrier = 0
        self.count, self.asked_for = 1, count
        if count == 1:
            return
        try:
            parallel, *others = map(_address_for_torch, _NAMES)
        except (OSError, AttributeError) as error:
            logger.warning(
                "compiled functions get one thread, torch's OpenMP was not found (%s)", error
            )
            return
        self._parallel = _PARALLEL(parallel)
        self.thread_num, self.num_threads, self.barrier = others
        self.count = count

    def run(self, function: int, argument: int) -> None:
        """Call the function at an address on every thread, and wait for all of them.

        OpenMP may give fewer threads than were asked for, never more.
        """
        if self.count == 1:
            _ALONE(function)(argument)
        else:
            self._parallel(function, argument, self.count, 0)


def _address_for_torch(name: str) -> int:
    """Return the address of a function as torch finds it; several packages bring an OpenMP.

    First among what is loaded for all, where a preloaded library comes before torch's own.
    """
    try:
        function = getattr(ctypes.CDLL(None), name)
    except AttributeError:
        function = getattr(ctypes.CDLL(str(_TORCH)), name)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None, "a symbol that was found has an address"
    return address
