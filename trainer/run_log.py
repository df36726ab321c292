"""RunLog: what log.jsonl says of a run, as courses over steps.

Reads what may be half written or of another version: a row or value that it does not know is passed
over, never an error. Draws nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

# Beyond it a number is as good as infinite, and drawing it overflows.
_MAX_DRAWN = 1e30
_MAX_STEP = 2**53  # the last integer that a float holds exactly
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Course:
    """One quantity over steps.

    Args:
        steps: [num_points], float64, increasing.
        values: [num_points], float64, finite.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def spans_decades(self) -> bool:
        """Whether the largest value is above a hundred times the least, zeros left out."""
        positive = self.values[self.values > 0]
        return len(positive) > 0 and bool(positive.max() > 100 * positive.min())

    def smoothed(self) -> "Course":
        """Return the exponential moving average, at most a twentieth of the run wide.

        m = (1 - k) m + k v from m = 0, divided by 1 - (1 - k)^n, so that the first is v itself.
        """
        keep = 1 - 2 / (1 + max(10.0, len(self) / 20))
        mean, weight, smooth = 0.0, 0.0, []
        for value in self.values.tolist():
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
            smooth.append(mean / weight)
        return Course(self.steps, np.array(smooth))

    def thinned(self, max_points: int) -> "Course":
        """Return at most `max_points`: the least and the largest of equal stretches, and the ends.

        Args:
            max_points: at least 4.
        """
        if len(self) <= max_points:
            return self
        kept = {0, len(self) - 1}
        for stretch in np.array_split(np.arange(len(self)), (max_points - 2) // 2):
            values = self.values[stretch]
            kept |= {int(stretch[values.argmin()]), int(stretch[values.argmax()])}
        order = sorted(kept)
        return Course(self.steps[order], self.values[order])


@dataclass(frozen=True)
class RunLog:
    """A run so far.

    Args:
        steps: rows of training steps, in order; of two with one number, the later.
        eval_losses: per evaluation set, its loss at steps.
        best_step: the step whose weights did best on the evaluation sets, if one was marked.
        results: per evaluation set, "adapter" and "base" after training, as written.
        failure: why the run stopped, unless it went on afterwards.
        num_samples: samples trained on, if a row says so.
        rounds: of allocation, in order; of two with one number, the later.
    """

    steps: Mapping[int, Row]
    eval_losses: Mapping[str, Course]
    best_step: int | None
    results: Mapping[str, Row]
    failure: str | None
    num_samples: int | None
    rounds: Sequence[Row]

    def course(self, key: str) -> Course:
        """Return the finite values that step rows have for `key`."""
        return _course({step: row.get(key) for step, row in self.steps.items()})

    @property
    def num_steps(self) -> int:
        """Steps that are in the log."""
        return len(self.steps)

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return int(self.course("num_tokens").values.sum())

    @property
    def seconds(self) -> float:
        """Time of all steps; a clock that starts anew, as after a resume, goes on."""
        total, last = 0.0, 0.0
        for seconds in self.course("seconds").values.tolist():
            total += seconds - last if seconds >= last else seconds
            last = seconds
        return total


def read_run_log(path: Path) -> RunLog:
    """Return what a log says; rows of other kinds and half-written lines are passed over.

    Raises: OSError: it can not be read.
    """
    steps: dict[int, Row] = {}
    eval_losses: dict[str, dict[int, Any]] = {}
    best_step, failure, num_samples = None, None, None
    rounds: dict[int, Row] = {}
    results: dict[str, Row] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for row in map(_row, lines):
            step = row.get("step")
            if _is_count(step) and step < _MAX_STEP:
                if isinstance(row.get("eval_loss"), dict):
                    for name, loss in row["eval_loss"].items():
                        eval_losses.setdefault(name, {})[step] = loss
                    best_step = step if row.get("best") is True else best_step
                elif "loss" in row:
                    steps[step], failure = row, None
                elif isinstance(row.get("allocation"), dict):
                    number = row["allocation"].get("round")
                    if _is_count(number) and number < _MAX_STEP:
                        rounds[number] = row["allocation"]
            if isinstance(row.get("evaluation"), dict):
                results |= {k: v for k, v in row["evaluation"].items() if isinstance(v, dict)}
            if "failed" in row:
                failure = str(row["failed"])
            if _is_count(row.get("num_samples")):
                num_samples = row["num_samples"]
    courses = {name: _course(losses) for name, losses in eval_losses.items()}
    return RunLog(
        steps=dict(sorted(steps.items())),
        eval_losses={name: course for name, course in courses.items() if len(course)},
        best_step=best_step,
        results=results,
        failure=failure,
        num_samples=num_samples,
        rounds=[row for _, row in sorted(rounds.items())],
    )


def finite(value: object) -> float | None:
    """Return a number from a file as a float, or None if it is none, not finite, or absurd."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Comparing first: an integer of a thousand digits can not become a float.
    if not -_MAX_DRAWN <= value <= _MAX_DRAWN or math.isnan(value):
        return None
    return float(value)


def _course(values: Mapping[int, object]) -> Course:
    found = {step: finite(value) for step, value in sorted(values.items())}
    kept = {step: value for step, value in found.items() if value is not None}
    return Course(np.array(list(kept), np.float64), np.array(list(kept.values()), np.float64))


def _row(line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
