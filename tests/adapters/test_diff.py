"""Differences of adapters, against the deltas formed."""

from pathlib import Path

import numpy as np
import pytest

from adapters import AdapterConfig, open_artifact, write_artifact
from adapters.diff import diff
from tests.workloads import formed_deltas as formed


def make(folder: Path, ranks: dict[str, int], *, seed: int, in_features: int = 12) -> Path:
    generator = np.random.default_rng(seed)
    factors = {
        name: (
            generator.normal(size=(rank, in_features)).astype("f4"),
            generator.normal(size=(10, rank)).astype("f4"),
        )
        for name, rank in ranks.items()
    }
    config = AdapterConfig(
        4, 8, use_rslora=bool(seed % 2), rank_pattern={n: r for n, r in ranks.items() if r != 4}
    )
    write_artifact(folder, config, factors, provenance={})
    return folder


def test_ranks_norms_cosines_and_distances_are_those_of_the_deltas(tmp_path: Path) -> None:
    paths = (
        make(tmp_path / "a", {"m.q": 4, "m.o": 2}, seed=1),
        make(tmp_path / "b", {"m.q": 7, "m.o": 4}, seed=2),
    )
    found = diff(*map(open_artifact, paths))
    first, second = map(formed, paths)
    for module in found.modules:
        one, other = first[module.name], second[module.name]
        norms = np.linalg.norm(one), np.linalg.norm(other)
        assert module.norms == pytest.approx(norms)
        assert module.cosine == pytest.approx(np.sum(one * other) / norms[0] / norms[1])
        assert module.distance == pytest.approx(np.linalg.norm(one - other))
    assert [module.ranks for module in found.modules if module.name == "m.q"] == [(4, 7)]
    together = [np.concatenate([side[name].ravel() for name in first]) for side in (first, second)]
    sizes = [float(np.linalg.norm(side)) for side in together]
    assert found.cosine == pytest.approx(together[0] @ together[1] / sizes[0] / sizes[1])
    assert found.relative_distance == pytest.approx(
        np.linalg.norm(together[0] - together[1]) / sizes[0]
    )


def test_an_adapter_does_not_differ_from_itself(tmp_path: Path) -> None:
    artifact = open_artifact(make(tmp_path / "a", {"m.q": 4, "m.o": 2}, seed=1))
    found = diff(artifact, artifact)
    assert found.cosine == pytest.approx(1)
    assert found.relative_distance == pytest.approx(0, abs=1e-12)


def test_modules_of_one_side_and_of_another_shape(tmp_path: Path) -> None:
    first = open_artifact(make(tmp_path / "a", {"m.q": 4, "m.k": 4}, seed=1))
    second = open_artifact(make(tmp_path / "b", {"m.o": 4, "m.k": 4}, seed=1, in_features=9))
    found = {module.name: module for module in diff(first, second).modules}
    assert (found["m.q"].ranks, found["m.q"].norms[1], found["m.q"].cosine) == ((4, 0), 0, None)
    assert (found["m.o"].ranks, found["m.o"].norms[0]) == ((0, 4), 0)
    assert found["m.o"].distance == found["m.o"].norms[1] > 0
    assert (found["m.k"].cosine, found["m.k"].distance) == (None, None)
    assert diff(first, second).relative_distance is None
