from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapters.errors import EngineSeamError
from rora_serve.engine.ragged_batch import RaggedBatch
from rora_serve.engine.ragged_layers import Factors, RaggedLayer, add_deltas
from tests.reference import ATOL, Array, ragged_delta_loop

IN, OUT = 7, 10
# A fused layer: three parts of unequal sizes, one after the other.
PARTS = ((0, 5), (5, 2), (7, 3))


def make_slots(ranks: dict[int, list[int]], dtype: torch.dtype) -> dict[int, tuple[Factors, ...]]:
    """Factors of each adapter; a rank of 0 is a part that it does not touch."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: tuple(
            Factors(
                torch.randn(rank, IN, generator=generator).to(dtype),
                torch.randn(size, rank, generator=generator).to(dtype),
                scaling=0.5 + key,
                start=start,
            )
            for rank, (start, size) in zip(of_parts, PARTS, strict=True)
            if rank
        )
        for key, of_parts in ranks.items()
    }


def expected_output(
    x: torch.Tensor, y: torch.Tensor, ids: list[int], slots: dict[int, tuple[Factors, ...]]
) -> Array:
    factors: dict[int, Sequence[tuple[Array, Array, float, int]]] = {
        key: [
            (f.lora_a.double().numpy(), f.lora_b.double().numpy(), f.scaling, f.start)
            for f in of_adapter
        ]
        for key, of_adapter in slots.items()
    }
    return ragged_delta_loop(x.double().numpy(), y.double().numpy(), ids, factors)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=14),
    ranks=st.dictionaries(
        st.integers(1, 4), st.lists(st.integers(0, 6), min_size=3, max_size=3), max_size=4
    ),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_mix_equals_a_loop_over_rows(
    ids: list[int], ranks: dict[int, list[int]], padding: int, dtype: torch.dtype
) -> None:
    """Base rows, unequal ranks, missing parts, ids without weights, padded rows."""
    slots = make_slots(ranks, dtype)
    x = torch.randn(len(ids) + padding, IN).to(dtype)
    y = torch.randn(len(ids) + padding, OUT).to(dtype)
    expected = expected_output(x, y, ids + [0] * padding, slots)
    batch = RaggedBatch()
    batch.set_rows(ids)
    result = y.clone()
    add_deltas(x, result, batch, slots, layer_name="layer")
    scale = max(1.0, float(np.abs(expected).max()))
    atol = ATOL["float32"] if dtype == torch.float32 else ATOL["bfloat16"]
    np.testing.assert_allclose(result.double(), expected, atol=atol * scale)
    untouched = [row for row in range(len(ids) + padding) if (ids + [0] * padding)[row] == 0]
    assert torch.equal(result[untouched], y[untouched])


@pytest.mark.parametrize("returns_bias", [False, True])
def test_the_hook_adds_to_what_the_layer_returns(returns_bias: bool) -> None:
    class Layer(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return (y, None) if returns_bias else y

    layer, batch = Layer(IN, OUT), RaggedBatch()
    ragged = RaggedLayer("layer", layer, batch)
    ragged.slots = make_slots({1: [2, 0, 1]}, torch.float32)
    x = torch.randn(3, IN)
    with torch.no_grad():
        alone = layer(x)[0] if returns_bias else layer(x)
        batch.set_rows([0, 1, 1])
        found = layer(x)[0] if returns_bias else layer(x)
    expected = expected_output(x, alone, [0, 1, 1], ragged.slots)
    np.testing.assert_allclose(found.double(), expected, atol=ATOL["float32"])


def test_a_layer_that_no_adapter_touches_never_looks_at_its_rows() -> None:
    """An image encoder's layers see other rows than the step has."""
    layer, batch = nn.Linear(IN, OUT), RaggedBatch()
    RaggedLayer("visual", layer, batch)
    batch.set_rows([1, 1, 0])
    x = torch.randn(9, 1, IN)
    assert layer(x).shape == (9, 1, OUT)


def test_rows_that_can_not_be_told_apart_are_refused() -> None:
    batch = RaggedBatch()
    batch.set_rows([1, 1, 0])
    for shape in ((2, IN), (1, 3, IN)):
        with pytest.raises(EngineSeamError, match=r"layer: input .* for a step of 3 rows"):
            add_deltas(torch.ones(shape), torch.ones(3, OUT), batch, {}, layer_name="layer")


def test_neighbouring_rows_are_read_without_a_copy() -> None:
    batch = RaggedBatch()
    batch.set_rows([0, 3, 3, 5, 0, 5])
    groups = dict(batch.groups)
    assert groups[3] == slice(1, 3)
    assert isinstance(groups[5], torch.Tensor)
    assert groups[5].tolist() == [3, 5]
    batch.set_rows([0, 0])
    assert batch.groups == []
