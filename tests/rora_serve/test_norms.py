"""The compiled norms are those of vLLM's PyTorch code, and leave alone what they can not do."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import ir
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from rora_serve.engine.norms import PROVIDER
from rora_serve.engine.platform import RoraCpuPlatform

# As rora_serve.engine.worker does: models that are made from then on have its layers.
norm_layers = importlib.import_module("rora_serve.engine.norm_layers")

EPSILON = 1e-5
SHAPES = [(1, 576), (33, 576), (0, 576), (7, 16), (4, 3, 64)]


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, residual, torch.randn(shape[-1], generator=generator).to(dtype)


def norm_by_loop(x: Tensor, weight: Tensor) -> Tensor:
    """The norm of each row, in float64."""
    rows = []
    for row in x.double().view(-1, x.shape[-1]):
        mean = sum(float(value) ** 2 for value in row) / len(row)
        rows.append(weight.double() * row / (mean + EPSILON) ** 0.5)
    return torch.stack(rows).view(x.shape) if rows else x.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_are_those_of_a_loop_and_of_vllms_own_code(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, residual, weight = random_inputs(shape, dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps

    def assert_close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)

    norm, sum_norm = ir.ops.rms_norm.impls, ir.ops.fused_add_rms_norm.impls
    assert norm[PROVIDER].supports_args(x, weight, EPSILON)
    found = norm[PROVIDER].impl_fn(x, weight, EPSILON)
    assert_close(found, norm["native"].impl_fn(x, weight, EPSILON))
    assert_close(found, norm_by_loop(x, weight).to(dtype))
    assert sum_norm[PROVIDER].supports_args(x, residual, weight, EPSILON)
    expected = sum_norm["native"].impl_fn(x, residual, weight, EPSILON)
    found = sum_norm[PROVIDER].impl_fn(x.clone(), residual.clone(), weight, EPSILON)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def test_rows_apart_from_each_other_are_rounded_as_those_side_by_side() -> None:
    """As the heads of one token are, and those of several."""
    packed, _, _ = random_inputs((5, 4 * 64), torch.bfloat16)
    _, _, weight = random_inputs((64,), torch.bfloat16)
    heads = packed[:, 64:192].view(5, 2, 64)
    assert not heads.is_contiguous()
    norm = ir.ops.rms_norm.impls[PROVIDER]
    assert norm.supports_args(heads, weight, EPSILON)
    alone = torch.cat([norm.impl_fn(head, weight, EPSILON) for head in heads.split(1)])
    assert torch.equal(norm.impl_fn(heads, weight, EPSILON), alone)


def test_what_is_not_given_away_is_not_written() -> None:
    """Some models read what they normalized again; they call the operator that promises this."""
    x, residual, weight = random_inputs((3, 64), torch.float32)
    given = x.clone(), residual.clone()
    with ir.ops.fused_add_rms_norm.set_priority([PROVIDER, "native"]):
        found = ir.ops.fused_add_rms_norm(*given, weight, EPSILON)
    assert torch.equal(given[0], x)
    assert torch.equal(given[1], residual)
    assert torch.equal(found[1], x + residual)


def new_layer(**how: Any) -> Any:
    with set_current_vllm_config(VllmConfig()):
        layer = RMSNorm(64, EPSILON, **how)
    assert isinstance(layer, norm_layers.ShortRMSNorm), "vLLM makes ours"
    return layer


@torch.no_grad()
def test_layers_return_what_vllms_do() -> None:
    x, residual, weight = random_inputs((5, 64), torch.float32)
    layer = new_layer()
    layer.weight.copy_(weight)
    torch.testing.assert_close(layer.forward_cpu(x.clone()), layer.forward_native(x.clone()))
    found = layer.forward_cpu(x.clone(), residual.clone())
    for ours, theirs in zip(found, layer.forward_native(x.clone(), residual.clone()), strict=True):
        torch.testing.assert_close(ours, theirs)
    given = x.clone(), residual.clone()
    norm, total = layer.forward_cpu(*given)
    assert norm.data_ptr() == given[0].data_ptr(), "without a tensor of its own"
    assert total is given[1]


@pytest.mark.parametrize(
    "how", [{"var_hidden_size": 32}, {"has_weight": False}, {"dtype": torch.bfloat16}, {}], ids=str
)
@torch.no_grad()
def test_layers_leave_what_the_kernel_can_not_do_to_vllm(how: dict[str, Any]) -> None:
    layer = new_layer(**how)
    x, residual, _ = random_inputs((64, 64), torch.float32)
    if not how:
        x = x.mT
    found = layer.forward_cpu(x.clone(), residual.clone())
    expected = layer.forward_native(x.clone(), residual.clone())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


X, WEIGHT = torch.ones(4, 64), torch.ones(64)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (X[:, :24], WEIGHT[:24]),
        (X, WEIGHT.bfloat16()),
        (X, None),
        (X.double(), WEIGHT.double()),
        (X, WEIGHT[:1]),
        (X, torch.ones(128)[::2]),
        (X, torch.ones(4, 64)),
    ],
    ids=[
        "a rest", "other weights", "no weights", "float64", "one weight", "weights apart",
        "weights of rows",
    ],
)  # fmt: skip
def test_what_the_kernels_can_not_do_is_left_to_vllms_own_code(
    x: Tensor, weight: Tensor | None
) -> None:
    assert not ir.ops.rms_norm.impls[PROVIDER].supports_args(x, weight, EPSILON)
    of_sum = ir.ops.fused_add_rms_norm.impls[PROVIDER]
    assert not of_sum.supports_args(x, x.clone(), weight, EPSILON)


@pytest.mark.parametrize(
    ("x", "residual"),
    [
        (X, X.bfloat16()),
        (X, X[:1]),
        (X, torch.ones(64, 4).mT),
        (torch.ones(64, 4).mT, X),
    ],
    ids=["another dtype", "one row", "turned", "turned x"],
)
def test_sums_that_the_kernel_can_not_do_are_left_to_vllms_own_code(
    x: Tensor, residual: Tensor
) -> None:
    of_sum = ir.ops.fused_add_rms_norm.impls[PROVIDER]
    assert of_sum.supports_args(X, X.clone(), WEIGHT, EPSILON)
    assert not of_sum.supports_args(x, residual, WEIGHT, EPSILON)


def test_a_part_of_the_row_is_left_to_vllms_own_code() -> None:
    assert not ir.ops.rms_norm.impls[PROVIDER].supports_args(X, WEIGHT, EPSILON, 32)
    of_sum = ir.ops.fused_add_rms_norm.impls[PROVIDER]
    assert not of_sum.supports_args(X, X.clone(), WEIGHT, EPSILON, 32)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (CompilationMode.NONE, [PROVIDER, "native"]),
        (CompilationMode.VLLM_COMPILE, ["native"]),
    ],
    ids=str,
)
def test_compiled_models_keep_the_code_that_they_are_made_of(
    mode: CompilationMode, expected: list[str]
) -> None:
    config = VllmConfig(compilation_config=CompilationConfig(mode=mode))
    found = RoraCpuPlatform.get_default_ir_op_priority(config)
    assert found.rms_norm == found.fused_add_rms_norm == expected
    assert found.gelu_and_mul_sparse == ["native"]
