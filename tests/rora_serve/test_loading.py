from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from adapters import AdapterConfig, open_artifact, write_artifact
from adapters.errors import AdapterMismatchError
from rora_serve.engine.loading import Target, load_factors

TARGETS = {
    "m.q": Target("m.qkv", 0, 6, 8),
    "m.v": Target("m.qkv", 12, 6, 4),
    "m.o": Target("m.o", 0, 8, 6),
}


def make(folder: Path, factors: dict[str, tuple[int, int, int]], dtype: object = "f4") -> Path:
    """factors: per module (rank, in_features, out_features)."""
    generator = np.random.default_rng(0)
    arrays = {
        name: (
            generator.normal(size=(rank, columns)).astype(dtype),  # type: ignore[call-overload]
            generator.normal(size=(rows, rank)).astype(dtype),  # type: ignore[call-overload]
        )
        for name, (rank, columns, rows) in factors.items()
    }
    pattern = {name: rank for name, (rank, _, _) in factors.items()}
    config = AdapterConfig(
        1, 4, use_rslora=True, rank_pattern=pattern, target_modules=tuple(factors)
    )
    write_artifact(folder, config, arrays, provenance={})
    return folder


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("f4", torch.float32), ("f2", torch.float16), (ml_dtypes.bfloat16, torch.bfloat16)],
)
def test_factors_are_what_the_file_holds_unpadded_and_in_their_dtype(
    tmp_path: Path, dtype: object, wanted: torch.dtype
) -> None:
    folder = make(tmp_path / "a", {"m.q": (3, 6, 8), "m.v": (1, 6, 4)}, dtype)
    layers = load_factors(folder, TARGETS, rename=lambda name: name)
    assert list(layers) == ["m.qkv"]
    by_start = {factors.start: factors for factors in layers["m.qkv"]}
    assert by_start[0].lora_a.dtype == wanted
    assert by_start[0].scaling == 4 / 3**0.5
    assert by_start[12].lora_b.shape == (4, 1)
    for module, lora_a, lora_b in open_artifact(folder).read_tensors():
        factors = by_start[TARGETS[module.name].start]
        np.testing.assert_array_equal(factors.lora_a.float(), lora_a.astype(np.float32))
        np.testing.assert_array_equal(factors.lora_b.float(), lora_b.astype(np.float32))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"m.x": (2, 6, 8)}, "m.x: the base model has no such linear layer"),
        (
            {"m.q": (2, 6, 9)},
            r"m.q: the adapter is for \[9, 6\], the base model has \[8, 6\]",
        ),
        ({"m.q": (513, 6, 8)}, "m.q: rank 513, at most 512 is served"),
        ({"m.q": (1, 6, 8), "m.x": (1, 1, 1), "m.y": (1, 1, 1)}, r"m\.x: .*; m\.y: "),
        ({f"m.{n}": (1, 1, 1) for n in range(9)}, "and 4 more modules"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_all_that_does_not(
    tmp_path: Path, factors: dict[str, tuple[int, int, int]], message: str
) -> None:
    folder = make(tmp_path / "a", factors)
    with pytest.raises(AdapterMismatchError, match=message):
        load_factors(folder, TARGETS, rename=lambda name: name)


def test_modules_are_found_under_vllms_names(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", {"hub.o": (2, 8, 6)})
    layers = load_factors(folder, TARGETS, rename=lambda name: name.replace("hub.", "m."))
    assert list(layers) == ["m.o"]
