"""The KV cache's memory: whose it is, and that its content stays while pages are found."""

from typing import Any

import psutil
import pytest
import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from rora_serve.engine.kv_memory import KvMemory, kv_memory
from rora_serve.engine.worker import RaggedCpuWorker

NUM_BYTES = 64 * 1024**2 + 4096


def test_the_cache_lies_in_memory_that_was_asked_for() -> None:
    with KvMemory(NUM_BYTES) as memory:
        other = torch.zeros(NUM_BYTES, dtype=torch.float32)
        small = torch.zeros(NUM_BYTES // 4, dtype=torch.int8)
        cache = torch.zeros(NUM_BYTES - 100, dtype=torch.int8, device=torch.device("cpu"))
        second = torch.zeros(NUM_BYTES, dtype=torch.int8)
    assert [t.numel() for t in (other, small, second)] == [NUM_BYTES, NUM_BYTES // 4, NUM_BYTES]
    assert (cache.numel(), cache.dtype) == (NUM_BYTES - 100, torch.int8)
    assert cache.untyped_storage().nbytes() == NUM_BYTES - 100
    address = torch.frombuffer(memory._memory, dtype=torch.int8).data_ptr()
    assert [t.data_ptr() == address for t in (other, small, cache, second)] == [
        False, False, True, False,
    ]  # fmt: skip
    assert not cache.any()


def test_what_is_written_while_pages_are_found_stays() -> None:
    with KvMemory(NUM_BYTES) as memory:
        cache = torch.zeros(NUM_BYTES, dtype=torch.int8)
    cache.fill_(7)
    memory.wait()
    assert bool((cache == 7).all())


def test_all_pages_are_found() -> None:
    before = psutil.Process().memory_info().rss
    memory = KvMemory(NUM_BYTES)
    memory.wait()
    assert psutil.Process().memory_info().rss - before > 0.9 * NUM_BYTES


def test_memory_that_vllm_makes_no_cache_of_is_given_back() -> None:
    before = psutil.Process().memory_info().rss
    memory = KvMemory(NUM_BYTES)
    memory.give_up()
    assert not memory._populating.is_alive()
    assert psutil.Process().memory_info().rss - before < NUM_BYTES // 4
    with memory:
        cache = torch.zeros(NUM_BYTES, dtype=torch.int8)
    assert cache.data_ptr() != torch.frombuffer(memory._memory, dtype=torch.int8).data_ptr()


def test_memory_that_is_the_cache_is_not_given_back() -> None:
    with KvMemory(NUM_BYTES) as memory:
        cache = torch.zeros(NUM_BYTES, dtype=torch.int8)
    cache.fill_(7)
    memory.give_up()
    memory.wait()
    assert bool((cache == 7).all())


@pytest.mark.parametrize("missing", ["for good", "for what was found", None])
def test_the_worker_gives_it_up_where_vllm_misses_it(
    missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM refuses to start where less than the cache is free, beside what was found for it."""
    memory = KvMemory(NUM_BYTES)
    worker: Any = object.__new__(RaggedCpuWorker)
    worker._kv_memory = memory

    def determine(_: Any) -> int:
        if missing == "for good" or (missing and not memory._is_given_up):
            raise ValueError("Available memory is less than requested")
        return NUM_BYTES

    monkeypatch.setattr(CPUWorker, "determine_available_memory", determine)
    if missing == "for good":
        with pytest.raises(ValueError, match="Available memory"):
            worker.determine_available_memory()
    else:
        assert worker.determine_available_memory() == NUM_BYTES
    assert memory._is_given_up == (missing is not None)
    memory.give_up()


def test_a_cache_of_a_size_unknown_or_of_all_memory_is_vllms() -> None:
    assert kv_memory(None) is None
    assert kv_memory(psutil.virtual_memory().total // 2) is None
    assert kv_memory(NUM_BYTES) is not None


@pytest.mark.parametrize("num_bytes", [1, 4096, 2 * 1024**2 + 1])
def test_any_size_will_do(num_bytes: int) -> None:
    with KvMemory(num_bytes) as memory:
        cache = torch.zeros(num_bytes, dtype=torch.int8)
    memory.wait()
    assert cache.numel() == num_bytes
    assert not cache.any()
