"""Every mix of rows and adapters equals a loop, whichever way it is computed."""

import importlib
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import EngineSeamError
from rora_serve.engine.hooks import LayerHooks
from rora_serve.engine.ragged_batch import RaggedBatch
from rora_serve.engine.ragged_layers import DTYPES, DeltasAfterProduct, RaggedLayer
from rora_serve.engine.slots import Slot
from rora_serve.engine.threads import Threads
from tests.reference import ATOL, Array, ragged_delta_loop
from tests.rora_serve.older_processor import run_compiled_for_avx2
from tests.rora_serve.slots import make_slot

# As rora_serve.engine.manager does: numba must come after vLLM.
kernels = importlib.import_module("rora_serve.engine.kernels")
instructions = importlib.import_module("rora_serve.engine.instructions")
products = importlib.import_module("rora_serve.engine.products")


@cache
def make_loop(dtype: torch.dtype, num_threads: int) -> Any:
    (element,) = (element for element, of in DTYPES.items() if of == dtype)
    return kernels.Loop(element, Threads(num_threads))


IN = 83
MANY = 16  # rows from which on threads share a group's rows
# A fused layer: three parts of unequal sizes, one after the other; the second layer is plain, of
# several panels of columns, then a vector, then single columns.
LAYERS = (((0, 5), (5, 2), (7, 3)), ((0, 216),))
NUMPY_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float16: np.dtype(np.float16),
}
Factors = dict[tuple[int, int], tuple[Array, Array, float]]


def make_adapter(
    seed: int, ranks: Sequence[Sequence[int]], dtype: torch.dtype, in_features: int = IN
) -> tuple[Slot, Factors]:
    """A slot, and its factors by layer and part, as float64; a rank of 0 is a module without."""
    generator = np.random.default_rng(seed)
    stored = {}
    factors = {}
    for layer, of_layer in enumerate(ranks):
        for part, rank in enumerate(of_layer):
            if rank:
                width = LAYERS[layer][part][1]
                a = generator.normal(size=(rank, in_features)).astype(NUMPY_DTYPES[dtype])
                b = generator.normal(size=(width, rank)).astype(NUMPY_DTYPES[dtype])
                scaling = 0.25 + seed
                stored[layer, part] = (a, b, scaling)
                factors[layer, part] = (a.astype(np.float64), b.astype(np.float64), scaling)
    return make_slot(stored, num_layers=len(LAYERS), num_parts=3), factors


def make_layer(
    index: int,
    *,
    dtype: torch.dtype = torch.float32,
    num_threads: int = 1,
    in_features: int = IN,
) -> RaggedLayer:
    return RaggedLayer(
        f"layer {index}",
        index,
        "linear",
        in_features=in_features,
        parts=LAYERS[index],
        loop=make_loop(dtype, num_threads),
    )


def expected_output(
    x: torch.Tensor, y: torch.Tensor, ids: list[int], adapters: dict[int, Factors], layer: int
) -> Array:
    factors: dict[int, Sequence[tuple[Array, Array, float, int]]] = {
        key: [
            (a, b, scaling, LAYERS[layer][part][0])
            for (of_layer, part), (a, b, scaling) in of_adapter.items()
            if of_layer == layer
        ]
        for key, of_adapter in adapters.items()
    }
    return ragged_delta_loop(x.double().numpy(), y.double().numpy(), ids, factors)


def check(
    ids: list[int],
    adapters: dict[int, tuple[Slot, Factors]],
    dtype: torch.dtype,
    *,
    num_threads: int = 1,
    padding: int = 0,
    in_features: int = IN,
) -> None:
    """Compare both layers with the loop, and rows without an adapter bit by bit."""
    generator = torch.Generator().manual_seed(len(ids))
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows(tuple(ids), (), {key: slot for key, (slot, _) in adapters.items()})
    padded = ids + [0] * padding
    for index, parts in enumerate(LAYERS):
        x = torch.randn(len(padded), in_features, generator=generator).to(dtype)
        y = torch.randn(len(padded), sum(w for _, w in parts), generator=generator).to(dtype)
        factors = {key: of_adapter for key, (_, of_adapter) in adapters.items()}
        expected = expected_output(x, y, padded, factors, index)
        result = y.clone()
        layer = make_layer(index, dtype=dtype, num_threads=num_threads, in_features=in_features)
        layer.add_deltas(x, result, batch.tokens)
        # The result is rounded by its own size, and sums of either sign by that of what they add
        # up, which may be many times theirs: four units in the last place of float32.
        absolute = {
            key: {place: (np.abs(a), np.abs(b), scaling) for place, (a, b, scaling) in of.items()}
            for key, of in factors.items()
        }
        added_up = expected_output(x.abs(), y.abs(), padded, absolute, index)
        size = max(1.0, float(np.abs(expected).max()))
        unit = {torch.float32: 2**-23, torch.float16: 1e-3, torch.bfloat16: 2**-7}[dtype]
        atol = unit * size + 2**-22 * float(added_up.max())
        np.testing.assert_allclose(result.double(), expected, atol=atol)
        untouched = [row for row, key in enumerate(padded) if key not in adapters]
        assert torch.equal(result[untouched], y[untouched])


