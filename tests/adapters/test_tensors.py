"""Tensors are what safetensors reads, one by one or together; a file that ends early is named."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters.errors import ArtifactError
from adapters.header import TensorInfo, read_header
from adapters.limits import MIB
from adapters.tensors import open_tensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Tensors of three dtypes, with odd sizes, of nothing, and of more than is read at a time."""
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return generator.normal(size=shape)

    tensors: dict[str, np.ndarray] = {
        **{f"small.{i}": random(7, 3 + i).astype(np.float32) for i in range(40)},
        **{f"half.{i}": random(5, 1 + i).astype(np.float16) for i in range(9)},
        **{f"brain.{i}": random(3, 1 + i).astype(ml_dtypes.bfloat16) for i in range(9)},
        "large": random(600, 500).astype(np.float32),
        "next.to.it": random(400, 300).astype(np.float32),
    }
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def orders(tensors: dict[str, TensorInfo]) -> list[list[TensorInfo]]:
    """As they lie, by name, backwards, and some of them."""
    by_place = sorted(tensors.values(), key=lambda tensor: tensor.start)
    by_name = sorted(tensors.values(), key=lambda tensor: tensor.name)
    return [by_place, by_name, by_place[::-1], by_place[::3], by_place[5:6], []]


def test_tensors_are_those_of_the_file_in_any_order(path: Path) -> None:
    expected = load_file(path)
    tensors = read_header(path)
    assert any(tensor.num_bytes > MIB for tensor in tensors.values())
    for order in orders(tensors):
        with open_tensors(path) as file:
            found = [array.copy() for array in file.read_all(order)]
            one_by_one = [file.read(tensor) for tensor in order]
            in_chunks = [b"".join(map(bytes, file.chunks(tensor))) for tensor in order]
        assert len(found) == len(order)
        for tensor, array, other, chunks in zip(order, found, one_by_one, in_chunks, strict=True):
            wanted = expected[tensor.name]
            assert array.dtype == other.dtype == wanted.dtype
            assert array.shape == other.shape == wanted.shape
            assert array.tobytes() == other.tobytes() == chunks == wanted.tobytes()


@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_file_that_became_shorter_is_named_with_the_tensor_that_it_ends_in(
    path: Path, left: int
) -> None:
    tensors = read_header(path)
    order, *_ = orders(tensors)
    cut = order[len(order) // 2]
    with path.open("r+b") as file:
        file.truncate(cut.start + min(left, cut.num_bytes - 1))
    message = f"{cut.name}: ends after {min(left, cut.num_bytes - 1)} of {cut.num_bytes} bytes"
    with open_tensors(path) as opened, pytest.raises(ArtifactError) as caught:
        for _ in opened.read_all(order):
            pass
    assert message in str(caught.value)
    with open_tensors(path) as opened, pytest.raises(ArtifactError) as caught:
        opened.read(cut)
    assert message in str(caught.value)
