"""Functions that stand for operators of vLLM and PyTorch give what these give."""

import importlib
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm._custom_ops  # noqa: F401  (loads vLLM's library)
from torch import Tensor

from rora_serve.engine.threads import Threads
from tests.rora_serve.older_processor import run_compiled_for_avx2

# As rora_serve.engine.worker does: numba must come after vLLM.
instructions = importlib.import_module("rora_serve.engine.instructions")
row_functions = importlib.import_module("rora_serve.engine.row_functions")

if platform.machine() != "x86_64":
    pytest.skip("other processors replay nothing", allow_module_level=True)

OPS: Any = torch.ops
EPSILON = 1e-5
# Sums of a row in another order, of numbers of about 1.
ATOL = 5e-6


def functions(num_threads: int = 2) -> Any:
    return row_functions.RowFunctions(Threads(num_threads), lambda _: None)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 576), (33, 576), (7, 16), (4, 3, 64)], ids=str)
def test_norms_are_vllms(shape: tuple[int, ...], num_threads: int) -> None:
    x, residual, weight = randn(*shape), randn(*shape, seed=1), randn(shape[-1], seed=2)
    expected, found = torch.empty_like(x), torch.full_like(x, torch.nan)
    OPS._C.rms_norm(expected, x, weight, EPSILON)
    assert functions(num_threads).run(OPS._C.rms_norm.default, (found, x, weight, EPSILON))
    assert_close(found, expected)

    theirs, ours = (x.clone(), residual.clone()), (x.clone(), residual.clone())
    OPS._C.fused_add_rms_norm(*theirs, weight, EPSILON)
    operator = OPS._C.fused_add_rms_norm.default
    assert functions(num_threads).run(operator, (*ours, weight, EPSILON))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_heads_are_turned_as_by_vllm(rotary_dim: int, num_threads: int) -> None:
    table = randn(100, rotary_dim)
    positions = torch.tensor([3, 0, 99, 7, 7])
    theirs, ours = (randn(5, 12 * 64) for _ in range(2))  # of q, k and v, one beside the other

    def arguments(rows: Tensor) -> tuple[Any, ...]:
        query, key, _ = rows.split([8 * 64, 2 * 64, 2 * 64], dim=-1)
        return positions, query, key, 64, table, True

    OPS._C.rotary_embedding(*arguments(theirs))
    assert functions(num_threads).run(OPS._C.rotary_embedding.default, arguments(ours))
    assert_close(ours, theirs)


def test_rows_that_lie_apart_are_copied() -> None:
    x = randn(9, 200)[:, 10:142].view(9, 2, 66)
    found = torch.full((9, 2, 66), torch.nan)
    assert functions().copy(found, x)
    assert torch.equal(found, x)


def test_what_there_is_no_code_for_is_left_alone() -> None:
    x, weight, table = randn(3, 64), randn(64), randn(10, 64)
    positions = torch.arange(3)
    norm, rotate = OPS._C.rms_norm.default, OPS._C.rotary_embedding.default
    run = functions().run
    assert not run(OPS.aten.mul.Tensor, (x, x))
    assert not run(norm, (x.clone(), x, None, EPSILON)), "no weight"
    assert not run(norm, (randn(3, 20), randn(3, 20), randn(20), EPSILON)), "no whole vectors"
    assert not run(norm, (x.double(), x.double(), weight.double(), EPSILON)), "another dtype"
    apart = randn(3, 128)[:, :64]
    assert not run(norm, (x.clone(), apart, weight, EPSILON)), "rows lie apart"
    assert not run(rotate, (positions, x, None, 64, table, False)), "neighbours are turned"
    assert not run(rotate, (positions, x, None, 64, table, True, 32)), "not the first numbers"
    assert not run(rotate, (positions, x, None, 64, table, True, 0, True)), "backwards"
    assert not run(rotate, (positions.int(), x, None, 64, table, True)), "other positions"
    assert not run(rotate, (positions, x, None, 64, randn(10, 20), True)), "no whole vectors"
    assert not functions().copy(x.T, x.T), "columns are no rows"


def test_processors_without_avx512_compute_the_same(tmp_path: Path) -> None:
    """Other vectors: once more, compiled for AVX2."""
    if not instructions.HAS_AVX512:
        pytest.skip("the tests above are compiled for AVX2 already")
    run_compiled_for_avx2(__file__, tmp_path)
