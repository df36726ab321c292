"""ALoRA: ranks move between modules while the adapter trains, under a fixed budget.

Owns who loses and who gets ranks, given their scores, and when that happens. The scores are
importance.py's, the record of it is allocation_record.py's. "ALoRA" is Allocating LoRA here, not
PEFT's Activated LoRA.
"""

import bisect
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

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
    spared: Mapping[str, Tensor] | None = None,
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
        spared: [rank], bool, by module: ranks that stay; none: every rank may go.
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
            if spared is None or not spared[name][index]:
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
            return f"no rank moves, a control; {apart}"
        return (
            f"{self.num_moved} of {self.budget} ranks move in each of "
            f"{settings.rounds} rounds, after steps {self.rounds_after[0]} to "
            f"{self.rounds_after[-1]}; {settings.score} scores on {apart}"
        )

    def is_due(self, step: int, num_done: int) -> bool:
        """Tell whether a round follows this step, after `num_done` rounds."""
        return num_done < len(self.rounds_after) and step == self.rounds_after[num_done]

    def measure(self, measure: Measure, spared: Mapping[str, Tensor], number: int) -> Scores:
        """Return every rank's score in round `number`, from 1."""
        settings = self.config.allocation
        if settings.score == "random":
            return random_scores(measure, seed=self.config.train.seed * 1_009 + number)
        if settings.score == "exact":
            return exact_scores(measure)
        if settings.score == "screened":
            may_go = {
                name: ~of_module & (len(of_module) > settings.min_rank)
                for name, of_module in spared.items()
            }
            return screened_scores(measure, self.num_moved, may_go)
        return gradient_scores(measure)

    def spared(self, optimizer: RankAdamW, number: int) -> dict[str, Tensor]:
        """Return which ranks, [rank], bool, by module, are too new to be pruned in a round."""
        return self._new_ranks(optimizer, number, self.config.allocation.grace_rounds)

    def _new_ranks(self, optimizer: RankAdamW, number: int, num_rounds: int) -> dict[str, Tensor]:
        """Return which ranks, [rank], bool, by module, came in so many rounds before `number`."""
        first = max(1, number - num_rounds)
        age = self.rounds_after[number - 1] - self.rounds_after[first - 1]
        return {
            name: ((state["num_steps"] <= age) & (age > 0)).cpu()
            for name, state in optimizer.state.items()
        }

    def choose(self, scores: Scores, spared: Mapping[str, Tensor], optimizer: RankAdamW) -> Move:
        """Return a round's move."""
        num_ranks = sum(layer.rank for layer in optimizer.layers.values())
        return choose_move(
            scores.by_module,
            num_moved=min(self.num_moved, num_ranks - 1),  # an adapter has one rank at least
            max_ranks={
                name: min(layer.in_features, layer.out_features)
                for name, layer in optimizer.layers.items()
            },
            min_rank=self.config.allocation.min_rank,
            spared=spared,
        )

    def count_undone(self, move: Move, optimizer: RankAdamW, number: int) -> int:
        """Return how many of the ranks that go came in the round before."""
        is_new = self._new_ranks(optimizer, number, 1)
        return sum(int(is_new[name][list(gone)].sum()) for name, gone in move.pruned.items())

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
        assert any(after.values()), "no rank is left"

    def scaling(self, rank: int) -> float:
        """Return a module's scaling at a rank; 0 at rank 0."""
        adapter = self.config.adapter
        if self.config.allocation.scale_rank == "initial":
            rank = adapter.rank if rank else 0
        if rank == 0:
            return 0.0
        return scaling_factor(adapter.alpha, rank, use_rslora=adapter.method == "rora")


def plan_rounds(config: TrainConfig, epochs: Sequence[float]) -> tuple[int, ...]:
    """Return the steps after which the rounds of a run are due; none without allocation.

    Args: epochs: passes over the data after each step of the run, increasing.
    Raises: ConfigError: no step would lie between two rounds, or behind the last.
    """
    settings = config.allocation
    if not settings.enabled or settings.score == "off":
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
    Raises: DataError: more than half of the samples would be set apart.
    """
    settings = config.allocation
    if not settings.enabled:
        return tuple(samples), ()
    distinct = list({sample.token_ids: sample for sample in samples}.values())
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


def check_num_moved(config: TrainConfig, num_modules: int) -> None:
    """Refuse to move ranks that can not be moved.

    Raises: ConfigError: there is one module only, or all ranks that may go would go at once.
    """
    settings = config.allocation
    if not settings.enabled:
        return
    if num_modules < 2:
        raise ConfigError(
            "allocation: one module is adapted, two at least are expected for ranks to move "
            "between; add some to adapter.target_modules"
        )
    movable = num_modules * (config.adapter.rank - settings.min_rank)
    num_moved = Allocation(config, num_modules, (), ()).num_moved
    if num_moved >= movable:
        raise ConfigError(
            f"allocation.ranks_per_round: {settings.ranks_per_round} moves {num_moved} ranks, "
            f"fewer than the {movable} that may go from {num_modules} modules are expected; "
            "lower it"
        )


def extra_tokens(config: TrainConfig, score_samples: Sequence[Sample]) -> int:
    """Return how many tokens more a run without allocation trains on, to take as long as one with.

    Each round's score by gradients costs two passes over the samples that it is measured on.
    """
    settings = config.allocation
    if not settings.enabled or settings.score != "off":
        return 0
    return settings.rounds * _PASSES_OF_GRADIENT_SCORE * sum(map(len, score_samples))


def trained_config(config: AdapterConfig, layers: Mapping[str, LoraLinear]) -> AdapterConfig:
    """Return `config` with patterns that give every module the rank and scaling it was trained at.

    Modules of rank 0 are left out; `target_modules` is whoever writes the folder's to set.
    """
    ranks = {name: layer.rank for name, layer in layers.items() if layer.rank}
    alphas = {
        name: layers[name].scaling / scaling_factor(1.0, rank, use_rslora=config.use_rslora)
        for name, rank in ranks.items()
    }
    # What rounding makes of one number in two ways is one number.
    return exact_config(
        replace(config, target_modules=tuple(ranks)),
        ranks,
        {name: float(f"{alpha:.12g}") for name, alpha in alphas.items()},
    )