@settings(max_examples=80, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=3 * MANY),
    ranks=st.dictionaries(
        st.integers(1, 4),
        st.tuples(
            st.lists(st.integers(0, 9), min_size=3, max_size=3),
            st.lists(st.integers(0, 9), min_size=1, max_size=1),
        ),
        max_size=4,
    ),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    num_threads=st.sampled_from([1, 2, 3]),
)
def test_any_mix_equals_a_loop_over_rows(
    ids: list[int],
    ranks: dict[int, tuple[list[int], list[int]]],
    padding: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    num_threads: int,
) -> None:
    """Base rows, unequal ranks, missing parts, ids without weights, padded rows, any dtypes."""
    adapters = {key: make_adapter(key, of_layers, stored) for key, of_layers in ranks.items()}
    check(ids, adapters, dtype, num_threads=num_threads, padding=padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 128])
@pytest.mark.parametrize(
    "ids",
    [
        [1] * 40,
        [1, 2] * 20,
        [1] * MANY + [0] + [2] * (MANY - 1),
        list(range(1, 41)),
        # Popular ones have many rows, spread over the batch.
        [1, 2, 1, 3, 1, 2, 1, 4, 1, 1, 5, 2, 1, 1, 3, 1, 6, 1, 2, 1, 1, 7, 1, 1, 1, 2, 1],
    ],
    ids=["identical", "two", "many and few", "distinct", "Zipf"],
)
def test_popularity_and_rank_change_nothing(ids: list[int], rank: int, dtype: torch.dtype) -> None:
    ranks = {key: ([rank, 0, rank], [max(rank - key % 2, 1)]) for key in set(ids) - {0}}
    adapters = {key: make_adapter(key, of_layers, dtype) for key, of_layers in ranks.items()}
    check(ids, adapters, dtype)


def test_adapters_of_several_dtypes_share_a_batch() -> None:
    dtypes = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
    adapters = {key: make_adapter(key, ([2, 1, 3], [4]), of) for key, of in dtypes.items()}
    check([3, 1, 2, 0, 2, 1, *[2] * MANY], adapters, torch.float32)


def test_wide_rows_are_shared_out_among_threads() -> None:
    """Parts of more and of fewer columns than there are threads."""
    adapters = {
        key: make_adapter(key, ([3, 5, 1], [6]), torch.float32, in_features=3000) for key in (1, 2)
    }
    for num_threads in (1, 2, 3, 7):
        for ids in ([1, 2, 0, 1], [1] * 70, [1] * 3 * MANY + [0, 2, 2]):
            check(ids, adapters, torch.float32, num_threads=num_threads, in_features=3000)


def test_processors_without_avx512_compute_the_same(tmp_path: Path) -> None:
    """Other vectors, other tiles: in float32 once more, compiled for AVX2."""
    if platform.machine() != "x86_64":
        pytest.skip("AVX2 is x86's")
    if not instructions.HAS_AVX512:
        pytest.skip("the tests above are compiled for AVX2 already")
    run_compiled_for_avx2(__file__, tmp_path, "-k", "dtype0 or threads or embedding")


def test_an_embedding_adds_what_its_tokens_select() -> None:
    generator = np.random.default_rng(0)
    vocabulary, hidden, rank = 50, 12, 3
    a = generator.normal(size=(rank, vocabulary)).astype(np.float32)
    b = generator.normal(size=(hidden, rank)).astype(np.float32)
    slot = make_slot({(0, 0): (a, b, 0.5)}, num_layers=1, num_parts=1, kind="embedding")
    layer = RaggedLayer(
        "embedding",
        0,
        "embedding",
        in_features=vocabulary,
        parts=((0, hidden),),
        loop=make_loop(torch.float32, 2),
    )
    for count in (3, MANY):
        ids = [1] * count + [0, 0]
        batch = RaggedBatch(1)
        batch.set_rows(tuple(ids), (), {1: slot})
        tokens = torch.from_numpy(generator.integers(0, vocabulary, len(ids)))
        y = torch.zeros(len(ids), hidden)
        layer.add_deltas(tokens, y, batch.tokens)
        behind_an_axis = torch.zeros(1, len(ids), hidden)
        layer.add_deltas(tokens[None], behind_an_axis, batch.tokens)
        assert torch.equal(behind_an_axis[0], y)
        for row, token in enumerate(tokens):
            expected = 0.5 * b @ a[:, token] if ids[row] else np.zeros(hidden)
            np.testing.assert_allclose(y[row], expected, atol=ATOL["float32"])


