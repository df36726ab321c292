"""RaggedLayer: what adapters add to one layer of the base model, each at its own rank."""

from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.artifact import Kind
from adapters.errors import EngineSeamError
from rora_serve.engine.ragged_batch import Groups, Rows, ShortGroups
from rora_serve.engine.slots import Element, Slot

_DTYPES = {Element.F32: torch.float32, Element.F16: torch.float16, Element.BF16: torch.bfloat16}
# What the kernels call the dtypes of a model.
_LIKE = {
    torch.float32: "LIKE_FLOAT32",
    torch.bfloat16: "LIKE_BFLOAT16",
    torch.float16: "LIKE_FLOAT16",
}


class RaggedLayer:
    """Adds the adapters' deltas to the output of one base layer.

    For each group g of rows with adapter a, and each part of the layer that a changes:
    y[g, part] += (scaling * x[g] Aᵀ) Bᵀ, or scaling * A[:, x[g]]ᵀ Bᵀ for an embedding. Other rows
    are never touched.

    Args:
        name: of the layer, for errors.
        index: of the layer among all, as slots count them.
        kind: of layer.
        in_features: columns of A.
        parts: first output column and number of columns of each part.
        kernels: rora_serve.engine.kernels; given, since it can not be imported early.
        scratch: of the kernels, for as many threads as they may use; layers can share it.
    Checked against: tests/reference.py, ragged_delta_loop, and PEFT in a real engine.
    """

    def __init__(
        self,
        name: str,
        index: int,
        kind: Kind,
        *,
        in_features: int,
        parts: tuple[tuple[int, int], ...],
        kernels: ModuleType,
        scratch: NDArray[np.float32],
    ) -> None:
        self.name = name
        self.kind = kind
        self.in_features = in_features
        self.parts = parts
        self._index = index
        self._columns = np.array(parts, np.int64)
        self._kernels = kernels
        self._scratch = scratch

    def add_deltas(self, x: Tensor, y: Tensor, groups: Groups) -> None:
        """Add every group's delta to its rows of `y`, in place.

        Sums are float32 whatever the dtypes, except that the product of many bfloat16 rows with a
        bfloat16 adapter rounds what is between A and B to bfloat16, as PEFT does.

        Args:
            x: [num_rows or more, in_features], or [num_rows or more] tokens for an embedding. The
                layer's input; rows past the step's are padding.
            y: [num_rows or more, out_features]. The layer's output.
        Raises: EngineSeamError: the layer got other rows than the step has, so that they can not be
            told apart.
        """
        if not groups.is_touched[self._index]:
            return  # such layers may see other rows, as those of an image encoder do
        last, width = self.parts[-1]
        fits = (
            x.dim() == (2 if self.kind == "linear" else 1)
            and y.dim() == 2
            and min(x.shape[0], y.shape[0]) >= groups.num_rows
            and y.shape[1] >= last + width  # kernels write where they are told
        )
        if not fits:
            raise EngineSeamError(
                f"{self.name}: input {list(x.shape)} and output {list(y.shape)} for a step of "
                f"{groups.num_rows} rows, [num_rows, in_features] and [num_rows, out_features] are "
                "expected; this model's layers are not served yet"
            )
        if groups.short is not None:
            self._add_short(x, y, groups.short)
        for slot, rows in groups.long:
            if slot.addresses[self._index]:
                self._add_long(x, y, slot, rows)

    def _add_short(self, x: Tensor, y: Tensor, short: ShortGroups) -> None:
        kernels, index = self._kernels, self._index
        groups = (
            short.rows,
            short.starts,
            short.addresses[index],
            short.elements,
            short.ranks[index],
            short.scalings[index],
            self._columns,
            short.shrunk,
            self._scratch,
        )
        result = y if y.stride(-1) == 1 else y.contiguous()
        stride = result.stride(0) * result.element_size()
        output = (result.data_ptr(), stride, getattr(kernels, _LIKE[y.dtype]))
        if self.kind == "embedding":
            kernels.add_embedding(x.long().numpy(), *output, self.in_features, *groups)
        else:
            if x.stride(-1) != 1:
                x = x.contiguous()
            matrices = (x.data_ptr(), x.stride(0) * x.element_size(), *output, self.in_features)
            if len(self._scratch) == 1:
                kernels.add_linear(*matrices, *groups)
            else:
                kernels.add_linear_threaded(*matrices, *groups)
        if result is not y:
            y.copy_(result)

    def _add_long(self, x: Tensor, y: Tensor, slot: Slot, rows: Rows) -> None:
        lora_a, parts = self._factors(slot)
        dtype = x.dtype if x.dtype == lora_a.dtype == torch.bfloat16 else torch.float32
        if self.kind == "embedding":
            shrunk = lora_a[x[rows].long().clamp(0, self.in_features - 1)].to(dtype)
        else:
            shrunk = torch.mm(x[rows].to(dtype), lora_a.to(dtype).t())
        first = 0
        for (column, width), (scaling, lora_b) in zip(self.parts, parts, strict=True):
            rank = lora_b.shape[0]
            if rank:
                of_part = shrunk[:, first : first + rank]
                y_part = y[:, column : column + width]
                if isinstance(rows, slice) and y.dtype == dtype:
                    y_part[rows].addmm_(of_part, lora_b.to(dtype), alpha=scaling)
                else:
                    delta = torch.mm(of_part * scaling, lora_b.to(dtype)).to(y.dtype)
                    index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
                    y_part.index_add_(0, index, delta)
            first += rank

    def _factors(self, slot: Slot) -> tuple[Tensor, list[tuple[float, Tensor]]]:
        """Return A of all parts [sum of ranks, in_features] and, of each part, scaling and Bᵀ."""
        dtype, at = _DTYPES[slot.element], int(slot.offsets[self._index])
        ranks = slot.ranks[self._index].tolist()
        shape = (sum(ranks), self.in_features)

        def piece(shape: tuple[int, int], at: int) -> Tensor:
            count = shape[0] * shape[1]
            if not count:
                return torch.empty(shape, dtype=dtype)
            return torch.frombuffer(slot.memory, dtype=dtype, count=count, offset=at).view(shape)

        lora_a = piece(shape if self.kind == "linear" else shape[::-1], at)
        at += lora_a.nbytes
        parts = []
        for part, (_, width) in enumerate(self.parts):
            lora_b = piece((ranks[part], width), at)
            at += lora_b.nbytes
            parts.append((float(slot.scalings[self._index, part]), lora_b))
        return lora_a, parts


def compile_kernels(kernels: ModuleType, dtype: torch.dtype, scratch: NDArray[np.float32]) -> None:
    """Compile what layers of a model will call, before any request waits for it.

    Args: dtype: that the model computes in.
    Cost: 10 s the first time on a machine, then numba's cache has it.
    """
    factors = np.zeros(2, np.float32)
    x, y = torch.zeros(2, 1, dtype=dtype)[:, None]
    groups = (
        np.zeros(1, np.int64),
        np.array([0, 1]),
        np.array([factors.ctypes.data]),
        np.array([int(Element.F32)]),
        np.ones((1, 1), np.int64),
        np.ones((1, 1), np.float32),
        np.array([[0, 1]]),
        np.zeros((1, 1), np.float32),
        scratch,
    )
    output = (y.data_ptr(), y.element_size(), getattr(kernels, _LIKE[dtype]))
    add_linear = kernels.add_linear if len(scratch) == 1 else kernels.add_linear_threaded
    add_linear(x.data_ptr(), x.element_size(), *output, 1, *groups)
    kernels.add_embedding(np.zeros(1, np.int64), *output, 1, *groups)
