import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import ATOL, linear_loop, lora_gradients_loop
from trainer.lora_linear import LoraLinear, gated_linear, lora_linear, only_rows


def base_of(layer: LoraLinear) -> nn.Linear:
    assert isinstance(layer.base, nn.Linear)
    return layer.base


def make_layer(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LoraLinear:
    generator = torch.Generator().manual_seed(3)
    base = nn.Linear(6, 5, dtype=dtype).requires_grad_(False)
    layer = LoraLinear(base, 6, 5, rank=2, scaling=1.5, dropout=dropout, generator=generator)
    layer.lora_b.data.normal_(generator=generator)
    return layer


def test_the_output_is_base_plus_scaled_product() -> None:
    layer, x = make_layer(), torch.randn(4, 6)
    weight = base_of(layer).weight.double().numpy()
    shrunk = linear_loop(x.double().numpy(), layer.lora_a.detach().double().numpy())
    delta = linear_loop(shrunk, layer.lora_b.detach().double().numpy())
    expected = linear_loop(x.double().numpy(), weight) + base_of(layer).bias.double().numpy()
    expected += 1.5 * delta
    np.testing.assert_allclose(layer(x).detach(), expected, atol=ATOL["float32"])


def test_gradients_equal_those_of_the_merged_weight() -> None:
    layer, x = make_layer(), torch.randn(4, 6)
    layer(x).square().sum().backward()
    lora_a = layer.lora_a.detach().clone().requires_grad_()
    lora_b = layer.lora_b.detach().clone().requires_grad_()
    merged = base_of(layer).weight + 1.5 * lora_b @ lora_a
    (x @ merged.T + base_of(layer).bias).square().sum().backward()
    torch.testing.assert_close(layer.lora_a.grad, lora_a.grad)
    torch.testing.assert_close(layer.lora_b.grad, lora_b.grad)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7)])
