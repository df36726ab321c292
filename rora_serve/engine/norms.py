"""RMSNorm by the compiled kernels that vLLM brings for CPUs and does not use.

vLLM chooses among implementations of an operator by a list of the platform's. On CPUs that has its
PyTorch code only, of eight operations each, though its library has both kernels.

Import this module where vLLM asks a platform for its implementations.
Checked against: vLLM's PyTorch code, tests/rora_serve/test_norms.py.
"""

import torch
import vllm.kernels  # noqa: F401  (loads vLLM's library)
from torch import Tensor
from vllm import ir

PROVIDER = "vllm_cpu"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VECTOR = 16  # numbers that kernels take at a time, at most; they have no code for a rest


def _can_normalize(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    """Tell whether the kernels do what PyTorch's code does. They look at no shape by themselves."""
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and x.dtype in _DTYPES
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
        and x.shape[-1] % _VECTOR == 0
    )


# vLLM compares the signatures of all implementations, and of what tells when they can be used.


def _supports(
    x: Tensor,
    weight: Tensor | None,
    epsilon: float,  # noqa: ARG001
    variance_size: int | None = None,
) -> bool:
    return _can_normalize(x, weight, variance_size)


@ir.ops.rms_norm.register_impl(
    PROVIDER, supports_args=_supports, supported=hasattr(torch.ops._C, "rms_norm")
)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,  # noqa: ARG001
) -> Tensor:
    """Return weight * x / sqrt(mean(x²) + epsilon), by rows.

    Args:
        x: [..., hidden_size].
        weight: [hidden_size], of the same dtype.
    """
    output = torch.empty(x.shape, dtype=x.dtype)
    # Heads of queries lie apart from each other. Were those left to PyTorch's code, one token
    # alone, whose heads do not, would be rounded otherwise than the same one among others.
    torch.ops._C.rms_norm(output, x.contiguous(), weight, epsilon)
    return output


def supports_sum(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,  # noqa: ARG001
    variance_size: int | None = None,
) -> bool:
    """Tell whether `fused_add_rms_norm` does what PyTorch's code does."""
    return (
        _can_normalize(x, weight, variance_size)
        and x_residual.dtype == x.dtype
        and x_residual.shape == x.shape
        and x.is_contiguous()
        and x_residual.is_contiguous()
    )


@ir.ops.fused_add_rms_norm.register_impl(
    PROVIDER,
    supports_args=supports_sum,
    supported=hasattr(torch.ops._C, "fused_add_rms_norm"),
    inplace=True,
)
def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Return the norm of x + x_residual and that sum, both written where these were.

    Args: as of rms_norm; x_residual: of the shape and dtype of x.
    """
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
