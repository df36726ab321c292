"""The optimizer, with state by rank, and its schedule."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from trainer.lora_linear import LoraLinear

Schedule = Literal["cosine", "linear", "constant"]

# About half of what did best in short trainings at ranks 2 to 128, see docs/training.md.
_RATE = 0.01
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class RankAdamW:
    """AdamW whose bias correction counts the steps of each rank, not of each tensor.

    For row i of A and column i of B of a layer, t_i steps after that rank began:
    m <- β1 m + (1 - β1) g,  v <- β2 v + (1 - β2) g²,
    w <- w (1 - lr * decay) - lr * (m / (1 - β1^t_i)) / (sqrt(v / (1 - β2^t_i)) + ε).
    A rank that is added later so starts with the same step size as the first ones had.

    Args:
        layers: by module path; their gradients are read from and their weights changed in place.
        weight_decay: decoupled, on A and B.
    Source: arXiv 1711.05101, algorithm 2; the counting by rank is ours.
    Checked against: torch.optim.AdamW, in tests/trainer/test_optim.py.
    """

    def __init__(self, layers: Mapping[str, LoraLinear], *, weight_decay: float) -> None:
        self.layers = layers
        self.weight_decay = weight_decay
        self.state = {name: _fresh_state(layer) for name, layer in layers.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Change every layer's A and B by their gradients."""
        for name, layer in self.layers.items():
            state = self.state[name]
            num_steps = state["num_steps"].add_(1)
            # In float64, as torch.optim.AdamW has them in Python's numbers.
            correction1 = (1 - _BETA1**num_steps).float()
            correction2 = (1 - _BETA2**num_steps).sqrt().float()
            for weight, side, shape in (
                (layer.lora_a, "a", (-1, 1)),
                (layer.lora_b, "b", (1, -1)),
            ):
                gradient = weight.grad
                assert gradient is not None
                mean, square = state[f"exp_avg_{side}"], state[f"exp_avg_sq_{side}"]
                mean.lerp_(gradient, 1 - _BETA1)
                square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
                size = (square.sqrt() / correction2.view(shape)).add_(_EPSILON)
                if self.weight_decay:
                    weight.mul_(1 - learning_rate * self.weight_decay)
                weight.sub_((mean / correction1.view(shape)).div_(size), alpha=learning_rate)

    @torch.no_grad()
    def resize(
        self,
        name: str,
        kept: Sequence[int],
        num_new: int,
        *,
        scaling: float,
        generator: torch.Generator,
    ) -> None:
        """Resize a layer and the moments with it, as LoraLinear.resize says.

        With B multiplied by c its gradient is divided by c, so its first moment is divided by c and
        its second by c². New ranks begin with zero moments and no steps.
        """
        layer, before = self.layers[name], self.state[name]
        factor = layer.resize(kept, num_new, scaling=scaling, generator=generator)
        state = _fresh_state(layer)
        num_kept, indices = len(kept), list(kept)
        state["exp_avg_a"][:num_kept] = before["exp_avg_a"][indices]
        state["exp_avg_sq_a"][:num_kept] = before["exp_avg_sq_a"][indices]
        state["exp_avg_b"][:, :num_kept] = before["exp_avg_b"][:, indices] / factor
        state["exp_avg_sq_b"][:, :num_kept] = before["exp_avg_sq_b"][:, indices] / factor**2
        state["num_steps"][:num_kept] = before["num_steps"][indices]
        self.state[name] = state


def _fresh_state(layer: LoraLinear) -> dict[str, Tensor]:
    """Return zero moments of A [rank, in] and B [out, rank], and steps taken [rank], float64."""
    return {
        "exp_avg_a": torch.zeros_like(layer.lora_a),
        "exp_avg_sq_a": torch.zeros_like(layer.lora_a),
        "exp_avg_b": torch.zeros_like(layer.lora_b),
        "exp_avg_sq_b": torch.zeros_like(layer.lora_b),
        "num_steps": torch.zeros(layer.rank, dtype=torch.float64, device=layer.lora_a.device),
    }


def default_learning_rate(rank: int, scaling: float) -> float:
    """Return a learning rate that suits a rank: 0.01 / sqrt(scaling * rank).

    A first step of AdamW changes a layer's output in proportion to rate * scaling * rank for a
    sample alone, and to rate * scaling * sqrt(rank) where samples disagree. The best rates that
    were measured lie between.
    Returns: of two significant digits.
    """
    return float(f"{_RATE / math.sqrt(scaling * rank):.1e}")


def learning_rate_factor(
    step: int, *, num_steps: int, warmup_ratio: float, schedule: Schedule
) -> float:
    """Return what multiplies the highest learning rate in `step`, counted from 0.

    Rises linearly to 1 over the first warmup_ratio * num_steps steps, then falls to 0 at
    `num_steps` by half a cosine or a line, or stays.
    """
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0
