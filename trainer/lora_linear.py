"""LoraLinear: a frozen linear layer with a trained low-rank delta beside it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of a padded batch that are no padding, and how many there are with it, while a forward runs.
_real_rows: ContextVar[tuple[Tensor, int] | None] = ContextVar("real_rows", default=None)


@contextmanager
def only_rows(rows: Tensor | None, num_rows: int) -> Iterator[None]:
    """Let layers multiply these rows alone, of inputs flattened to [num_rows, in_features].

    The others come out as zero, and get and give no gradient: for padding, which nobody sees. An
    input of another size, as some of the tokens that go to an expert, is multiplied whole.
    Args: rows: [num_real], int64; None: all.
    """
    token = _real_rows.set(None if rows is None else (rows, num_rows))
    try:
        yield
    finally:
        _real_rows.reset(token)


_TILE = 8  # ranks that products in 16 bits are rounded up to


class Factors(NamedTuple):
    """A [rank, in_features] and B [out_features, rank] of a layer, float32, and their scaling."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


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
        self.in_features = in_features
        self.out_features = out_features
        self.scaling = scaling
        self.dropout = dropout
        # While importance is measured: [rank] or [num_copies, rank], float32. Each rank's part of
        # the delta is multiplied by it; of an input's rows every copy has an equal share.
        self.gates: Tensor | None = None
        device = next(base.parameters()).device
        # Float32 whatever the base model's dtype: a 16-bit weight would round small updates away.
        self.lora_a = nn.Parameter(self._fresh_rows(rank, generator).to(device))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, device=device))

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.lora_a.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., out_features] in the dtype of the base layer's output."""
        # Switched off, 0 times not-a-number would still be that; or pruned to nothing.
        if self.scaling == 0 or self.rank == 0:
            y: Tensor = self.base(x)
            return y
        # A layer of another class (Conv1D, a quantised one) multiplies in its own way.
        in_own_way = self.dropout and self.training
        if type(self.base) is nn.Linear and not in_own_way:
            weights = (self.base.weight, self.base.bias, self.lora_a, self.lora_b)
            if self.gates is not None:
                return gated_linear(x, *weights, self.scaling, self.gates)
            return lora_linear(x, *weights, self.scaling)
        y = self.base(x)
        dropped = F.dropout(x, self.dropout, self.training)
        shrunk = F.linear(dropped, self.lora_a.to(x.dtype))
        if self.gates is not None:
            shrunk = _gated(shrunk, self.gates)
        # Scaling the rank-sized intermediate is the cheapest place.
        return y + F.linear(shrunk * self.scaling, self.lora_b.to(x.dtype)).to(y.dtype)

    @property
    def factors(self) -> Factors:
        """What is trained, copied."""
        return Factors(self.lora_a.detach().clone(), self.lora_b.detach().clone(), self.scaling)

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Take copies of other factors, of any rank."""
        self.lora_a = nn.Parameter(factors.lora_a.to(self.lora_a.device, copy=True))
        self.lora_b = nn.Parameter(factors.lora_b.to(self.lora_b.device, copy=True))
        self.scaling = factors.scaling

    @torch.no_grad()
    def resize(
        self, kept: Sequence[int], num_new: int, *, scaling: float, generator: torch.Generator
    ) -> float:
        """Keep some ranks and append new ones; what the kept ranks compute stays as it is.

        A new rank begins as the first ones did, A random and B zero, and so changes nothing either.
        Args: kept: indices, in their new order. scaling: from now on; 0 without ranks.
        Returns: what B was multiplied by, old scaling / new scaling.
        """
        factor = self.scaling / scaling if len(kept) else 1.0
        fresh = self._fresh_rows(num_new, generator).to(self.lora_a.device)
        zeros = self.lora_b.new_zeros(self.out_features, num_new)
        lora_a = torch.cat([self.lora_a[list(kept)], fresh])
        lora_b = torch.cat([self.lora_b[:, list(kept)] * factor, zeros], dim=1)
        self.set_factors(Factors(lora_a, lora_b, scaling))
        return factor

    def _fresh_rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Return rows of A before training, [count, in_features]; no rank decides their spread."""
        rows = torch.empty(count, self.in_features)
        if count:
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)
        return rows


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """Return x Wᵀ + bias + scaling * (x Aᵀ) Bᵀ, differentiable in x, A and B, as one operation.

    The delta is added into the product's own memory, forward and backward, and of the intermediate
    values only x and scaling * x Aᵀ are kept.

    Args:
        x: [.., in_features], float32 or 16 bits.
        weight: [out_features, in_features], dtype of x, frozen; bias: [out_features].
        lora_a: [rank, in_features], lora_b: [out_features, rank], any floating dtype; multiplied in
            the dtype of x, their gradients come back in their own.
    Returns: [.., out_features], dtype of x; new.
    Cost: 2 * tokens * (in * out + rank * (in + out)) multiply-adds forward; backward the same for x
        and tokens * rank * (in + out) once more for A and B.
    Checked against: autograd on loops, in tests/trainer/test_lora_linear.py.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows, num_rows = _real_rows.get() or (None, 0)
    rows = rows if num_rows == len(flat) else None
    y: Tensor = _LoraLinearFunction.apply(  # type: ignore[no-untyped-call]
        flat, weight, bias, lora_a, lora_b, scaling, rows
    )
    return y.view(*x.shape[:-1], -1)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gates: Tensor,
) -> Tensor:
    """Return x Wᵀ + bias + scaling * (gates * (x Aᵀ)) Bᵀ, differentiable in x and the gates alone.

    Args: gates: [rank] or [num_copies, rank], float32; of the rows of x every copy has an equal
        share. The others as in `lora_linear`.
    Checked against: the same without gates and B multiplied, in tests/trainer/test_lora_linear.py.
    """
    y: Tensor = _GatedLinearFunction.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), weight, bias, lora_a, lora_b, scaling, gates
    )
    return y.view(*x.shape[:-1], -1)


def _by_copy(shrunk: Tensor, gates: Tensor) -> Tensor:
    """View [.., rank] as [num_copies, rows, rank]."""
    return shrunk.view(len(gates) if gates.dim() > 1 else 1, -1, shrunk.shape[-1])


class _GatedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        gates: Tensor,
    ) -> Tensor:
        shrunk = torch.mm(x, lora_a.to(x.dtype).t()).mul_(scaling)
        y = F.linear(x, weight, bias)
        is_shut = not gates.any()
        if not is_shut:
            y.addmm_(_gated(shrunk, gates), lora_b.to(x.dtype).t())
        ctx.save_for_backward(shrunk, weight, lora_a, lora_b, gates)
        ctx.scaling, ctx.is_shut = scaling, is_shut
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shrunk, weight, lora_a, lora_b, gates = ctx.saved_tensors
        grad_y = gradients[0]
        # In the gated, scaled product x Aᵀ.
        grad_gated = torch.mm(grad_y, lora_b.to(grad_y.dtype))
        slopes = _by_copy(grad_gated.float() * shrunk.float(), gates).sum(dim=1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_y, weight)
            if not ctx.is_shut:
                grad_shrunk = _gated(grad_gated, gates).mul_(ctx.scaling)
                grad_x.addmm_(grad_shrunk, lora_a.to(grad_y.dtype))
        return grad_x, None, None, None, None, None, slopes.view_as(gates)


def _gated(shrunk: Tensor, gates: Tensor) -> Tensor:
    """Return [.., rank] with each rank multiplied by its gate, new; differentiable in both."""
    # In float32, in which the gates' gradients are summed.
    gated = _by_copy(shrunk, gates).float() * gates.view(-1, 1, shrunk.shape[-1])
    return gated.view_as(shrunk).to(shrunk.dtype)


class _LoraLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        rows: Tensor | None,
    ) -> Tensor:
        num_rows = len(x)
        x = x if rows is None else x.index_select(0, rows)
        shrunk = torch.mm(x, _rows_in(x.dtype, lora_a).t()).mul_(scaling)
        y = F.linear(x, weight, bias)
        y.addmm_(shrunk, _rows_in(x.dtype, lora_b.t()))
        ctx.save_for_backward(x, shrunk, weight, lora_a, lora_b, rows)
        ctx.scaling = scaling
        ctx.num_rows = num_rows
        return y if rows is None else _spread(y, rows, num_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, shrunk, weight, lora_a, lora_b, rows = ctx.saved_tensors
        grad_y = gradients[0] if rows is None else gradients[0].index_select(0, rows)
        rank = len(lora_a)
        grad_shrunk = torch.mm(grad_y, _rows_in(x.dtype, lora_b.t()).t()).mul_(ctx.scaling)
        grad_a = torch.mm(grad_shrunk.t(), x)[:rank].to(lora_a.dtype)
        # Transposed after the product: 2.5 times as fast as mm(grad_y.t(), shrunk) on a CPU.
        grad_b = torch.mm(shrunk.t(), grad_y)[:rank].t().to(lora_b.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_y, weight)
            grad_x.addmm_(grad_shrunk, _rows_in(x.dtype, lora_a))
            grad_x = grad_x if rows is None else _spread(grad_x, rows, ctx.num_rows)
        return grad_x, None, None, grad_a, grad_b, None, None


def _rows_in(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """Return [rank, size] in the dtype of a product; a copy has zero rows up to a multiple of 8.

    Products in 16 bits are prepared for each shape anew, which with a rank of its own in every
    module made a step 8 % slower on a CPU; GPUs multiply in tiles of 8.
    """
    if rows.dtype == dtype:
        return rows
    return F.pad(rows.to(dtype), (0, 0, 0, -len(rows) % _TILE))


def _spread(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Return [num_rows, ...] with `values` at `rows` and zeros elsewhere, new."""
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, rows, values)
