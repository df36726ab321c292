"""The folder of a run: who may use it, and the settings that it keeps."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from adapters import resolve_scalings
from adapters.errors import ConfigError
from adapters.writer import make_folder, replace_file
from trainer.config import TrainConfig
from trainer.export import adapter_config
from trainer.log import LOG_FILE
from trainer.optim import default_learning_rate

CONFIG_FILE = "config.json"
_LOCK_FILE = ".lock"


@contextmanager
def owned(run_folder: Path) -> Iterator[None]:
    """Keep other processes from training into a folder while the block runs.

    The folder is made if need be, and removed again if nothing was put into it.
    Raises: ConfigError: another process has it, or it can not be made.
    """
    existed = run_folder.exists()
    lock = FileLock(run_folder / _LOCK_FILE, timeout=0)
    try:
        make_folder(run_folder)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"output: {run_folder} is being trained into by another process; wait for it, or "
            "choose another"
        ) from None
    except OSError as error:
        raise ConfigError(f"output: {run_folder} can not be made ({error.strerror})") from error
    try:
        yield
    finally:
        (run_folder / _LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if not existed:
            with suppress(OSError):
                run_folder.rmdir()


def check_output(output: Path) -> None:
    """Refuse an output folder that can not be used, before any time is spent.

    Raises: ConfigError: it holds something already, or something above it is no folder.
    """
    if (output / CONFIG_FILE).exists() and (output / LOG_FILE).exists():
        raise ConfigError(
            f"output: {output} holds a run already, a new or empty folder is expected; go on with "
            f"it by `rora-train resume {output}`, or choose another"
        )
    if output.is_dir() and any(path.name != _LOCK_FILE for path in output.iterdir()):
        raise ConfigError(
            f"output: {output} holds something already, a new or empty folder is expected; "
            "choose another or remove it"
        )
    standing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise ConfigError(
            f"output: {output} can not be made, {standing} is no folder that can be written; "
            "choose another"
        )


def read_run_config(run_folder: Path) -> TrainConfig:
    """Return the settings of a run that was begun.

    Raises: ConfigError: the folder is no run's.
    """
    path = run_folder / CONFIG_FILE
    try:
        return TrainConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{run_folder}: no {CONFIG_FILE} in it, the output folder of a run is expected"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{run_folder}: the output folder of a run is expected ({error.strerror})"
        ) from error
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"])
        raise ConfigError(f"{path}: not the settings of a run any more ({reason})") from error


def write_run_config(config: TrainConfig) -> None:
    """Keep a run's settings in its folder, in a form that can be read from anywhere."""
    text = _from_anywhere(config).model_dump_json(indent=2) + "\n"
    replace_file(config.output / CONFIG_FILE, text.encode())


def with_learning_rate(config: TrainConfig) -> TrainConfig:
    """Return the settings with a number for `auto`."""
    if config.train.learning_rate != "auto":
        return config
    every = "any module"
    of_each = resolve_scalings(adapter_config(config, "", [every]), [every])[every]
    settings = {"learning_rate": default_learning_rate(of_each.rank, of_each.scaling)}
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def _from_anywhere(config: TrainConfig) -> TrainConfig:
    """Return the settings with absolute paths, so that a run can be resumed from any folder."""

    def absolute(source: str | None) -> str | None:
        is_local = source is not None and Path(source).exists()
        return str(Path(source or "").absolute()) if is_local else source

    data = config.data
    sets: Any = data.eval
    sets = (
        {name: absolute(source) for name, source in sets.items()}
        if isinstance(sets, dict)
        else absolute(sets)
    )
    return config.model_copy(
        update={
            "data": data.model_copy(update={"train": absolute(data.train), "eval": sets}),
            "model": absolute(config.model),
            "output": config.output.absolute(),
        }
    )
