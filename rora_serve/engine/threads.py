"""Threads: compiled functions on the very threads that torch computes with.

Threads of our own would fight with torch's over the cores: OpenMP's look for work for a while after
each loop before they sleep, and vLLM binds torch's to one core each, but no others. So functions
run on torch's, by the call that compilers make for a parallel region. It is GNU's; the OpenMP
libraries of LLVM and Intel offer it too.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch

logger = logging.getLogger(__name__)

_TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
_ALONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


# Which structure lies at the address that a function is called with.
_job_types: dict[int, type[ctypes.Structure]] = {}


def declare(function: int, job_type: type[ctypes.Structure]) -> None:
    """Note what the function at an address is called with, so that its calls can be recorded."""
    _job_types[function] = job_type


class Threads:
    """Runs C functions of one address on torch's threads.

    Args: count: of threads, one of which is the caller's.

    It has one thread, its `count`, where torch's OpenMP was not found, whatever was `asked_for`.
    `thread_num`, `num_threads` and `barrier` are addresses of OpenMP's functions, for use in the
    functions that run; 0 where they run on one thread and must not call them.
    """

    _note: ClassVar[Callable[[int, int], None] | None] = None

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
        if Threads._note is not None:
            Threads._note(function, argument)
        elif self.count == 1:
            _ALONE(function)(argument)
        else:
            self._parallel(function, argument, self.count, 0)

    @staticmethod
    @contextmanager
    def noting(note: Callable[[int, ctypes.Structure], None]) -> Iterator[None]:
        """Run nothing meanwhile, and let `note` see every function and a copy of its job."""

        def copy_and_note(function: int, argument: int) -> None:
            note(function, job_at(function, argument))

        Threads._note = copy_and_note
        try:
            yield
        finally:
            Threads._note = None

    @staticmethod
    def are_noted() -> bool:
        """Tell whether nothing runs now, see `noting`."""
        return Threads._note is not None


def job_at(function: int, argument: int) -> ctypes.Structure:
    """Return a copy of the job at an address that a declared function is called with."""
    job_type = _job_types[function]
    return job_type.from_buffer_copy(ctypes.string_at(argument, ctypes.sizeof(job_type)))


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