def test_rows_that_are_not_contiguous_are_read_as_they_lie() -> None:
    slot, factors = make_adapter(1, ([2, 1, 3], [4]), torch.float32)
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows((1, 0, 1), (), {1: slot})
    x = torch.randn(IN, 3).t()
    wide = torch.zeros(3, 20)
    y = wide[:, 4:14]
    make_layer(0).add_deltas(x, y, batch.tokens)
    expected = expected_output(x, torch.zeros(3, 10), [1, 0, 1], {1: factors}, 0)
    np.testing.assert_allclose(y, expected, atol=ATOL["float32"])
    assert not wide[:, :4].any()
    assert not wide[:, 14:].any()


@pytest.mark.parametrize(
    ("model", "x_dtype", "y_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
    ],
)
def test_layers_of_another_dtype_than_the_models_are_served(
    model: torch.dtype, x_dtype: torch.dtype, y_dtype: torch.dtype
) -> None:
    slot, factors = make_adapter(1, ([3, 0, 2], [0]), torch.float32)
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows((1, 0, 1), (), {1: slot})
    x, y = (torch.randn(3, IN) / 4).to(x_dtype), torch.randn(3, 10).to(y_dtype)
    before = y.clone()
    make_layer(0, dtype=model).add_deltas(x, y, batch.tokens)
    read = x.to(model).float()
    expected = expected_output(read, before.float(), [1, 0, 1], {1: factors}, 0)
    np.testing.assert_allclose(y.float(), expected, atol=ATOL["bfloat16"])
    assert torch.equal(y[1], before[1])
    assert not torch.equal(y[0], before[0])


def test_a_layer_that_no_adapter_touches_never_looks_at_its_rows() -> None:
    """An image encoder's layers see other rows than the step has."""
    slot, _ = make_adapter(1, ([0, 0, 0], [2]), torch.float32)
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows((1, 1, 0), (), {1: slot})
    y = torch.zeros(9, 1, 10)
    make_layer(0).add_deltas(torch.ones(9, 1, IN), y, batch.tokens)
    assert not y.any()


def test_rows_that_can_not_be_told_apart_are_refused() -> None:
    slot, _ = make_adapter(1, ([1, 0, 0], [0]), torch.float32)
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows((1, 1, 0), (), {1: slot})
    for shape in ((2, IN), (1, 2, IN), (3, 1, IN), (2, 3, IN)):
        with pytest.raises(EngineSeamError, match=r"layer 0: input .* for a step of 3 rows"):
            make_layer(0).add_deltas(torch.ones(shape), torch.ones(3, 10), batch.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_lie_behind_a_batch_axis_of_one(dtype: torch.dtype) -> None:
    """As in models that run in Transformers' own code; also where they are copied to be read."""
    slot, _ = make_adapter(1, ([2, 1, 3], [4]), torch.float32)
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows((1, 0, 1), (), {1: slot})
    wide, x = torch.randn(3, 20, dtype=dtype), torch.randn(3, IN, dtype=dtype)
    for output in (wide, wide[:, :10], wide.T.contiguous().T[:, :10]):
        for rows in (x, x.T.contiguous().T):
            expected, found = output.clone(), output.clone()
            make_layer(0).add_deltas(rows, expected, batch.tokens)
            assert not torch.equal(expected, output)
            layer = make_layer(0)
            layer.add_deltas(rows[None], found[None], batch.tokens)
            assert torch.equal(found, expected)
            layer.add_deltas(rows, found, batch.tokens)
            assert not torch.equal(found, expected)


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.integers(0, 4), min_size=1, max_size=3 * MANY), min_size=1, max_size=3
    ),
    ranks=st.dictionaries(
        st.integers(1, 4),
        st.tuples(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.just([3])),
        max_size=4,
    ),
    layer=st.integers(0, len(LAYERS) - 1),
    padding=st.integers(0, 3),
    has_bias=st.booleans(),
    num_threads=st.sampled_from([1, 2, 3]),
)
def test_deltas_on_a_products_threads_are_those_added_behind_it(
    steps: list[list[int]],
    ranks: dict[int, tuple[list[int], list[int]]],
    layer: int,
    padding: int,
    has_bias: bool,
    num_threads: int,
) -> None:
    """To the last bit, in steps with other rows each time."""
    slots = {key: make_adapter(key, of, torch.float32)[0] for key, of in ranks.items()}
    batch = RaggedBatch(len(LAYERS))
    generator = torch.Generator().manual_seed(layer)
    width = sum(w for _, w in LAYERS[layer])
    weight = torch.randn(width, IN, generator=generator)
    bias = torch.randn(width, generator=generator) if has_bias else None
    joined, plain = (products.new_product(weight, Threads(num_threads)) for _ in range(2))
    ragged, behind = (make_layer(layer, num_threads=num_threads) for _ in range(2))
    assert ragged.can_follow(joined)
    hooks = LayerHooks((), [(joined, DeltasAfterProduct(ragged, batch))])
    for ids in steps:
        batch.set_rows(tuple(ids), (), slots)
        wide = torch.randn(len(ids) + padding, IN + 5, generator=generator)
        for x in (wide[:, 2 : IN + 2], wide[:, :IN].T.contiguous().T):
            expected = plain(x, None, bias)
            behind.add_deltas(x, expected, batch.tokens)
            assert torch.equal(joined(x, None, bias), expected)
            assert torch.equal(joined(x[None], None, bias), expected[None])
    hooks.switch(on=False)
    assert torch.equal(joined(x, None, bias), plain(x, None, bias))
    hooks.switch(on=True)
    assert torch.equal(joined(x, None, bias), expected)


