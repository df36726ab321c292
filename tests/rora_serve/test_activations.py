"""SwiGLU's activation in one pass is what it is by its definition, for any numbers."""

import importlib
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul

from rora_serve.engine.threads import Threads
from tests.rora_serve.older_processor import run_compiled_for_avx2

# As rora_serve.engine.worker does: numba must come after vLLM.
activations = importlib.import_module("rora_serve.engine.activations")
instructions = importlib.import_module("rora_serve.engine.instructions")

if platform.machine() != "x86_64":
    pytest.skip("other processors use PyTorch's operators", allow_module_level=True)


def by_definition(x: Tensor) -> Tensor:
    """gate / (1 + e to the power of -gate) * up, in float64."""
    gate, up = x.double().chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


@given(
    num_rows=st.integers(0, 40),
    num_vectors=st.integers(1, 9),
    num_threads=st.sampled_from([1, 2, 3, 7]),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_it_is_what_it_is_by_definition(
    num_rows: int, num_vectors: int, num_threads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = 16 * num_vectors
    wide = 10 * torch.randn(num_rows, 2 * width + 8, generator=generator)
    x = wide[:, 3 : 3 + 2 * width]
    y = activations.Activation(Threads(num_threads))(x)
    # Five roundings, and a power that is within two units of the last place.
    torch.testing.assert_close(y.double(), by_definition(x), rtol=8 * 2**-24, atol=1e-37)


def test_the_largest_and_smallest_numbers_make_no_others() -> None:
    gate = torch.tensor([0.0, -0.0, 1e-30, 88, 1e30, 3e38, -87, -88, -200, -3e38, -1e-30])
    gate = torch.cat([gate, torch.tensor([torch.inf, -torch.inf, torch.nan]), torch.zeros(2)])
    y = activations.Activation(Threads(1))(torch.cat([gate, torch.ones(16)])[None])[0]
    expected = torch.nn.functional.silu(gate)
    assert torch.equal(y[:6], expected[:6])
    torch.testing.assert_close(y[6:11], expected[6:11], rtol=1e-6, atol=1e-35)
    assert y[11] == torch.inf
    assert y[13].isnan()


def test_what_there_is_no_code_for_is_left_to_vllm() -> None:
    with set_current_vllm_config(VllmConfig()):
        layer = SiluAndMul()
    assert isinstance(layer, activations.CompiledSiluAndMul)
    for x in (
        torch.randn(3, 34),
        torch.randn(2, 3, 64),
        torch.randn(64, 3).T,
        torch.randn(3, 64).double(),
        torch.randn(3, 64).bfloat16(),
    ):
        assert activations.Activation(Threads(1))(x) is None
        assert torch.equal(layer.forward_cpu(x), SiluAndMul.forward_native(x))
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer.forward_cpu(x), SiluAndMul.forward_native(x))


def test_processors_without_avx512_compute_the_same(tmp_path: Path) -> None:
    """Other vectors: once more, compiled for AVX2."""
    if not instructions.HAS_AVX512:
        pytest.skip("the tests above are compiled for AVX2 already")
    run_compiled_for_avx2(__file__, tmp_path)
