"""What measuring ranks costs, and how well gradients stand in for ablation.

    python -m benchmarks.bench_allocation

SmolLM2-135M, rank 8 on all linear layers, importance measured on 32 samples in float32. Each part
is kept in results/allocation_runs.jsonl, so that a run that is cut short goes on.

Figures:
    score_max_difference: exact scores, largest difference from a loop that masks one rank at a
        time, on ranks drawn from every kind of module.
    score_seconds_vs_naive: seconds of the former over those of the latter, on the same ranks.
    gradient_seconds_vs_naive: seconds of gradient scores of all ranks over the loop's for all.
    gradient_spearman: by task and step, rank correlation of gradient and exact scores of the ranks
        that were drawn, on 8 samples.
    pruned_overlap: share of the lowest ranks by gradients that are the lowest by ablation too, of
        all ranks at rank 2; for 7 and for an eighth of them, on 16 samples.
    extra_time_vs_rora: 400 steps of 16 samples with 8 rounds over 400 without, in turn.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from adapters.base_model import cache_folder, find_model
from benchmarks.row import RESULTS, kept, write_row
from benchmarks.training_duel import SAMPLES_A_STEP, our_run, read_task
from trainer.allocation import Allocation
from trainer.config import AllocationSettings
from trainer.distributed import Processes
from trainer.importance import Measure, Scores, exact_scores, gradient_scores
from trainer.loop import EVAL_BATCH_TOKENS, Run, move_ranks, take_step
from trainer.lora_linear import LoraLinear
from trainer.model import load_base
from trainer.optim import default_learning_rate, learning_rate_factor

PARTS = RESULTS / "allocation_runs.jsonl"
TASKS = ("banking77", "snips_slots", "e2e")
STAGES = (25, 100, 250)  # steps of 16 samples
RANK, ALPHA = 8, 16
NUM_SCORE_SAMPLES = 32
# For the nine correlations and for the overlap, which take hours with more.
NUM_AGREED_SAMPLES, NUM_OVERLAP_SAMPLES = 8, 16
RANKS_OF_A_KIND = 14
NUM_STEPS, NUM_ROUNDS, FIRST_ROUND, STEPS_PER_ROUND = 400, 8, 100, 36
OVERLAP_STEP = 100


class Course:
    """A training whose ranks can be measured, in float32, wherever it stands."""

    def __init__(self, task: str, *, rank: int) -> None:
        folder = find_model(None, cache=cache_folder(os.environ))
        base = load_base("smollm2", folder, dtype="auto")
        samples = read_task(task, base.tokenizer, limit=None)
        self.run = our_run(base, samples[NUM_SCORE_SAMPLES:], packing=True, rank=rank)
        # The same adapter beside a base model in float32.
        exact_base = load_base("smollm2", folder, dtype="float32")
        self._exact = our_run(exact_base, samples[:NUM_SCORE_SAMPLES], packing=True, rank=rank)
        self._rank = rank

    def train_to(self, step: int) -> None:
        """Take steps up to number `step` of the longest stage."""
        while self.run.state.step < step:
            take_next(self.run, STAGES[-1], self._rank)

    def measure(self) -> Measure:
        """Return what the adapter's ranks are measured with now."""
        layers = self._exact.optimizer.layers
        for name, layer in self.run.optimizer.layers.items():
            layers[name].set_factors(layer.factors)
        limits = (EVAL_BATCH_TOKENS, EVAL_BATCH_TOKENS)
        return Measure(self._exact.loss, layers, self._exact.samples, *limits, Processes())


