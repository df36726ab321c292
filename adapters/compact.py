"""Compaction: the same deltas from fewer ranks, within a stated error.

An adapter's delta often has a lower rank than its factors: training leaves directions unused, or
the rank was a guess. The singular values of each delta say which ranks carry it.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.artifact import AdapterArtifact, LoraModule
from adapters.config import AdapterConfig
from adapters.digest import read_chat_template, read_provenance, weights_digest
from adapters.errors import ArtifactError, ConfigError
from adapters.factors import Delta, Spectrum
from adapters.scaling import exact_config
from adapters.validation import checked_tensors
from adapters.writer import FactorPair, write_artifact

# Factors, and the Frobenius norm of what the delta lost.
_Choice = Callable[[str, Delta, Spectrum], tuple[FactorPair, float]]


@dataclass(frozen=True)
class CompactedModule:
    """What became of one module.

    Args:
        name: module path.
        rank, new_rank: before and after; 0 if the module is left out.
        norm: Frobenius norm of its delta.
        error: Frobenius norm of what its delta lost, rounding to its dtype included.
    """

    name: str
    rank: int
    new_rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class Compaction:
    """What became of an adapter."""

    modules: tuple[CompactedModule, ...]
    num_bytes: int
    new_num_bytes: int

    @property
    def error(self) -> float:
        """What all deltas together lost, relative to their norm."""
        norm = math.hypot(*(module.norm for module in self.modules))
        return math.hypot(*(module.error for module in self.modules)) / norm

    @property
    def largest_error(self) -> float:
        """The largest relative error of a module that was kept or left out."""
        return max((m.error / m.norm for m in self.modules if m.norm > 0), default=0.0)


def compact_to_error(artifact: AdapterArtifact, output: Path, *, max_error: float) -> Compaction:
    """Write the adapter with the least rank of each module that keeps its relative error.

    Every module's error is within `max_error`, and so is that of the whole. A module whose dtype
    can not hold fewer ranks that precisely is kept as it is.

    Args:
        artifact: what to compact.
        output: new folder.
        max_error: |delta - new delta| / |delta| in the Frobenius norm, 0 to below 1.
    Raises: ConfigError: `max_error` is outside that range. ArtifactError: `output` exists.
    Cost: reads the adapter once; two QR and one SVD of [rank, rank] for each module.
    """
    if not 0 <= max_error < 1:
        raise ConfigError(f"--max-error: found {max_error}, at least 0 and below 1 is expected")
    return _write(
        artifact, output, lambda _, delta, found: _within(delta, found, max_error=max_error)
    )


def compact_to_budget(artifact: AdapterArtifact, output: Path, *, rank_budget: int) -> Compaction:
    """Write the adapter with at most `rank_budget` ranks in all, where they carry most.

    The largest singular values of all deltas together are kept, which is the least total error for
    that many ranks. A module may be left out.

    Raises: ConfigError: a budget below 1. ArtifactError: `output` exists.
    Cost: reads the adapter twice; otherwise as `compact_to_error`.
    """
    if rank_budget < 1:
        raise ConfigError(f"--rank-budget: found {rank_budget}, at least 1 is expected")
    values = [
        (float(value), module.name)
        for module, lora_a, lora_b in checked_tensors(artifact)
        for value in Delta(lora_a, lora_b, module.scaling).spectrum().values
        if value > 0
    ]
    ranks = Counter(name for _, name in heapq.nlargest(rank_budget, values))
    return _write(
        artifact, output, lambda name, delta, found: _truncated(delta, found, rank=ranks[name])
    )


def _write(artifact: AdapterArtifact, output: Path, choose: _Choice) -> Compaction:
    """Write the factors that `choose` takes of each module, by its name, delta and spectrum."""
    factors: dict[str, FactorPair] = {}
    modules = []
    for module, lora_a, lora_b in checked_tensors(artifact):
        delta = Delta(lora_a, lora_b, module.scaling)
        found = delta.spectrum()
        made, error = choose(module.name, delta, found)
        new_rank = made[0].shape[0]
        if new_rank:
            factors[module.name] = made
        norm = math.hypot(*found.values)
        modules.append(CompactedModule(module.name, module.rank, new_rank, norm, error))
    if not factors:
        raise ArtifactError(
            f"{artifact.folder}: nothing is left of it; name a larger budget or a smaller error"
        )
    compaction = Compaction(
        modules=tuple(modules),
        num_bytes=artifact.num_bytes,
        new_num_bytes=sum(a.nbytes + b.nbytes for a, b in factors.values()),
    )
    _write_folder(artifact, output, factors, compaction)
    return compaction


def _write_folder(
    artifact: AdapterArtifact,
    output: Path,
    factors: Mapping[str, FactorPair],
    compaction: Compaction,
) -> None:
    new_ranks = {name: lora_a.shape[0] for name, (lora_a, _) in factors.items()}
    provenance = read_provenance(artifact.folder)
    # Log-probs of the adapter as it was prove nothing about this one.
    provenance.pop("probe", None)
    provenance["compaction"] = {
        "from_weights": weights_digest(artifact),
        "error": compaction.error,
        "largest_module_error": compaction.largest_error,
        "ranks_before": sum(module.rank for module in compaction.modules),
        "ranks": sum(new_ranks.values()),
    }
    write_artifact(
        output,
        same_scalings(artifact.config, artifact.modules, new_ranks),
        factors,
        provenance=provenance,
        embeddings={n for n in factors if artifact.modules[n].kind == "embedding"},
        chat_template=read_chat_template(artifact.folder),
    )


def same_scalings(
    config: AdapterConfig, modules: Mapping[str, LoraModule], ranks: Mapping[str, int]
) -> AdapterConfig:
    """Return the configuration that gives each module its new rank and the scaling that it had.

    The scaling is folded into alpha: alpha' = scaling * rank', or scaling * sqrt(rank').
    """
    alphas = {}
    for name, rank in ranks.items():
        module = modules[name]
        root = math.sqrt(rank) if config.use_rslora else rank
        alphas[name] = module.alpha if rank == module.rank else module.scaling * root
    if len(ranks) < len(modules):
        # PEFT makes fresh factors for a module that is targeted and not there.
        config = replace(config, target_modules=tuple(sorted(ranks)))
    return exact_config(config, ranks, alphas)


def _within(delta: Delta, found: Spectrum, *, max_error: float) -> tuple[FactorPair, float]:
    """Return the least factors within the error, or the delta's own if none are smaller."""
    norm = math.hypot(*found.values)
    allowed = max_error
    for _ in range(2):
        rank = found.least_rank(allowed)
        made, error = _truncated(delta, found, rank=rank)
        if error <= max_error * norm:
            return made, error
        # Rounding to 16 bits took its part; the rest is what truncation may take.
        cut = math.hypot(*found.values[rank:]) / norm
        rounding_squared = max((error / norm) ** 2 - cut**2, 0.0)
        if rounding_squared >= max_error**2:
            break
        allowed = math.sqrt(max_error**2 - rounding_squared)
    return (delta.lora_a, delta.lora_b), 0.0


def _truncated(delta: Delta, found: Spectrum, *, rank: int) -> tuple[FactorPair, float]:
    """Return factors of `rank` in the delta's dtypes and scaling, and the norm of what they lost.

    A module that keeps its rank keeps its numbers.
    """
    lora_a, lora_b = delta.lora_a, delta.lora_b
    if rank >= lora_a.shape[0]:
        return (lora_a, lora_b), 0.0
    new_a, new_b = found.truncated(rank)
    # The stored factors are not scaled: each gives up the root of the scaling.
    root = math.sqrt(delta.scaling)
    made = (new_a / root).astype(lora_a.dtype), (new_b / root).astype(lora_b.dtype)
    error = delta.distance(Delta(*made, delta.scaling))
    if not math.isfinite(error):
        raise ArtifactError(
            f"singular values do not fit {lora_a.dtype}; export the adapter in float32"
        )
    return made, error
