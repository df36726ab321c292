"""How two adapters differ: rank, norm and direction of each delta, from the factors alone."""

import math
from dataclasses import dataclass

from adapters.artifact import AdapterArtifact
from adapters.factors import Delta
from adapters.validation import checked_tensors


@dataclass(frozen=True)
class ModuleDifference:
    """One module of either adapter; a side that lacks it has rank 0 and norm 0.

    Args:
        name: module path.
        ranks: of the first and the second.
        norms: Frobenius norms of scaling * B @ A.
        cosine: of the angle between the two deltas; None if one is zero or has another shape.
        distance: Frobenius norm of their difference; None if their shapes differ.
    """

    name: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float | None
    distance: float | None


@dataclass(frozen=True)
class Difference:
    """How two adapters differ, module by module and as a whole.

    Args:
        modules: of both, in the order of the first.
        cosine: between all deltas of one and all of the other; None if one is zero.
        relative_distance: norm of the difference over the norm of the first; None if that is zero,
            or a module's shapes differ.
    """

    modules: tuple[ModuleDifference, ...]
    cosine: float | None
    relative_distance: float | None


def diff(first: AdapterArtifact, second: AdapterArtifact) -> Difference:
    """Return how `second` differs from `first`.

    Cost: reads both once; matrices of the size of the ranks.
    """
    theirs = {m.name: (m.rank, Delta(a, b, m.scaling)) for m, a, b in checked_tensors(second)}
    differences, dots = [], []
    for module, lora_a, lora_b in checked_tensors(first):
        delta = Delta(lora_a, lora_b, module.scaling)
        norm = delta.norm()
        rank, other = theirs.pop(module.name, (0, None))
        ranks = (module.rank, rank)
        if other is None:
            found = ModuleDifference(module.name, ranks, (norm, 0.0), None, norm)
        elif other.shape != delta.shape:
            found = ModuleDifference(module.name, ranks, (norm, other.norm()), None, None)
        else:
            dots.append(delta.dot(other))
            norms = (norm, other.norm())
            cosine = _cosine(dots[-1], *norms)
            found = ModuleDifference(module.name, ranks, norms, cosine, delta.distance(other))
        differences.append(found)
    for name, (rank, other) in theirs.items():
        norm = other.norm()
        differences.append(ModuleDifference(name, (0, rank), (0.0, norm), None, norm))
    order = {name: place for place, name in enumerate([*first.modules, *second.modules])}
    differences.sort(key=lambda module: order[module.name])
    totals = [math.hypot(*(module.norms[side] for module in differences)) for side in (0, 1)]
    distances = [module.distance for module in differences]
    comparable = [distance for distance in distances if distance is not None]
    is_comparable = len(comparable) == len(distances) and totals[0] > 0
    return Difference(
        modules=tuple(differences),
        cosine=_cosine(math.fsum(dots), *totals),
        relative_distance=math.hypot(*comparable) / totals[0] if is_comparable else None,
    )


def _cosine(dot: float, norm: float, other_norm: float) -> float | None:
    """Return the cosine, which rounding may put a little outside [-1, 1]."""
    if norm == 0 or other_norm == 0:
        return None
    return max(-1.0, min(1.0, dot / norm / other_norm))
