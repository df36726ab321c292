"""Norms, products and distances of deltas from their factors, against the deltas formed."""

import numpy as np
import pytest

from adapters.factors import Delta

SHAPES = [(3, 20, 12), (1, 20, 12), (12, 20, 12), (30, 20, 12)]


def delta(rank: int, out_features: int, in_features: int, seed: int) -> Delta:
    generator = np.random.default_rng(seed)
    lora_a = generator.normal(size=(rank, in_features)).astype(np.float32)
    lora_b = generator.normal(size=(out_features, rank)).astype(np.float32)
    return Delta(lora_a, lora_b, scaling=1.7)


def formed(one: Delta) -> np.ndarray:
    product: np.ndarray = one.scaling * one.lora_b.astype(np.float64) @ one.lora_a
    return product


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other_rank", [1, 5, 25])
def test_norms_products_and_distances_are_those_of_the_deltas(
    shape: tuple[int, int, int], other_rank: int
) -> None:
    one, other = delta(*shape, seed=1), delta(other_rank, *shape[1:], seed=2)
    assert one.norm() == pytest.approx(np.linalg.norm(formed(one)))
    assert one.dot(other) == pytest.approx(np.sum(formed(one) * formed(other)))
    assert one.distance(other) == pytest.approx(np.linalg.norm(formed(one) - formed(other)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_is_that_of_the_delta(shape: tuple[int, int, int]) -> None:
    one = delta(*shape, seed=3)
    found = one.spectrum()
    expected = np.linalg.svd(formed(one), compute_uv=False)
    np.testing.assert_allclose(found.values[: len(expected)], expected[: len(found.values)])
    lora_a, lora_b = found.truncated(len(found.values))
    np.testing.assert_allclose(lora_b @ lora_a, formed(one), atol=1e-12)


def test_a_small_distance_is_not_lost_in_large_norms() -> None:
    """The difference of squares would say 0, or 1e-7."""
    one = delta(8, 40, 30, seed=4)
    moved = Delta(one.lora_a.astype(np.float64), one.lora_b.astype(np.float64), 1.7 * (1 + 1e-12))
    assert one.distance(moved) == pytest.approx(1e-12 * one.norm(), rel=0.01)


def test_no_delta_has_no_rank() -> None:
    one = Delta(np.ones((4, 5), np.float32), np.zeros((6, 4), np.float32), 2.0)
    assert one.spectrum().least_rank(0.0) == 0
    assert one.norm() == 0
