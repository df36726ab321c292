"""ALoRA: ranks move between modules while the adapter trains, under a fixed budget.

Owns who loses and who gets ranks, given their scores, when that happens, and the record of it. The
scores are importance.py's. "ALoRA" is Allocating LoRA here, not PEFT's Activated LoRA.
"""

import bisect
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adapters.config import AdapterConfig
from adapters.errors import ConfigError, DataError, TrainingError
from adapters.scaling import exact_config, scaling_factor
from trainer.config import TrainConfig
from trainer.data import Sample
from trainer.importance import (
    Measure,
    Scores,
    exact_scores,
    gradient_scores,
    random_scores,
    screened_scores,
)
from trainer.lora_linear import LoraLinear
from trainer.optim import RankAdamW

# A pass forward and backward for each of the two ends between which gates are differentiated.
_PASSES_OF_GRADIENT_SCORE = 2
_DIGITS = 4  # of scores that are kept


@dataclass(frozen=True)
class Move:
    """Which ranks go, and where new ones come.

    Args:
        pruned: indices of the ranks that go, increasing, by module; at least one each.
        grown: new ranks by module; at least one each, and none in a module that loses some.
    """

    pruned: Mapping[str, tuple[int, ...]]
    grown: Mapping[str, int]


def choose_move(
    scores: Mapping[str, Tensor],
    *,
    num_moved: int,
    max_ranks: Mapping[str, int],
    min_rank: int = 0,
    protected: Mapping[str, Tensor] | None = None,
) -> Move:
    """Prune the least important ranks of all modules; let modules that lost none have as many more.

    Of equal scores the earlier module's goes first, then the lower index. What went is handed out
    as evenly as can be, and what is left over to the modules of the highest average importance; a
    module without ranks comes last there. If every module lost one, nothing is added.

    Args:
        scores: [rank] by module, larger is more important.
        num_moved: ranks to prune, fewer if no more may go.
        max_ranks: that a module can use, by module.
        min_rank: that no module is pruned below.
        protected: [rank], bool, by module: ranks that stay; none: every rank may go.
    Raises: TrainingError: a score is not a number.
    Source: arXiv 2403.16187, algorithm 1 with footnotes 3 and 4.
    Checked against: the paper's example and a loop, in tests/trainer/test_allocation.py.
    """
    candidates = []
    for place, (name, of_module) in enumerate(scores.items()):
        for index, score in enumerate(of_module.tolist()):
            if math.isnan(score):
                raise TrainingError(
                    f"{name}: the score of rank {index} is not a number, one is expected; try a "
                    "lower train.learning_rate"
                )
            if protected is None or not protected[name][index]:
                candidates.append((score, place, index, name))
    pruned: dict[str, list[int]] = {}
    num_pruned = 0
    for _, _, index, name in sorted(candidates):
        if num_pruned == num_moved:
            break
        going = pruned.get(name, [])
        if len(scores[name]) - len(going) > min_rank:
            pruned[name] = [*going, index]
            num_pruned += 1
    unpruned = [name for name in scores if name not in pruned]
    room = {name: max_ranks[name] - len(scores[name]) for name in unpruned}
    # Stable: of equal averages the earlier module comes first.
    by_importance = sorted(unpruned, key=lambda name: -_average(scores[name]))
    return Move(
        {name: tuple(sorted(indices)) for name, indices in pruned.items()},
        _deal_out(num_pruned, by_importance, room),
    )


def _deal_out(count: int, modules: Sequence[str], room: Mapping[str, int]) -> dict[str, int]:
    """Give `count` ranks one at a time to each module in turn, as long as one has room."""
    given = dict.fromkeys(modules, 0)
    while count and any(given[name] < room[name] for name in modules):
        for name in modules:
            if count and given[name] < room[name]:
                given[name] += 1
                count -= 1
    return {name: number for name, number in given.items() if number}


def _average(scores: Tensor) -> float:
    """Return the mean; of a module without ranks, less than any."""
    return float(scores.mean()) if len(scores) else -math.inf


