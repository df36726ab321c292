"""Memory of large outputs is lent to one tensor at a time, and used again."""

import pytest
import torch

from rora_serve.engine import large_outputs
from rora_serve.engine.large_outputs import LargeOutputs

X = torch.ones(1)


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_outputs, "_LARGE_BYTES", 0)


def test_small_outputs_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_outputs, "_LARGE_BYTES", 4 * 300 * 100)
    outputs = LargeOutputs()
    for num_rows, is_large in ((299, False), (300, True)):
        y = outputs.new(X, num_rows, 100)
        assert y.shape == (num_rows, 100)
        del y
        assert (outputs._kept is not None) is is_large


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    outputs = LargeOutputs()
    y = outputs.new(X, 300, 100)
    assert y.shape == (300, 100)
    assert y.dtype == torch.float32
    place = y.data_ptr()
    y.fill_(1)
    rows = y[7:9]  # keeps all of it, as tensors on the same memory do
    del y
    other = outputs.new(X, 300, 100)
    assert other.data_ptr() != place
    other.fill_(2)
    assert (rows == 1).all()
    del rows
    assert outputs.new(X, 200, 100).data_ptr() == place


def test_what_hardly_ever_comes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_outputs, "_MOST_KEPT", 4 * 100 * 100)
    outputs = LargeOutputs()
    y = outputs.new(X, 100, 101)
    del y
    assert outputs._kept is None


def test_the_largest_piece_is_kept() -> None:
    outputs = LargeOutputs()
    small, large = outputs.new(X, 10, 10), outputs.new(X, 100, 100)
    place = large.data_ptr()
    del large, small
    y = outputs.new(X, 100, 100)
    assert y.data_ptr() == place
    del y
    larger = outputs.new(X, 1000, 100)
    larger.fill_(3)
    place = larger.data_ptr()
    del larger
    assert outputs.new(X, 1, 1).data_ptr() == place
