"""Where metrics also go: TensorBoard's event files, and Weights & Biases.

The log of a run is log.jsonl; these are copies of its numbers for tools that people already watch.
Owns all that knows tensorboardX and wandb, which are imported when a setting asks for them.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from adapters.errors import ConfigError
from adapters.writer import replace_file
from trainer.config import TrackingSettings

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_run_id"
_FLUSH_SECONDS = 10  # what a killed run may lose of its curves; log.jsonl loses nothing


class Tracker(Protocol):
    """Something that takes metrics as they come."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take values of a step, by name; steps do not go back within one process."""

    def close(self) -> None:
        """Write out what is left; nothing can be logged afterwards."""


def open_trackers(settings: TrackingSettings, run_folder: Path, config_json: str) -> Tracker:
    """Return what passes metrics on to every place that the settings name, possibly none.

    Args:
        run_folder: of the run; after a resume the same, so that its curves go on.
        config_json: the resolved configuration, a JSON object, to stand beside the curves.
    Raises: ConfigError: a package is not installed, or Weights & Biases refuses to start a run.
    """
    trackers: list[Tracker] = []
    if settings.tensorboard:
        trackers.append(_TensorBoard(run_folder / TENSORBOARD_FOLDER, config_json))
    if settings.wandb_project is not None:
        trackers.append(_WeightsAndBiases(settings.wandb_project, run_folder, config_json))
    return _All(trackers)


class _All:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class _TensorBoard:
    """Event files; one for each process that trained the run.

    The first step that is logged tells where the run goes on: TensorBoard drops what earlier files
    have from there.
    """

    def __init__(self, folder: Path, config_json: str) -> None:
        try:
            from tensorboardX import SummaryWriter  # noqa: PLC0415  (an extra)
        except ImportError as error:
            raise _missing("tensorboard", "tensorboardX") from error
        self._writer_class = SummaryWriter
        self._writer: Any = None
        self._folder = folder
        self._config_json = config_json

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, first_step: int) -> Any:
        num_before = len(list(self._folder.glob("events.*")))
        writer = self._writer_class(
            str(self._folder),
            purge_step=first_step if num_before else None,
            flush_secs=_FLUSH_SECONDS,
            # Names hold the second only: without it a quick resume would overwrite the file.
            filename_suffix=f".{num_before}",
        )
        # Indented by four, Markdown's code.
        indented = json.dumps(json.loads(self._config_json), indent=2).replace("\n", "\n    ")
        writer.add_text("config", f"    {indented}", first_step)
        return writer


class _WeightsAndBiases:
    """A run at Weights & Biases, whose id is kept so that a resume goes on with it."""

    def __init__(self, project: str, run_folder: Path, config_json: str) -> None:
        try:
            import wandb  # noqa: PLC0415  (an extra)
        except ImportError as error:
            raise _missing("wandb_project", "wandb") from error
        id_file = run_folder / WANDB_ID_FILE
        if not id_file.exists():
            replace_file(id_file, f"{secrets.token_hex(8)}\n".encode())
        try:
            self._run = wandb.init(
                project=project,
                name=run_folder.name,
                dir=run_folder,
                config=json.loads(config_json),
                id=id_file.read_text().strip(),
                resume="allow",
            )
        except wandb.Error as error:
            said = " ".join(str(error).split())
            raise ConfigError(
                f"tracking.wandb_project: wandb says {said!r}, a run is expected; log in with "
                "`wandb login`, set WANDB_MODE=offline, or leave the key out"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _missing(key: str, package: str) -> ConfigError:
    return ConfigError(
        f"tracking.{key}: the package {package} is not installed; "
        "pip install 'rora-serve[tracking]', or leave the key out"
    )