@dataclass(frozen=True)
class Allocation:
    """When ranks move in a run, how many, and how a module's scaling follows its rank.

    Args:
        config: of the run.
        num_modules: that are adapted.
        rounds_after: steps after which a round is due, increasing.
        score_samples: that importance is measured on; never trained on.
    """

    config: TrainConfig
    num_modules: int
    rounds_after: tuple[int, ...]
    score_samples: Sequence[Sample]

    @property
    def budget(self) -> int:
        """Ranks of all modules together, at most."""
        return self.num_modules * self.config.adapter.rank

    @property
    def num_moved(self) -> int:
        """Ranks that move in a round."""
        wanted = self.config.allocation.ranks_per_round
        return wanted if isinstance(wanted, int) else max(1, round(wanted * self.budget))

    def in_words(self) -> str:
        """Return what will happen, in one line."""
        settings = self.config.allocation
        apart = f"{len(self.score_samples)} samples set apart"
        if not self.rounds_after:
            return f"allocation: none moves, a control; {apart}"
        return (
            f"allocation: {self.num_moved} of {self.budget} ranks move in each of "
            f"{settings.rounds} rounds, after steps {self.rounds_after[0]} to "
            f"{self.rounds_after[-1]}; {settings.score} scores on {apart}"
        )

    def is_due(self, step: int, num_done: int) -> bool:
        """Tell whether a round follows this step, after `num_done` rounds."""
        return num_done < len(self.rounds_after) and step == self.rounds_after[num_done]

    def measure(self, measure: Measure, number: int) -> Scores:
        """Return every rank's score in round `number`, from 1."""
        kind = self.config.allocation.score
        if kind == "random":
            return random_scores(measure, seed=self.config.train.seed * 1_009 + number)
        if kind == "exact":
            return exact_scores(measure)
        if kind == "screened":
            return screened_scores(measure, self.num_moved)
        return gradient_scores(measure)

    def choose(self, scores: Scores, optimizer: RankAdamW, number: int) -> Move:
        """Return the move of round `number`, from 1."""
        settings = self.config.allocation
        protected = None
        if settings.grace_rounds and number > 1:
            # Ranks that began in the last rounds have taken at most this many steps.
            first_spared = max(1, number - settings.grace_rounds)
            youngest = self.rounds_after[number - 1] - self.rounds_after[first_spared - 1]
            protected = {
                name: (state["num_steps"] <= youngest).cpu()
                for name, state in optimizer.state.items()
            }
        return choose_move(
            scores.by_module,
            num_moved=self.num_moved,
            max_ranks={
                name: min(layer.in_features, layer.out_features)
                for name, layer in optimizer.layers.items()
            },
            min_rank=settings.min_rank,
            protected=protected,
        )

    def apply(self, move: Move, optimizer: RankAdamW, number: int) -> None:
        """Prune and grow layers and moments; what the other ranks compute stays as it is.

        Args: number: of the round; with the seed it decides the new rows of A.
        """
        before = {name: layer.rank for name, layer in optimizer.layers.items()}
        generator = torch.Generator()
        generator.manual_seed(self.config.train.seed * 1_000_003 + number)
        for name, layer in optimizer.layers.items():
            pruned, num_new = move.pruned.get(name, ()), move.grown.get(name, 0)
            if pruned or num_new:
                kept = [index for index in range(layer.rank) if index not in pruned]
                optimizer.resize(
                    name,
                    kept,
                    num_new,
                    scaling=self.scaling(len(kept) + num_new),
                    generator=generator,
                )
        self._check_budget(move, before, optimizer.layers)

    def _check_budget(
        self, move: Move, before: Mapping[str, int], layers: Mapping[str, LoraLinear]
    ) -> None:
        """Assert what Algorithm 1 promises of every round."""
        num_pruned, num_grown = sum(map(len, move.pruned.values())), sum(move.grown.values())
        after = {name: layer.rank for name, layer in layers.items()}
        assert not move.pruned.keys() & move.grown.keys(), "a module was pruned and grown"
        assert num_grown <= num_pruned <= self.num_moved, "more ranks came than went"
        assert sum(after.values()) == sum(before.values()) - num_pruned + num_grown
        assert sum(after.values()) <= self.budget, "there are more ranks than the budget has"
        assert len(move.pruned) < len(before) or not num_grown, "ranks came though all lost some"

    def scaling(self, rank: int) -> float:
        """Return a module's scaling at a rank; 0 at rank 0."""
        adapter = self.config.adapter
        if self.config.allocation.scale_rank == "initial":
            rank = adapter.rank if rank else 0
        if rank == 0:
            return 0.0
        return scaling_factor(adapter.alpha, rank, use_rslora=adapter.method == "rora")

    def alpha(self, rank: int) -> float:
        """Return the alpha with which a file of this rank has the scaling that was trained."""
        use_rslora = self.config.adapter.method == "rora"
        return self.scaling(rank) / scaling_factor(1.0, rank, use_rslora=use_rslora)


def plan_rounds(config: TrainConfig, epochs: Sequence[float]) -> tuple[int, ...]:
    """Return the steps after which the rounds of a run are due; none without allocation.

    Args: epochs: passes over the data after each step of the run, increasing.
    Raises: ConfigError: a round would not be trained before the next one.
    """
    settings = config.allocation
    if not settings.enabled or settings.score == "none":
        return ()
    due = [
        settings.warmup_epochs + number * settings.epochs_per_round
        for number in range(settings.rounds)
    ]
    # Passes are rounded to four digits in the plan.
    steps = [bisect.bisect_left(epochs, epoch - 1e-4) + 1 for epoch in due]
    for number, (step, following) in enumerate(pairwise(steps), start=1):
        if step == following:
            raise ConfigError(
                f"allocation: rounds {number} and {number + 1} both follow step {step}, steps "
                "between them are expected; raise allocation.epochs_per_round or lower "
                "train.batch_tokens"
            )
    if steps[-1] >= len(epochs):
        raise ConfigError(
            f"allocation: round {settings.rounds} would follow the last step, {len(epochs)}, steps "
            "behind it are expected; lower allocation.rounds or raise train.epochs"
        )
    return tuple(steps)


