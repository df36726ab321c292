"""A shorter way to the norm of a sum, of which a transformer's layer has two.

vLLM looks through implementations and their arguments at each call: 7.9 us a norm where the kernel
and what has to be looked at take 5.1 (32 rows of SmolLM2-135M).

Import this module only in a worker that runs, without torch.compile: a model that is made from then
on has these layers.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.layernorm import RMSNorm

from rora_serve.engine.norms import supports_sum

_HAS_KERNEL = hasattr(torch.ops._C, "fused_add_rms_norm")


@RMSNorm.register_oot
class ShortRMSNorm(RMSNorm):
    """vLLM's layer, which calls the kernel itself where that does what is asked for."""

    def forward_cpu(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return the norm of x, or of x + residual, and that sum.

        Args: x, residual: [..., hidden_size]; both are written to if there are both.
        """
        if residual is not None and self.pass_weight_add and _HAS_KERNEL:
            weight, epsilon = self.weight, self.variance_epsilon
            if supports_sum(x, residual, weight, epsilon, self.variance_size_override):
                torch.ops._C.fused_add_rms_norm(x, residual, weight, epsilon)
                return x, residual
        return super().forward_cpu(x, residual)  # type: ignore[no-untyped-call]


# By which vLLM's `custom_ops` switches it off.
ShortRMSNorm.name = "rms_norm"  # type: ignore[attr-defined]