def test_gradients_equal_the_chain_rule_in_loops(rank: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(rank)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    x, weight, bias = draw(*shape).requires_grad_(), draw(5, 7), draw(5)
    lora_a, lora_b = draw(rank, 7).requires_grad_(), draw(5, rank).requires_grad_()
    y = lora_linear(x, weight, bias, lora_a, lora_b, 0.7)
    grad_y = draw(*y.shape)
    y.backward(grad_y)
    factors, x2, w2, g2 = (
        [t.detach().double().reshape(-1, t.shape[-1]).numpy() for t in tensors]
        for tensors in ((lora_a, lora_b), (x,), (weight,), (grad_y,))
    )
    expected = lora_gradients_loop(x2[0], w2[0], (factors[0], factors[1]), 0.7, g2[0])
    for got, want in zip((x.grad, lora_a.grad, lora_b.grad), expected, strict=True):
        assert got is not None
        np.testing.assert_allclose(got.reshape(want.shape), want, atol=ATOL["float32"])


def test_rows_that_are_padding_are_passed_over() -> None:
    """What the other rows give, and their gradients, is what they give alone."""
    layer, x = make_layer(), torch.randn(2, 3, 6)
    x[0, 2] = math.nan  # whatever padding holds
    rows = torch.tensor([0, 1, 3, 4, 5])
    grad_y = torch.randn(2, 3, 5)
    padded = x.clone().requires_grad_()
    with only_rows(rows, num_rows=6):
        y = layer(padded)
        # Some of the tokens, as an expert gets them, have other places.
        assert torch.equal(layer(x[1]), layer(x[1:])[0])
        assert layer(x[1]).any(dim=1).all()
    y.backward(grad_y)
    gradients = [layer.lora_a.grad, layer.lora_b.grad]
    layer.lora_a.grad = layer.lora_b.grad = None
    alone = x.view(6, 6)[rows].requires_grad_()
    expected = layer(alone)
    expected.backward(grad_y.view(6, 5)[rows])
    torch.testing.assert_close(y.view(6, 5)[rows], expected)
    assert not y.view(6, 5)[2].any()
    assert padded.grad is not None
    torch.testing.assert_close(padded.grad.view(6, 6)[rows], alone.grad)
    assert not padded.grad.view(6, 6)[2].any()
    torch.testing.assert_close(gradients, [layer.lora_a.grad, layer.lora_b.grad])


def test_only_the_input_and_the_rank_sized_product_are_kept() -> None:
    kept: list[torch.Tensor] = []
    layer, x = make_layer(), torch.randn(40, 6)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    known = [x, base_of(layer).weight, layer.lora_a, layer.lora_b]
    fresh = [t for t in kept if all(t.data_ptr() != k.data_ptr() for k in known)]
    assert [tuple(t.shape) for t in fresh] == [(40, 2)]


def test_no_gradient_is_computed_for_an_input_that_needs_none() -> None:
    class Counting(TorchDispatchMode):
        num_products = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.num_products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
            return func(*args, **(kwargs or {}))

    counts = []
    for needed in (False, True):
        y = make_layer()(torch.randn(4, 6, requires_grad=needed)).sum()
        with Counting() as counting:  # type: ignore[no-untyped-call]
            y.backward()
        counts.append(counting.num_products)
    assert counts == [3, 5]


def test_a_fresh_layer_changes_nothing_and_the_generator_decides_a() -> None:
    base = nn.Linear(6, 5)
    layers = [
        LoraLinear(
            base, 6, 5, rank=2, scaling=9.0, dropout=0.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    x = torch.randn(3, 6)
    torch.testing.assert_close(layers[0](x), base(x), rtol=0, atol=0)
    assert torch.equal(layers[0].lora_a, layers[1].lora_a)
    assert not torch.equal(layers[0].lora_a, layers[2].lora_a)
    # PEFT's initial A is uniform within this bound too.
    assert layers[0].lora_a.abs().max() <= 1 / 6**0.5


def test_dropout_acts_in_training_only() -> None:
    layer, x = make_layer(dropout=0.5), torch.randn(4, 6)
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stay_in_float32_beside_a_16_bit_base(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
    assert layer(torch.randn(2, 6, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("rank", [1, 5, 8, 9])
def test_in_16_bits_any_rank_computes_what_it_does_in_32(rank: int) -> None:
    """Products are of ranks rounded up to eights there; no gradient may show it."""
    generator = torch.Generator().manual_seed(rank)
    x, weight, lora_a, lora_b, grad_y = (
        torch.randn(*size, generator=generator)
        for size in ((7, 24), (16, 24), (rank, 24), (16, rank), (7, 16))
    )
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.clone().requires_grad_() for t in (x.to(dtype), lora_a, lora_b)]
        y = lora_linear(inputs[0], weight.to(dtype), None, inputs[1], inputs[2], 0.5)
        y.backward(grad_y.to(dtype))
        assert [t.grad.shape for t in inputs if t.grad is not None] == [t.shape for t in inputs]
        results.append(
            [y.detach().float(), *(t.grad.float() for t in inputs if t.grad is not None)]
        )
    for exact, rounded in zip(*results, strict=True):
        # Eight bits of each factor, summed over a few dozen products of size 1 to 5.
        torch.testing.assert_close(rounded, exact, atol=0.02 * float(exact.abs().max()), rtol=0)


@pytest.mark.parametrize("num_copies", [1, 2])
@pytest.mark.parametrize("is_shut", [False, True])
def test_gates_multiply_ranks_and_have_their_gradients(num_copies: int, is_shut: bool) -> None:
    """Against autograd through the formula, copy by copy; shut gates have slopes too."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, lora_a, lora_b, grad_y, gates = (
        torch.randn(*size, generator=generator)
        for size in ((4, 3, 7), (5, 7), (5,), (2, 7), (5, 2), (4, 3, 5), (num_copies, 2))
    )
    gates = gates * (not is_shut)
    inputs = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
    y = gated_linear(inputs[0], weight, bias, lora_a, lora_b, 0.7, inputs[1])
    y.backward(grad_y)
    expected = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
    parts = []
    for copy, part in enumerate(expected[0].chunk(num_copies)):
        delta = (part @ lora_a.T * expected[1][copy]) @ lora_b.T
        parts.append(part @ weight.T + bias + 0.7 * delta)
    torch.cat(parts).backward(grad_y)
    torch.testing.assert_close(y, torch.cat(parts))
    for ours, theirs in zip(inputs, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert ours.grad is not None
        assert ours.grad.any()