def set_apart(
    config: TrainConfig, samples: Sequence[Sample]
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Return the samples to train on, and those that importance is measured on.

    The latter are drawn by the seed; whatever else has their tokens is not trained on either.
    Raises: DataError: half of the samples or more would be set apart.
    """
    settings = config.allocation
    if not settings.enabled:
        return tuple(samples), ()
    distinct = list(dict.fromkeys(samples))
    if 2 * settings.score_samples > len(distinct):
        raise DataError(
            f"{config.data.train}: {len(distinct)} different samples, at least "
            f"{2 * settings.score_samples} are expected, as allocation.score_samples = "
            f"{settings.score_samples} of them are set apart; give more, or lower that"
        )
    chooser = random.Random(config.train.seed)  # noqa: S311  (a choice, not a secret)
    chosen = chooser.sample(distinct, settings.score_samples)
    apart = {sample.token_ids for sample in chosen}
    return tuple(sample for sample in samples if sample.token_ids not in apart), tuple(chosen)


def extra_tokens(config: TrainConfig, score_samples: Sequence[Sample]) -> int:
    """Return how many tokens more a run without allocation trains on, to take as long as one with.

    Each round's score by gradients costs two passes over the samples that it is measured on.
    """
    settings = config.allocation
    if not settings.enabled or settings.score != "none":
        return 0
    return settings.rounds * _PASSES_OF_GRADIENT_SCORE * sum(map(len, score_samples))


def trained_config(
    config: AdapterConfig, layers: Mapping[str, LoraLinear], allocation: Allocation
) -> AdapterConfig:
    """Return `config` with patterns that give every module the rank and scaling it was trained at.

    Modules of rank 0 are left out; `target_modules` is whoever writes the folder's to set.
    Raises: TrainingError: no module has a rank.
    """
    ranks = {name: layer.rank for name, layer in layers.items() if layer.rank}
    if not ranks:
        raise TrainingError(
            "no module has a rank left, one at least is expected; raise allocation.min_rank or "
            "lower allocation.ranks_per_round"
        )
    alphas = {name: allocation.alpha(rank) for name, rank in ranks.items()}
    # What rounding makes of one number in two ways is one number.
    return exact_config(
        replace(config, target_modules=tuple(ranks)),
        ranks,
        {name: float(f"{alpha:.12g}") for name, alpha in alphas.items()},
    )


def record(
    scores: Scores, move: Move, optimizer: RankAdamW, *, number: int, step: int, seconds: float
) -> dict[str, Any]:
    """Return what is kept of a round, as JSON has it; ranks are those after it."""
    layers = optimizer.layers
    return {
        "round": number,
        "step": step,
        "score": scores.kind,
        "seconds": round(seconds, 3),
        "loss": scores.loss,
        "base_loss": scores.base_loss,
        "ranks": {name: layer.rank for name, layer in layers.items()},
        "num_parameters": sum(
            layer.lora_a.numel() + layer.lora_b.numel() for layer in layers.values()
        ),
        "mean_scores": {
            name: _rounded(_average(of_module))
            for name, of_module in scores.by_module.items()
            if len(of_module)
        },
        "pruned": {
            name: [[index, _rounded(float(scores.by_module[name][index]))] for index in indices]
            for name, indices in move.pruned.items()
        },
        "grown": dict(move.grown),
    }


def in_words(row: Mapping[str, Any]) -> str:
    """Return what a round did, in one line."""
    num_pruned, num_grown = sum(map(len, row["pruned"].values())), sum(row["grown"].values())
    return (
        f"step {row['step']}: round {row['round']}, {num_pruned} ranks pruned in "
        f"{len(row['pruned'])} modules, {num_grown} grown in {len(row['grown'])}, "
        f"{row['seconds']:.1f} s"
    )


def all_scores(scores: Scores) -> dict[str, list[float]]:
    """Return every rank's score by module, as JSON has it."""
    return {
        name: [_rounded(score) for score in of_module.tolist()]
        for name, of_module in scores.by_module.items()
    }


def history_of(
    rounds: Sequence[Mapping[str, Any]], initial_rank: int, *, kept_step: int
) -> dict[str, Any]:
    """Return a run's rounds as rora.json has them: what is by module as lists in one order.

    Args: kept_step: whose weights the adapter holds; later rounds are not in it.
    """
    modules = list(rounds[0]["ranks"])
    return {
        "modules": modules,
        "initial_rank": initial_rank,
        "rounds_in_adapter": sum(row["step"] <= kept_step for row in rounds),
        "rounds": [
            {
                **row,
                "ranks": [row["ranks"][name] for name in modules],
                "mean_scores": [row["mean_scores"].get(name) for name in modules],
            }
            for row in rounds
        ],
    }


def _rounded(score: float) -> float:
    return float(f"{score:.{_DIGITS}g}")
