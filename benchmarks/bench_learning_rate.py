"""Which learning rate suits which rank, for RoRA: held-out loss after a short training.

    python -m benchmarks.bench_learning_rate

Trains SmolLM2-135M on each task at each rank and rate, 18 steps of 16 samples, warm-up and
cosine as by default, and measures the loss on held-out samples. A row for each run is appended to
results/learning_rate_runs.jsonl, and runs that are there are not repeated; the last line is the
best rate by rank, where a parabola through the best rate of a task and its neighbours is least.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.base_model import cache_folder, find_model
from benchmarks.row import RESULTS, commit, write_row
from benchmarks.training_duel import SAMPLES_A_STEP, our_run, read_task
from trainer.loop import take_step
from trainer.model import load_base
from trainer.optim import learning_rate_factor

RUNS = RESULTS / "learning_rate_runs.jsonl"
TASKS = ("banking77", "snips_slots", "e2e")
RANKS = (2, 8, 32, 128)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
NUM_STEPS = 18
NUM_HELD_OUT = 32


def train_once(task: str, rank: int, rate: float) -> dict[str, Any]:
    """Return the held-out loss after training at one rate."""
    folder = find_model(None, cache=cache_folder(os.environ))
    base = load_base("smollm2", folder, dtype="auto")
    samples = read_task(task, base.tokenizer, limit=NUM_STEPS * SAMPLES_A_STEP + NUM_HELD_OUT)
    held_out, samples = samples[:NUM_HELD_OUT], samples[NUM_HELD_OUT:]
    run = our_run(base, samples, packing=True, rank=rank)
    started = time.perf_counter()
    for step in range(NUM_STEPS):
        factor = learning_rate_factor(
            step, num_steps=NUM_STEPS, warmup_ratio=0.06, schedule="cosine"
        )
        indices = range(step * SAMPLES_A_STEP, min((step + 1) * SAMPLES_A_STEP, len(samples)))
        loss, _, _ = take_step(run, indices, rate * factor)
        if not math.isfinite(loss):
            break
    base.model.eval()
    sums, counts = run.loss.sample_losses(held_out)
    return {
        "task": task,
        "rank": rank,
        "learning_rate": rate,
        "held_out_loss": round(float(sums.sum() / counts.sum()), 4),
        "seconds": round(time.perf_counter() - started, 1),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "steps": NUM_STEPS,
        "commit": commit(),
    }


def best_rate(losses: dict[float, float]) -> float:
    """Return where a parabola through the best rate and its neighbours, by logarithm, is least."""
    rates = sorted(losses)
    middle = min(max(rates.index(min(losses, key=losses.__getitem__)), 1), len(rates) - 2)
    near = rates[middle - 1 : middle + 2]
    a, b, _ = np.polyfit([math.log10(rate) for rate in near], [losses[rate] for rate in near], 2)
    least = -b / (2 * a) if a > 0 else math.log10(min(near, key=losses.__getitem__))
    return float(10 ** min(max(least, math.log10(rates[0])), math.log10(rates[-1])))


def main() -> None:
    """Train what is not in the file of runs yet, and write the row of best rates."""
    parser = argparse.ArgumentParser(
        prog="bench_learning_rate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    tasks: list[str] = parser.parse_args().tasks
    done = read_runs(RUNS)
    for task in tasks:
        for rank in RANKS:
            for rate in RATES:
                if (task, rank, rate) not in done:
                    row = train_once(task, rank, rate)
                    done[task, rank, rate] = row["held_out_loss"]
                    with RUNS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), file=sys.stderr, flush=True)
    best = {
        rank: {task: best_rate({rate: done[task, rank, rate] for rate in RATES}) for task in tasks}
        for rank in RANKS
    }
    figures: dict[str, object] = {
        "best_learning_rate": {
            rank: float(f"{statistics.geometric_mean(found.values()):.1e}")
            for rank, found in best.items()
        },
        "by_task": {
            rank: {task: float(f"{rate:.1e}") for task, rate in found.items()}
            for rank, found in best.items()
        },
        "set_up": {"alpha": 16, "steps": NUM_STEPS, "threads": torch.get_num_threads()},
    }
    write_row("bench_learning_rate", figures, ["torch", "transformers"])


def read_runs(path: Path) -> dict[tuple[str, int, float], float]:
    """Return the losses that earlier runs found, by task, rank and rate."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["task"], row["rank"], row["learning_rate"]): row["held_out_loss"] for row in rows}


if __name__ == "__main__":
    main()