def take_next(run: Run, num_steps: int, rank: int) -> float:
    """Take the next step of a run over shuffled data, and return its seconds."""
    order = list(range(len(run.samples)))
    step = run.state.step
    first = step * SAMPLES_A_STEP % (len(order) - SAMPLES_A_STEP)
    random.Random(step * SAMPLES_A_STEP // len(order)).shuffle(order)  # noqa: S311  (an order)
    rate = default_learning_rate(rank, ALPHA / rank**0.5)
    factor = learning_rate_factor(step, num_steps=num_steps, warmup_ratio=0.06, schedule="cosine")
    started = time.perf_counter()
    take_step(run, order[first:][:SAMPLES_A_STEP], rate * factor)
    run.state.step += 1
    return time.perf_counter() - started


def drawn_ranks(layers: Mapping[str, LoraLinear]) -> dict[str, list[int]]:
    """Return one rank of each of some modules of every kind."""
    chooser = random.Random(0)  # noqa: S311
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    drawn = {name for names in kinds.values() for name in chooser.sample(names, RANKS_OF_A_KIND)}
    return {name: [chooser.randrange(layers[name].rank)] for name in layers if name in drawn}


@torch.no_grad()
def naive_scores(measure: Measure, wanted: Mapping[str, Sequence[int]]) -> list[float]:
    """Return CS by two whole forwards for each rank, one mask at a time."""
    measure.loss.base.model.eval()
    layers = measure.layers
    scores = []
    for name, indices in wanted.items():
        for index in indices:
            whole = layers[name].lora_b.data.clone()
            layers[name].lora_b.data[:, index] = 0
            without = mean_loss(measure)
            layers[name].lora_b.data.zero_()
            layers[name].lora_b.data[:, index] = whole[:, index]
            scalings = {other: layer.scaling for other, layer in layers.items() if other != name}
            for other in scalings:
                layers[other].scaling = 0.0
            alone = mean_loss(measure)
            for other, scaling in scalings.items():
                layers[other].scaling = scaling
            layers[name].lora_b.data.copy_(whole)
            scores.append(without - alone)
    return scores


def mean_loss(measure: Measure) -> float:
    """Return the mean loss of all samples in one forward."""
    sums, counts = measure.loss.sample_losses(measure.samples)
    return float(sums.sum() / counts.sum())


def listed(scores: Scores, wanted: Mapping[str, Sequence[int]]) -> list[float]:
    """Return the scores of some ranks, in their order."""
    return [float(scores.by_module[name][i]) for name, indices in wanted.items() for i in indices]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of two rankings."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return round(float(np.corrcoef(ranks)[0, 1]), 4)


def agreement(task: str) -> dict[str, Any]:
    """Return the rank correlation of gradient and exact scores at each stage of a training."""
    course = Course(task, rank=RANK)
    found = {}
    for stage in STAGES:
        course.train_to(stage)
        measure = course.measure()
        measure = replace(measure, samples=measure.samples[:NUM_AGREED_SAMPLES])
        wanted = drawn_ranks(measure.layers)
        gradient, exact = gradient_scores(measure), exact_scores(measure, wanted)
        found[str(stage)] = {
            "spearman": spearman(listed(gradient, wanted), listed(exact, wanted)),
            "loss": exact.loss,
            "base_loss": exact.base_loss,
        }
        print(task, stage, found[str(stage)], file=sys.stderr, flush=True)
    return {"stages": found, "num_ranks": sum(map(len, wanted.values()))}


def against_the_loop(task: str) -> dict[str, Any]:
    """Return how exact and gradient scores compare with the loop, in difference and in seconds."""
    course = Course(task, rank=RANK)
    course.train_to(STAGES[1])
    measure = course.measure()
    wanted = drawn_ranks(measure.layers)
    names = list(wanted)
    halves = [{name: wanted[name] for name in names[start::2]} for start in (0, 1)]
    exact_scores(measure, {names[0]: wanted[names[0]]})  # warms up
    naive: dict[str, float] = {}
    naive_seconds = 0.0
    seconds: dict[str, float] = {}
    found: dict[str, Scores] = {}
    # In turn: half of the loop, ours, the other half.
    for half, scored in zip(halves, ("exact", "gradient"), strict=True):
        started = time.perf_counter()
        naive |= dict(zip(half, naive_scores(measure, half), strict=True))
        naive_seconds += time.perf_counter() - started
        started = time.perf_counter()
        found[scored] = (
            exact_scores(measure, wanted) if scored == "exact" else gradient_scores(measure)
        )
        seconds[scored] = time.perf_counter() - started
    differences = [
        abs(naive[name] - score)
        for name, score in zip(names, listed(found["exact"], wanted), strict=True)
    ]
    all_ranks = sum(layer.rank for layer in measure.layers.values())
    return {
        "max_difference": max(differences),
        "num_ranks": len(names),
        "seconds": {"naive": naive_seconds, **seconds},
        "exact_vs_naive": seconds["exact"] / naive_seconds,
        "gradient_vs_naive": seconds["gradient"] / (naive_seconds / len(names) * all_ranks),
    }


def overlap(task: str) -> dict[str, Any]:
    """Return how many of the ranks that each score would prune are the same, of all at rank 2."""
    course = Course(task, rank=2)
    course.train_to(OVERLAP_STEP)
    measure = course.measure()
    measure = replace(measure, samples=measure.samples[:NUM_OVERLAP_SAMPLES])
    gradient, exact = gradient_scores(measure), exact_scores(measure)
    ordered = [np.argsort(flat(scores), kind="stable") for scores in (gradient, exact)]
    shares = {}
    for number in (7, len(ordered[0]) // 8):
        lowest = [set(order[:number].tolist()) for order in ordered]
        shares[str(number)] = round(len(lowest[0] & lowest[1]) / number, 3)
    return {
        "shares": shares,
        "num_ranks": len(ordered[0]),
        "spearman": spearman(flat(gradient).tolist(), flat(exact).tolist()),
    }


def flat(scores: Scores) -> Any:
    """Return all scores one after the other, [num_ranks]."""
    return torch.cat(list(scores.by_module.values())).numpy()


def extra_time(task: str) -> dict[str, Any]:
    """Return seconds of a run with rounds over those of one without, step by step in turn."""
    folder = find_model(None, cache=cache_folder(os.environ))
    runs = []
    for _ in range(2):
        base = load_base("smollm2", folder, dtype="auto")
        samples = read_task(task, base.tokenizer, limit=None)
        runs.append(our_run(base, samples[NUM_SCORE_SAMPLES:], packing=True))
    moving = runs[0]
    settings = AllocationSettings(enabled=True, rounds=NUM_ROUNDS)
    moving.config = moving.config.model_copy(update={"allocation": settings})
    due = tuple(FIRST_ROUND + STEPS_PER_ROUND * number for number in range(NUM_ROUNDS))
    allocation = Allocation(
        moving.config, len(moving.optimizer.layers), due, samples[:NUM_SCORE_SAMPLES]
    )
    seconds = [0.0, 0.0]
    for step in range(1, NUM_STEPS + 1):
        # Whoever goes first finds colder memory: they take turns in that too.
        for side in (0, 1) if step % 2 else (1, 0):
            seconds[side] += take_next(runs[side], NUM_STEPS, RANK)
        if allocation.is_due(step, len(moving.state.rounds)):
            move_ranks(moving, allocation)
    ranks = [layer.rank for layer in moving.optimizer.layers.values()]
    return {
        "extra_time": (seconds[0] + moving.state.scoring_seconds) / seconds[1],
        "scoring_share": moving.state.scoring_seconds / seconds[1],
        "seconds": seconds,
        "scoring_seconds": moving.state.scoring_seconds,
        "ranks": [min(ranks), max(ranks)],
        "dtype": str(moving.loss.base.model.dtype).removeprefix("torch."),
    }


def main() -> None:
    """Measure what is not in the file of parts yet, and write one row."""
    parser = argparse.ArgumentParser(prog="bench_allocation", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    tasks: Sequence[str] = parser.parse_args().tasks

    def part(name: str, task: str, measured: Any) -> dict[str, Any]:
        seen: dict[str, Any] = kept(PARTS, {"part": name, "task": task}, lambda: measured(task))
        return seen

    loop = part("loop", tasks[0], against_the_loop)
    extra = part("extra_time", tasks[0], extra_time)
    lowest = part("overlap", tasks[0], overlap)
    agreed = {task: part("agreement", task, agreement) for task in tasks}
    correlations = {
        task: {stage: seen["spearman"] for stage, seen in found["stages"].items()}
        for task, found in agreed.items()
    }
    figures: dict[str, object] = {
        "score_max_difference": loop["max_difference"],
        "score_seconds_vs_naive": round(loop["exact_vs_naive"], 3),
        "gradient_seconds_vs_naive": round(loop["gradient_vs_naive"], 5),
        "gradient_spearman": correlations,
        "pruned_overlap": lowest["shares"],
        "extra_time_vs_rora": round(extra["extra_time"], 3),
        "scoring_share": round(extra["scoring_share"], 3),
        "least_spearman": min(min(stages.values()) for stages in correlations.values()),
        "median_spearman": statistics.median(
            value for stages in correlations.values() for value in stages.values()
        ),
        "num_ranks": {"loop": loop["num_ranks"], "overlap": lowest["num_ranks"]},
        "set_up": {
            "model": "SmolLM2-135M-Instruct", "rank": RANK, "score_samples": NUM_SCORE_SAMPLES,
            "score_samples_of_correlations": NUM_AGREED_SAMPLES,
            "score_samples_of_overlap": NUM_OVERLAP_SAMPLES,
            "steps": NUM_STEPS, "rounds": NUM_ROUNDS, "dtype_of_scores": "float32",
            "dtype_of_steps": extra["dtype"], "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    write_row("bench_allocation", figures, ("rora-serve", "torch", "transformers"))


if __name__ == "__main__":
    main()
