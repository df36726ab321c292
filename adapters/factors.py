"""Arithmetic on deltas that are never formed: scaling * B @ A from its two factors.

A delta has out_features * in_features numbers, its factors rank times their sum. Everything here
works on matrices of the size of a rank. Computed in float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
_ROUNDING = 1e-13  # relative to the largest singular value: what float64 leaves of a zero


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a delta, left @ diag(values) @ right.

    Args:
        left: [out_features, rank], orthonormal columns.
        values: [rank], largest first.
        right: [rank, in_features], orthonormal rows.
    """

    left: Matrix
    values: Matrix
    right: Matrix

    def truncated(self, rank: int) -> tuple[Matrix, Matrix]:
        """Return the best A [rank, in_features] and B [out_features, rank] of this rank.

        B @ A is the delta without its smallest singular values; each factor takes their roots, so
        that both have numbers of the same size.
        """
        roots = np.sqrt(self.values[:rank])
        return roots[:, None] * self.right[:rank], self.left[:, :rank] * roots

    def least_rank(self, max_error: float) -> int:
        """Return the least rank whose relative error in the Frobenius norm is within `max_error`.

        The error of a rank is the root of the sum of the squares of the values beyond it.
        """
        beyond = np.sqrt(np.cumsum(self.values[::-1] ** 2))[::-1]
        return int(np.count_nonzero(beyond > max_error * beyond[:1]))


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight: scaling * lora_b @ lora_a, never formed.

    Args:
        lora_a: [rank, in_features], float32, float16 or bfloat16.
        lora_b: [out_features, rank], likewise.
        scaling: of the module.
    """

    lora_a: NDArray[Any]
    lora_b: NDArray[Any]
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the delta."""
        return (self.lora_b.shape[0], self.lora_a.shape[1])

    def norm(self) -> float:
        """Return the Frobenius norm, from |BA|² = sum of (BᵀB) ∘ (AAᵀ), both [rank, rank]."""
        return math.sqrt(max(self.dot(self), 0.0))

    def dot(self, other: "Delta") -> float:
        """Return the Frobenius inner product with a delta of the same shape and any rank.

        <BA, B'A'> = sum of (BᵀB') ∘ (AA'ᵀ), both [rank, rank'].
        """
        outer = _wide(self.lora_b).T @ _wide(other.lora_b)
        inner = _wide(self.lora_a) @ _wide(other.lora_a).T
        return self.scaling * other.scaling * float(np.sum(outer * inner))

    def distance(self, other: "Delta") -> float:
        """Return the Frobenius norm of the difference to a delta of the same shape and any rank.

        Exact to float64 relative to the two norms: no squares are subtracted, as in
        |X|² + |Y|² - 2<X, Y>.
        """
        left = np.hstack([self.scaling * _wide(self.lora_b), -other.scaling * _wide(other.lora_b)])
        right = np.vstack([_wide(self.lora_a), _wide(other.lora_a)]).T
        (_, left_r), (_, right_r) = np.linalg.qr(left), np.linalg.qr(right)
        return float(np.linalg.norm(left_r @ right_r.T))

    def spectrum(self) -> Spectrum:
        """Return the singular value decomposition.

        Cost: two QR decompositions and an SVD of [rank, rank].
        """
        left_basis, left = np.linalg.qr(_wide(self.lora_b))
        right_basis, right = np.linalg.qr(_wide(self.lora_a).T)
        u, values, vt = np.linalg.svd(self.scaling * (left @ right.T), full_matrices=False)
        values[values <= _ROUNDING * values[:1]] = 0.0
        return Spectrum(left_basis @ u, values, vt @ right_basis.T)


def _wide(factor: NDArray[Any]) -> Matrix:
    return factor.astype(np.float64)
