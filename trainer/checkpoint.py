"""Checkpoints: all that a run needs to go on exactly where it stopped, in one safetensors file.

The order of the data and the random numbers of a step follow from the seed and the step alone, so
neither is stored.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters.errors import TrainingError
from adapters.writer import make_folder, sync_folder
from trainer.lora_linear import Factors
from trainer.optim import RankAdamW

CHECKPOINT_FOLDER = "checkpoints"
_STATE_KEY = "rora_train"
_DIGEST_KEY = "sha256"


@dataclass
class TrainingState:
    """What changes while a run goes on, weights and moments aside.

    Args:
        origin: digests of all that decides what the run computes, by name.
        step: steps taken.
        smoothed_loss: running mean of the steps' losses.
        num_tokens: trained on; seconds: spent in steps.
        best_loss, best_step: of the best evaluation so far; num_worse: evaluations since.
        best_factors: of that step, by module path.
        rounds: of allocation so far, as allocation.record has them.
        scoring_seconds: spent in them, beside `seconds`.
        is_pending: what follows the last step, from a round on, is not done yet.
    """

    origin: dict[str, str]
    step: int = 0
    smoothed_loss: float | None = None
    num_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    num_worse: int = 0
    best_factors: dict[str, Factors] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    scoring_seconds: float = 0.0
    is_pending: bool = False


def save_checkpoint(run_folder: Path, state: TrainingState, optimizer: RankAdamW) -> Path:
    """Write a run's state; once it is on disk, older checkpoints are removed.

    Returns: `run_folder`/checkpoints/step-<8 digits>.safetensors.
    Raises: TrainingError: it can not be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in optimizer.layers.items():
        tensors |= _as_tensors(name, layer.factors)
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[name].items()}
    for name, factors in state.best_factors.items():
        tensors |= _as_tensors(f"best.{name}", factors)
    values = {key: value for key, value in vars(state).items() if key != "best_factors"}
    state_text = json.dumps(values)
    content = _content_digest(tensors, state_text)
    folder = run_folder / CHECKPOINT_FOLDER
    path = folder / f"step-{state.step:08d}.safetensors"
    partial = path.with_suffix(".partial")
    try:
        make_folder(folder)
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
            partial,
            metadata={_STATE_KEY: state_text, _DIGEST_KEY: content},
        )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(folder)
        for other in folder.glob("step-*.safetensors"):
            if other != path:
                other.unlink()
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        before = newest_checkpoint(run_folder)
        whole = f"{before.name} is whole" if before is not None else "there is none before it"
        raise TrainingError(
            f"{path}: the checkpoint can not be written ({error}); {whole}: make room and resume"
        ) from error
    return path


def load_checkpoint(
    run_folder: Path, optimizer: RankAdamW, *, origin: Mapping[str, str]
) -> TrainingState | None:
    """Put the newest checkpoint's weights and moments in place and return its state.

    Returns: None if the run has not come to a checkpoint yet.
    Raises: TrainingError: what decides the outcome is not what the run began with, or the file can
        not be read.
    """
    path = newest_checkpoint(run_folder)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _content_digest(tensors, metadata[_STATE_KEY]) != metadata[_DIGEST_KEY]:
                raise ValueError("its bytes changed since it was written")
            state = TrainingState(**json.loads(metadata[_STATE_KEY]))
            changed = [name for name in origin if state.origin.get(name) != origin[name]]
            if changed:
                raise TrainingError(
                    f"{run_folder}: {' and '.join(changed)} changed since the run began, the same "
                    "are expected; put them back, or start a new run"
                )
            for name, layer in optimizer.layers.items():
                layer.set_factors(_factors(name, tensors))
                optimizer.state[name] = {
                    key: tensors[f"{name}.{key}"].to(before.device)
                    for key, before in optimizer.state[name].items()
                }
                if state.best_step is not None:
                    state.best_factors[name] = _factors(f"best.{name}", tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(
            f"{path}: no checkpoint of this run ({error}); remove it to resume from the beginning"
        ) from error
    return state


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the file of a run's last checkpoint, if there is one."""
    paths = (run_folder / CHECKPOINT_FOLDER).glob("step-*.safetensors")
    return max(paths, default=None)


def digest_of(weights: Iterable[Tensor]) -> str:
    """Return the hexadecimal sha256 of numbers, in their order."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _as_tensors(name: str, factors: Factors) -> dict[str, Tensor]:
    """Return factors as a checkpoint has them: ranks move, and the scaling with them."""
    return {
        f"{name}.lora_a": factors.lora_a,
        f"{name}.lora_b": factors.lora_b,
        f"{name}.scaling": torch.tensor(factors.scaling, dtype=torch.float64),
    }


def _factors(name: str, tensors: Mapping[str, Tensor]) -> Factors:
    lora_a, lora_b, scaling = (tensors[f"{name}.{key}"] for key in ("lora_a", "lora_b", "scaling"))
    return Factors(lora_a, lora_b, float(scaling))


def _content_digest(tensors: Mapping[str, Tensor], state_text: str) -> str:
    """Return the hexadecimal sha256 of all that a checkpoint holds."""
    names = sorted(tensors)
    outline = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    content = [digest_of(tensors[name] for name in names), outline, state_text]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
