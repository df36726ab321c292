"""A product of ours equals numpy's in float64, and a row's is the same whatever is beside it."""

import importlib
import platform
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rora_serve.engine.threads import Threads
from tests.rora_serve.older_processor import run_compiled_for_avx2

# As rora_serve.engine.worker does: numba must come after vLLM.
products = importlib.import_module("rora_serve.engine.products")
instructions = importlib.import_module("rora_serve.engine.instructions")

if platform.machine() != "x86_64":
    pytest.skip("other processors use vLLM's product", allow_module_level=True)


def random(generator: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(generator.normal(size=shape).astype(np.float32))


def new_product(weight: Tensor, num_threads: int = 2) -> Any:
    product = products.new_product(weight, Threads(num_threads))
    assert product is not None
    return product


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Roundings that add up like a random walk, each as large as the whole sum's could be.

    Two more for a sum's last ones, of which few are too few to walk at random.
    """
    true = expected(x, weight, bias)
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.abs())
    allowed = 2**-24 * (weight.shape[1] ** 0.5 + 2) * size
    assert ((y.double() - true).abs() <= allowed).all()


@given(
    num_rows=st.integers(0, 40),
    in_features=st.one_of(st.integers(1, 70), st.sampled_from([2048, 2049, 4100])),
    out_features=st.integers(1, 140),
    has_bias=st.booleans(),
    num_threads=st.sampled_from([1, 2, 3, 7]),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_it_equals_numpys_in_float64(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    num_threads: int,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    weight = random(generator, out_features, in_features)
    bias = random(generator, out_features) if has_bias else None
    x = random(generator, num_rows, in_features)
    product = new_product(weight, num_threads)
    y = product(x, weight, bias)
    assert y.shape == (num_rows, out_features)
    if num_rows:
        check(y, x, weight, bias)


@pytest.mark.parametrize("in_features", [576, 1536, 8192])
def test_sums_are_about_as_exact_as_torchs(in_features: int) -> None:
    """A single sum from the first input to the last would be 2 to 5 times as far off."""
    generator = np.random.default_rng(0)
    weight, x = random(generator, 256, in_features), random(generator, 32, in_features)
    true = expected(x, weight, None)

    def error(y: Tensor) -> float:
        return (y.double() - true).square().mean().sqrt().item()

    assert error(new_product(weight)(x, weight, None)) < 1.7 * error(x @ weight.T)


def test_any_number_of_rows_is_cut_into_tiles() -> None:
    generator = np.random.default_rng(0)
    weight = random(generator, 33, 9)
    product = new_product(weight)
    for num_rows in range(1, 40):
        x = random(generator, num_rows, 9)
        check(product(x, weight, None), x, weight)


def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    generator = np.random.default_rng(1)
    weight, bias = random(generator, 216, 2100), random(generator, 216)
    x = random(generator, 70, 2100)
    product = new_product(weight)
    together = product(x, weight, bias)
    for num_rows in (1, 2, 7, 12, 13, 33):
        parts = [product(part, weight, bias) for part in x.split(num_rows)]
        assert torch.equal(torch.cat(parts), together), num_rows
    alone = new_product(weight, 1)(x, weight, bias)
    assert torch.equal(alone, together), "whichever thread makes it"


def test_rows_may_lie_anywhere() -> None:
    generator = np.random.default_rng(2)
    weight = random(generator, 40, 24)
    product = new_product(weight)
    wide = random(generator, 6, 100)
    columns = random(generator, 24, 6).T
    deep = random(generator, 2, 3, 24)
    for x in (wide[:, 3:27], wide[::2, 3:27], columns, deep, deep.transpose(0, 1), deep[0, 0]):
        y = product(x, weight, None)
        assert y.shape == (*x.shape[:-1], 40)
        check(y.reshape(-1, 40), x.reshape(-1, 24), weight)


def test_the_bias_is_that_of_the_call() -> None:
    generator = np.random.default_rng(3)
    weight, x = random(generator, 40, 24), random(generator, 5, 24)
    first, second = random(generator, 40), random(generator, 40)
    product = new_product(weight)
    for bias in (first, second, None, first):
        check(product(x, weight, bias), x, weight, bias)
    first += 1
    check(product(x, weight, first), x, weight, first)


def test_a_float32_layer_of_a_model_in_16_bits_is_multiplied_in_float32() -> None:
    """vLLM makes layers, and what they are multiplied by, while torch's default is the model's."""
    generator = np.random.default_rng(4)
    weight, bias, x = random(generator, 70, 24), random(generator, 70), random(generator, 5, 24)
    torch.set_default_dtype(torch.bfloat16)
    try:
        product = new_product(weight)
        product.pack()
        outputs = [product(x, weight, None), product(x, weight, bias)]
    finally:
        torch.set_default_dtype(torch.float32)
    check(outputs[0], x, weight)
    check(outputs[1], x, weight, bias)


def test_rows_that_would_be_misread_are_refused() -> None:
    weight = torch.ones(4, 3)
    product = new_product(weight)
    with pytest.raises(ValueError, match=r"input \[2, 5\] of torch.float32: \[\.\.\., 3\]"):
        product(torch.ones(2, 5), weight, None)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=rf"of {dtype}: \[\.\.\., 3\] of torch.float32"):
            product(torch.ones(2, 3, dtype=dtype), weight, None)
    for bias in (torch.ones(1), torch.ones(4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"bias \[.\] of .*: \[4\] of torch.float32"):
            product(torch.ones(2, 3), weight, bias)


def test_other_weights_stay_vllms() -> None:
    assert products.new_product(torch.ones(4, 3, dtype=torch.bfloat16), Threads(1)) is None
    assert products.new_product(torch.ones(2, 4, 3), Threads(1)) is None


def test_large_outputs_are_lent_to_one_caller_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rora_serve.engine.large_outputs._LARGE_BYTES", 4 * 20 * 64)
    generator = np.random.default_rng(5)
    weight = random(generator, 50, 24)
    product = new_product(weight)
    inputs = [random(generator, num_rows, 24) for num_rows in (19, 20, 40, 30, 20)]
    outputs = [product(x, weight, None) for x in inputs]
    for _ in range(3):
        for x, y in zip(inputs, outputs, strict=True):
            check(y, x, weight)
        del outputs[2], inputs[2]
        inputs.append(random(generator, 25, 24))
        outputs.append(product(inputs[-1], weight, None))


def test_a_packed_weight_is_not_kept() -> None:
    for in_features in (1, 3):
        weight = torch.ones(64, in_features)
        product = new_product(weight)
        product.pack()
        kept = weakref.ref(weight)
        del weight
        assert kept() is None
        y = product(torch.ones(1, in_features), torch.empty(0), None)
        assert torch.equal(y, torch.full((1, 64), float(in_features)))


def test_processors_without_avx512_compute_the_same(tmp_path: Path) -> None:
    """Other vectors, other tiles: once more, compiled for AVX2."""
    if not instructions.HAS_AVX512:
        pytest.skip("the tests above are compiled for AVX2 already")
    run_compiled_for_avx2(__file__, tmp_path)
