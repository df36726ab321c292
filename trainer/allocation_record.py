"""What is kept of allocation: in checkpoints and log.jsonl by round, in rora.json as a history."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.allocation import Move
from trainer.importance import Scores
from trainer.optim import RankAdamW

_DIGITS = 4  # of scores that are kept
_BY_MODULE = ("ranks", "mean_scores", "pruned", "grown")
_MAX_VALUES = 200_000  # of a history; a whole rora.json may have 500,000


def record(
    scores: Scores,
    move: Move,
    optimizer: RankAdamW,
    *,
    number: int,
    step: int,
    num_undone: int,
    seconds: float,
) -> dict[str, Any]:
    """Return what is kept of a round, as JSON has it; ranks are those after it."""
    layers = optimizer.layers
    return {
        "round": number,
        "step": step,
        "score": scores.kind,
        "undone": num_undone,
        "seconds": round(seconds, 3),
        "loss": scores.loss,
        "base_loss": scores.base_loss,
        "ranks": {name: layer.rank for name, layer in layers.items()},
        "num_parameters": sum(
            layer.lora_a.numel() + layer.lora_b.numel() for layer in layers.values()
        ),
        "mean_scores": {
            name: _rounded(float(of_module.mean()))
            for name, of_module in scores.by_module.items()
            if len(of_module) and scores.kind != "random"
        },
        "pruned": {name: len(indices) for name, indices in move.pruned.items()},
        "grown": dict(move.grown),
    }


def in_words(row: Mapping[str, Any]) -> str:
    """Return what a round did, in one line."""
    undone = f"{row['undone']} of the pruned were new, " if row["undone"] else ""
    num_pruned, num_grown = sum(row["pruned"].values()), sum(row["grown"].values())
    return (
        f"step {row['step']}: round {row['round']}, {num_pruned} ranks pruned in "
        f"{len(row['pruned'])} modules, {num_grown} grown in {len(row['grown'])}, "
        f"{undone}{row['seconds']:.1f} s"
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
    Returns: the last rounds, if all of them would be more than such a file may hold.
    """
    modules = list(rounds[0]["ranks"])
    num_kept = max(1, _MAX_VALUES // (len(_BY_MODULE) * len(modules)))
    return {
        "modules": modules,
        "initial_rank": initial_rank,
        "num_rounds": len(rounds),
        "rounds_in_adapter": sum(row["step"] <= kept_step for row in rounds),
        "rounds": [
            {**row, **{key: [row[key].get(name) for name in modules] for key in _BY_MODULE}}
            for row in rounds[-num_kept:]
        ],
    }


def _rounded(score: float) -> float:
    return float(f"{score:.{_DIGITS}g}")
