"""log.jsonl of a run: a JSON object for each step, evaluation, round of allocation, failure."""

import json
from pathlib import Path
from typing import Any

from adapters.writer import replace_file
from trainer.tracking import Tracker

LOG_FILE = "log.jsonl"


class LogWriter:
    """Appends to a run's log, and passes its numbers on.

    Args:
        trackers: where steps and evaluations go too.
        after_step: rows behind this step are dropped first: a run that goes on from a checkpoint
            takes those steps again.
        is_pending: and so are those of what follows this step.
    """

    def __init__(
        self, run_folder: Path, trackers: Tracker, *, after_step: int, is_pending: bool = False
    ) -> None:
        path = run_folder / LOG_FILE

        def stays(row: dict[str, Any]) -> bool:
            step = row.get("step", after_step + 1)
            is_done = step < after_step or not is_pending or "loss" in row
            return bool(step <= after_step and is_done)

        kept = [row for row in read_log(run_folder) if stays(row)]
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._trackers = trackers

    def samples(self, count: int) -> None:
        """Append how many samples the run trains on."""
        self._append({"num_samples": count})

    def step(self, step: int, **values: float) -> None:
        """Append what a step did."""
        self._append({"step": step, **values})
        self._trackers.log(step, {f"train/{name}": value for name, value in values.items()})

    def round(self, step: int, row: dict[str, Any]) -> None:
        """Append how ranks moved after a step."""
        self._append({"step": step, "allocation": row})
        scoring = {"seconds": row["seconds"], "num_parameters": row["num_parameters"]}
        self._trackers.log(step, {f"allocation/{name}": value for name, value in scoring.items()})

    def evaluation_in_training(self, step: int, losses: dict[str, float], *, best: bool) -> None:
        """Append the loss on each held-out set after a step, and whether it is the best so far."""
        self._append({"step": step, "eval_loss": losses, "best": best})
        self._trackers.log(step, {f"eval/loss/{name}": loss for name, loss in losses.items()})

    def evaluation(self, sets: dict[str, Any]) -> None:
        """Append the last evaluation: by set, of the adapter and of the base model."""
        self._append({"evaluation": sets})

    def failed(self, reason: str) -> None:
        """Append why the run ended without an adapter."""
        self._append({"failed": reason})

    def finished(self) -> None:
        """Append that the adapter is proved and measured; nothing follows."""
        self._append({"finished": True})

    def close(self) -> None:
        """Close the file and what follows it."""
        self._file.close()
        self._trackers.close()

    def _append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read_log(run_folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log; a last line that a crash cut is left out."""
    try:
        text = (run_folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
