"""How fast rora-train trains, beside PEFT with transformers' Trainer, and whether it is the same.

    python -m benchmarks.bench_training

SmolLM2-135M, rank 8 on all linear layers, 16 samples a step, each side's steps in turn in one
process. A ratio is of the samples' tokens per second, ours over theirs, the first steps left out
and padding not counted; the median over tasks and repeats.

Figures:
    same_batches_vs_peft: identical samples in identical padded batches; our linear layers pass over
        the padding.
    best_vs_peft_best: each as its users run it: the Trainer grouping samples by length, ours
        packing them in random order.
    best_vs_peft_best_bfloat16: the same in bfloat16, where the processor multiplies in it; first
        task.
    peak_rss_vs_peft: memory of a process that only trains, in the same setting; first task.
    loss_gap: largest difference of a step's loss on identical batches, over 20 steps, in nats.
    flops_vs_limit: our products a second over those of one large product.
    same_batches_vs_dora, same_batches_vs_adalora: beside PEFT's DoRA and AdaLoRA on the first task.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.row import RESULTS, kept, spread, write_row

TASKS = ("banking77", "snips_slots", "e2e")
NUM_STEPS, NUM_FEW_STEPS = 20, 5
# Every duel as it was seen: a run that is cut short goes on where it stopped.
DUELS = RESULTS / "training_duels.jsonl"
PACKAGES = ("rora-serve", "torch", "transformers", "peft", "accelerate")


def run_duel(mode: str, task: str, *more: str, repeat: int = 0) -> dict[str, Any]:
    """Return what one duel, in a process of its own, saw; now, or in a run that was cut short."""

    def fight() -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.training_duel", mode, task, *more],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    key = {"mode": mode, "task": task, "arguments": list(more), "repeat": repeat}
    seen: dict[str, Any] = kept(DUELS, key, fight)
    return seen


def ratios(found: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Return the ratios of all tasks and repeats."""
    return [seen["ratio"] for repeats in found.values() for seen in repeats]


def by_task(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return each task's median ratio."""
    return {
        task: round(statistics.median(seen["ratio"] for seen in repeats), 3)
        for task, repeats in found.items()
    }


def multiplies_in_bfloat16() -> bool:
    """Tell whether the processor has instructions for it."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def main() -> None:
    """Measure, and write one row."""
    parser = argparse.ArgumentParser(prog="bench_training", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    arguments = parser.parse_args()
    tasks: Sequence[str] = arguments.tasks
    few = ("--steps", str(NUM_FEW_STEPS))
    same: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    best: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    for repeat in range(arguments.repeats):
        for task in tasks:
            # Once long enough to see losses drift apart.
            steps = ("--steps", str(NUM_STEPS)) if repeat == 0 and task == tasks[0] else few
            same[task].append(run_duel("same", task, *steps, repeat=repeat))
            best[task].append(run_duel("best", task, *few, repeat=repeat))
    memory = {
        task: [run_duel(f"{side}-alone", task, *few)["peak_rss_mb"] for side in ("ours", "peft")]
        for task in tasks[:1]
    }
    others = {
        f"same_batches_vs_{name}": round(run_duel(name, tasks[0], *few)["ratio"], 3)
        for name in ("dora", "adalora")
    }
    if multiplies_in_bfloat16():
        in_16_bits = run_duel("best", tasks[0], *few, "--dtype", "bfloat16")
        others["best_vs_peft_best_bfloat16"] = round(in_16_bits["ratio"], 3)
    limits = [seen["flops_vs_limit"] for repeats in best.values() for seen in repeats]
    figures: dict[str, object] = {
        "same_batches_vs_peft": round(statistics.median(ratios(same)), 3),
        "best_vs_peft_best": round(statistics.median(ratios(best)), 3),
        "peak_rss_vs_peft": round(max(ours / theirs for ours, theirs in memory.values()), 3),
        "loss_gap": max(repeats[0]["loss_gap"] for repeats in same.values()),
        "flops_vs_limit": round(statistics.median(limits), 3),
        **others,
        "same_batches_spread": spread(ratios(same)),
        "same_batches_by_task": by_task(same),
        "best_spread": spread(ratios(best)),
        "best_by_task": by_task(best),
        "our_tokens_per_s": {
            task: round(statistics.median(seen["our_tokens_per_s"] for seen in repeats))
            for task, repeats in best.items()
        },
        "peak_rss_mb": {task: [round(mb) for mb in pair] for task, pair in memory.items()},
        "set_up": {
            "model": "SmolLM2-135M-Instruct", "dtype": "float32", "rank": 8,
            "samples_a_step": 16, "threads": torch.get_num_threads(), "compile": False,
            "tasks": list(tasks), "steps": [NUM_STEPS, NUM_FEW_STEPS],
        },
        "repeats": arguments.repeats,
    }  # fmt: skip
    write_row("bench_training", figures, PACKAGES)


if __name__ == "__main__":
    main()
