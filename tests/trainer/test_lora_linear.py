import numpy as np
import pytest
import torch
from torch import nn

from tests.reference import ATOL, linear_loop
from trainer.lora_linear import LoraLinear


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
