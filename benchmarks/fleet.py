"""Adapters to serve in benchmarks and soaks: random factors, a rank of its own in each module."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from adapters import AdapterConfig, AdapterStore, write_artifact
from adapters.receipt import read_base_shapes

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def add_fleet(
    store: AdapterStore,
    scratch: Path,
    base: Path,
    *,
    count: int,
    max_rank: int = 32,
    dtype: str = "float32",
) -> list[str]:
    """Add `count` adapters of every linear layer, each module's rank uniform from 1 to `max_rank`.

    Returns: their names.
    Cost: 20 MB of disk each in float32, for SmolLM2-135M and 32.
    """
    linear = read_base_shapes(base, name="base").linear
    shapes = {name: shape for name, shape in linear.items() if shape and name != "lm_head"}
    names = []
    for number in range(count):
        generator = np.random.default_rng(number)
        folder = scratch / f"adapter-{number}"
        ranks = {name: int(generator.integers(1, max_rank + 1)) for name in shapes}
        config = AdapterConfig(
            max_rank,
            32,
            use_rslora=True,
            rank_pattern={name: rank for name, rank in ranks.items() if rank != max_rank},
            target_modules=tuple(sorted({name.rpartition(".")[2] for name in shapes})),
        )
        factors = {}
        for name, rank in ranks.items():
            out_features, in_features = shapes[name]
            a = generator.standard_normal((rank, in_features), np.float32) * in_features**-0.5
            b = generator.standard_normal((out_features, rank), np.float32) * 0.02
            factors[name] = (a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype]))
        write_artifact(folder, config, factors, provenance={"format": 1, "method": "random"})
        names.append(folder.name)
        store.add(folder, name=folder.name)
        shutil.rmtree(folder)
    return names


def zipf_weights(count: int) -> list[float]:
    """Return how popular each of `count` adapters is, the k-th as 1 / k."""
    return [1 / rank for rank in range(1, count + 1)]


def zipf_counts(count: int, total: int) -> list[int]:
    """Share `total` requests out among `count` adapters, the k-th as popular as 1 / k.

    Largest remainders; the least popular of many get none.
    """
    weights = np.array(zipf_weights(count))
    wanted = weights / weights.sum() * total
    shares = np.floor(wanted).astype(int)
    for index in np.argsort(shares - wanted)[: total - int(shares.sum())]:
        shares[index] += 1
    return [int(share) for share in shares]


def interleaved(names: list[str], counts: list[int]) -> Iterator[str]:
    """Yield each name as often as its count, spread over the whole."""
    places = [
        ((turn + 0.5) / count, name)
        for name, count in zip(names, counts, strict=True)
        for turn in range(count)
    ]
    return (name for _, name in sorted(places))
