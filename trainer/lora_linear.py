"""LoraLinear: a frozen linear layer with a trained low-rank delta beside it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A frozen linear layer plus scaling * B·A.

    y = base(x) + scaling * (dropout(x) Aᵀ) Bᵀ. A starts Kaiming-uniform with a = √5, B at zero, so
    that training starts from the base model.

    Args:
        base: the frozen layer, [.., in_features] -> [.., out_features].
        in_features, out_features: its sizes.
        rank: rows of A and columns of B.
        scaling: of this module, from adapters.resolve_scalings.
        dropout: probability of dropping an input of A, in training only.
        generator: source of A's initial values, on the CPU.
    Source: LoRA, arXiv 2106.09685; RoRA, arXiv 2501.04315, is the same layer with another scaling.
    Checked against: PEFT's LoraModel, in tests/trainer/test_peft_parity.py.
    """

    def __init__(
        self,
        base: nn.Module,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.dropout = dropout
        device = next(base.parameters()).device
        # Float32 whatever the base model's dtype: a 16-bit weight would round small updates away.
        lora_a = torch.empty(rank, in_features)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, device=device))

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.lora_a.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., out_features] in the dtype of the base layer's output."""
        y: Tensor = self.base(x)
        if self.scaling == 0:  # switched off; 0 times not-a-number would still be that
            return y
        shrunk = F.linear(F.dropout(x.float(), self.dropout, self.training), self.lora_a)
        # Scaling the rank-sized intermediate is the cheapest place.
        return y + F.linear(shrunk * self.scaling, self.lora_b).to(y.dtype)