def test_rows_of_a_product_that_can_not_be_told_apart_are_refused() -> None:
    slot, _ = make_adapter(1, ([1, 0, 0], [0]), torch.float32)
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows((1, 1, 0), (), {1: slot})
    product = products.new_product(torch.ones(10, IN), Threads(2))
    product.add(DeltasAfterProduct(make_layer(0, num_threads=2), batch))
    for shape in ((2, IN), (1, 2, IN), (3, 1, IN), (2, 3, IN)):
        with pytest.raises(EngineSeamError, match=r"layer 0: input \[.*\] for a step of 3 rows"):
            product(torch.ones(shape), None, None)
    batch.clear()
    for size in ((2,), (1, 3)):
        y = product(torch.ones(*size, IN), None, None)
        assert torch.equal(y, torch.full((*size, 10), float(IN))), "no adapter is in the step"


def test_deltas_follow_products_of_their_own_layer_alone() -> None:
    product = products.new_product(torch.ones(10, IN), Threads(1))
    assert make_layer(0).can_follow(product)
    assert not make_layer(0, dtype=torch.bfloat16).can_follow(product)
    assert not make_layer(0, in_features=IN + 1).can_follow(product)
    assert not make_layer(1).can_follow(product), "it has more columns"


def test_rows_are_grouped_by_slot_in_their_order() -> None:
    slots = {key: make_adapter(key, ([1, 0, 0], [0]), torch.float32)[0] for key in (3, 5, 7)}
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows((0, 7, 3, 3, 0, 7, 4, 3), (), slots)
    found = [(slot, rows.tolist()) for slot, rows in batch.tokens.by_slot]
    assert found == [(slots[3], [2, 3, 7]), (slots[7], [1, 5])]
    assert batch.tokens.is_touched == [True, False]


def test_a_step_like_the_last_one_is_not_grouped_again() -> None:
    slot, _ = make_adapter(1, ([1, 0, 0], [0]), torch.float32)
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows((1, 0), (1, 0), {1: slot})
    groups = batch.tokens
    batch.set_rows((1, 0), (1, 0), {1: slot})
    assert batch.tokens is groups
    batch.set_rows((0, 1), (0, 1), {1: slot})
    assert batch.tokens is not groups
    batch.clear()
    assert batch.tokens.tables is None
    assert not any(batch.tokens.is_touched)


def test_rows_of_logits_are_those_of_samples_or_of_a_part_of_the_prompt() -> None:
    slots = {key: make_adapter(key, ([1, 0, 0], [0]), torch.float32)[0] for key in (1, 2)}
    batch = RaggedBatch(len(LAYERS))
    batch.set_rows((1, 1, 1, 2, 2), (1, 2), slots)
    assert batch.samples.num_rows == 2
    part = batch.tokens_between(2, 4)
    assert part.num_rows == 2
    assert [rows.tolist() for _, rows in part.by_slot] == [[0], [1]]
