"""Every rule that an adapter must keep before it is stored: all broken ones at once.

Rules on files, names and shapes are adapters/artifact.py's; those on numbers, and what only a
whole check can say, are here.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters.artifact import AdapterArtifact, LoraModule, read_folder
from adapters.errors import ArtifactError
from adapters.folder import MAX_FILE_BYTES
from adapters.limits import MAX_DELTA_BOUND, MAX_LORA_RANK, MIB
from adapters.patterns import idle_targets
from adapters.probe import read_probe
from adapters.problems import Code, Problem, refusal, shown
from adapters.tensors import NUMPY_DTYPES, Array, TensorFile, open_tensors

_MAX_NOTED_FILES = 10
_ROUNDING = 1e-7  # of float32, relative
_MAX_LOOKED_AT_BYTES = 32 * MIB  # of a module that is read whole
_NUM_PROBES = 4
_CHUNK_NUMBERS = 256 * 1024


@dataclass(frozen=True)
class Validation:
    """What a check found.

    Args:
        artifact: the adapter, if there is enough of one to look at.
        problems: broken rules; none if it may be stored.
        notes: what is no mistake and yet worth knowing.
    """

    artifact: AdapterArtifact | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def validate(folder: Path) -> Validation:
    """Check an adapter folder against every rule of docs/format.md.

    Cost: reads every tensor once, 1 MiB at a time.
    """
    artifact, problems = read_folder(folder)
    if any(problem.code is Code.FOLDER_MISSING for problem in problems):
        return Validation(None, tuple(problems), ())
    notes = _other_files(folder)
    try:
        read_probe(folder)
    except ArtifactError as error:
        problems += [found for found in error.problems if found not in problems]
    if artifact is not None:
        problems += _rank_problems(artifact)
        try:
            found, dead = _value_problems(artifact)
            problems += found
            notes += _notes(artifact, dead)
        except ArtifactError as error:  # the file changed under us
            problems += error.problems
    return Validation(artifact, tuple(problems), tuple(notes))


def checked_tensors(artifact: AdapterArtifact) -> Iterator[tuple[LoraModule, Array, Array]]:
    """Yield as `artifact.read_tensors`, and refuse numbers that can not be the outcome of training.

    Raises: ArtifactError: as there; NaN or infinity; or scaling * |A| * |B| (Frobenius norms),
        which bounds the delta, above 1e6.
    """
    for module, lora_a, lora_b in artifact.read_tensors():
        norms = [_norm(_pieces(factor)) for factor in (lora_a, lora_b)]
        problems = _norm_problems(module, *norms)
        if problems:
            raise refusal(ArtifactError, artifact.folder, problems)
        yield module, lora_a, lora_b


def _value_problems(artifact: AdapterArtifact) -> tuple[list[Problem], list[str]]:
    """Return what is wrong with the numbers, and the modules whose delta is zero."""
    norms: dict[str, dict[str, float]] = {}
    for module, tensor, chunks in artifact.read_chunks():
        dtype = NUMPY_DTYPES[tensor.dtype]
        pieces = (np.frombuffer(chunk, dtype) for chunk in chunks)
        norms.setdefault(module.name, {})[tensor.name] = _norm(pieces)
    problems: list[Problem] = []
    dead = []
    with open_tensors(artifact.weights_path) as file:
        for name, module in artifact.modules.items():
            norm_a, norm_b = (norms[name][t.name] for t in (module.lora_a, module.lora_b))
            found = _norm_problems(module, norm_a, norm_b)
            problems += found
            if not found and _is_zero(file, module, module.scaling * norm_a * norm_b):
                dead.append(name)
    if dead and len(dead) == len(artifact.modules):
        message = (
            "every delta is zero, so that it would answer as the base model; train it before you "
            "store it"
        )
        problems.append(Problem(Code.DELTA_ZERO, artifact.weights_path.name, message))
    return problems, dead


def _is_zero(file: TensorFile, module: LoraModule, bound: float) -> bool:
    """Tell whether a delta is nothing but what rounding leaves of one.

    Args:
        file: of its tensors.
        module: whose delta.
        bound: scaling * |A| * |B|, which training leaves within a factor of rank of |delta|.
    """
    if bound == 0:
        return True
    if module.num_bytes > _MAX_LOOKED_AT_BYTES or module.rank > MAX_LORA_RANK:
        return False
    lora_a, lora_b = file.read(module.lora_a), file.read(module.lora_b)
    # |delta @ x| is |delta| times a normal number, for x of normal numbers.
    probes = np.random.default_rng(0).standard_normal((module.in_features, _NUM_PROBES))
    found = module.scaling * _product(lora_b, _product(lora_a, probes))
    return float(np.linalg.norm(found)) <= _ROUNDING * bound


def _product(factor: Array, probes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return factor @ probes in float64, a few rows of the factor at a time."""
    rows = max(_CHUNK_NUMBERS // factor.shape[1], 1)
    parts = [
        factor[start : start + rows].astype(np.float64) @ probes
        for start in range(0, factor.shape[0], rows)
    ]
    return np.concatenate(parts)


def _norm_problems(module: LoraModule, norm_a: float, norm_b: float) -> list[Problem]:
    problems = []
    for side, norm in (("A", norm_a), ("B", norm_b)):
        if not math.isfinite(norm):
            message = (
                f"lora_{side} holds NaN or infinity, finite numbers are expected; train again with "
                "a lower learning rate"
            )
            problems.append(Problem(Code.VALUES_NOT_FINITE, module.name, message))
    bound = module.scaling * norm_a * norm_b
    if not problems and not bound <= MAX_DELTA_BOUND:
        message = (
            f"scaling * |A| * |B| is {bound:.3g}, at most {MAX_DELTA_BOUND:g} is expected; check "
            "lora_alpha and train again"
        )
        problems.append(Problem(Code.VALUES_TOO_LARGE, module.name, message))
    return problems


def _norm(pieces: Iterable[Array]) -> float:
    """Return the Frobenius norm, NaN or infinity if a number is; squares can not overflow."""
    total = 0.0
    for piece in pieces:
        numbers = piece.astype(np.float32, copy=False)
        with np.errstate(over="ignore"):
            squares = float(np.dot(numbers, numbers))
        if not 0 < squares < math.inf and piece.any():  # out of float32's range, or not finite
            wide = piece.astype(np.float64)
            squares = float(np.dot(wide, wide))
        total += squares
    return math.sqrt(total) if total >= 0 else math.nan


def _pieces(factor: Array) -> Iterator[Array]:
    flat = factor.reshape(-1)
    for start in range(0, flat.size, _CHUNK_NUMBERS):
        yield flat[start : start + _CHUNK_NUMBERS]


def _rank_problems(artifact: AdapterArtifact) -> list[Problem]:
    message = f"rank {{}}, at most {MAX_LORA_RANK} is served; compact the adapter"
    return [
        Problem(Code.RANK_TOO_LARGE, module.name, message.format(module.rank))
        for module in artifact.modules.values()
        if module.rank > MAX_LORA_RANK
    ]


def _notes(artifact: AdapterArtifact, dead: list[str]) -> list[str]:
    notes = []
    if dead:
        notes.append(
            f"{len(dead)} of {len(artifact.modules)} modules have a delta of zero, as {dead[0]}"
        )
    targets = artifact.config.target_modules
    if not isinstance(targets, str):
        idle = idle_targets(targets, list(artifact.modules))
        if idle:
            listed = ", ".join(map(shown, idle[:5]))
            notes.append(f"target_modules names nothing that the file holds: {listed}")
    return notes


def _other_files(folder: Path) -> list[str]:
    """Note files of a checkpoint that are none of ours; their names alone are looked at."""
    try:
        with os.scandir(folder) as entries:
            listed = islice((entry.name for entry in entries), 10_000)
            others = sorted(name for name in listed if name not in MAX_FILE_BYTES)
    except OSError:
        return []
    if not others:
        return []
    more = f" and {len(others) - _MAX_NOTED_FILES} more" if len(others) > _MAX_NOTED_FILES else ""
    listed_names = ", ".join(map(shown, others[:_MAX_NOTED_FILES]))
    return [f"never opened and not stored: {listed_names}{more}"]
