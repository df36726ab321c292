"""RaggedLayer: what adapters add to one layer of the base model, each at its own rank."""

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from adapters.artifact import Kind
from adapters.errors import EngineSeamError
from rora_serve.engine.ragged_batch import Groups, RaggedBatch
from rora_serve.engine.slots import Element

if TYPE_CHECKING:
    from rora_serve.engine.kernels import Loop
    from rora_serve.engine.products import Job as ProductJob
    from rora_serve.engine.products import Product

DTYPES = {Element.F32: torch.float32, Element.F16: torch.float16, Element.BF16: torch.bfloat16}


class RaggedLayer:
    """Adds the adapters' deltas to the output of one base layer.

    For each group g of rows with adapter a, and each part of the layer that a changes:
    y[g, part] += scaling * (x[g] Aᵀ) Bᵀ, or scaling * A[:, x[g]]ᵀ Bᵀ for an embedding. Other rows
    are never touched.

    Args:
        name: of the layer, for errors.
        index: of the layer among all, as slots count them.
        kind: of layer.
        in_features: columns of A.
        parts: first output column and number of columns of each part.
        loop: of the model's dtype; layers share it.
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
        loop: "Loop",
    ) -> None:
        self.name = name
        self.kind = kind
        self.in_features = in_features
        self.parts = parts
        self._index = index
        self._columns = np.array(parts, np.int64)
        self._dtype = DTYPES[loop.element]
        self._run = loop.run
        self.function = loop.address
        self._job = loop.new_job()
        self._job_address = ctypes.addressof(self._job)
        self._job.layer = index
        self._job.is_embedding = int(kind == "embedding")
        self._job.in_features = in_features
        self._job.num_parts = len(parts)
        self._job.columns = self._columns.ctypes.data
        self._filled_from = 0
        self._seen: tuple[object, ...] | None = None
        self._is_plain = False
        # In a rehearsal: whether the model called the layer, and why its rows can not be served.
        self.in_rehearsal = False
        self.is_called = False
        self.misfit: str | None = None

    def add_deltas(self, x: Tensor, y: Tensor, groups: Groups) -> None:
        """Add every group's delta to its rows of `y`, in place.

        Sums are float32 whatever the dtypes.

        Args:
            x: [num_rows or more, in_features], or [num_rows or more] tokens for an embedding. The
                layer's input; rows past the step's are padding. Models in Transformers' own code
                have a batch axis of 1 in front of it, and of y.
            y: [num_rows or more, out_features]. The layer's output.
        Raises: EngineSeamError: the layer got other rows than the step has, so that they can not be
            told apart; in a rehearsal `misfit` says so.
        """
        if not self._fill(groups):
            return  # such layers may see other rows, as those of an image encoder do
        job = self._job
        # The compiled loop reads and writes where it is told, as what it is told. Mostly that is as
        # in the step before, and looking twice would cost more than the call.
        seen = (x.shape, x.stride(), x.dtype, y.shape, y.stride(), y.dtype)
        if seen != self._seen:
            if not self._fits(x.shape, y.shape, groups):
                self._refuse(f"input {list(x.shape)} and output {list(y.shape)}", groups)
                return
            self._seen = seen
            is_read = self.kind == "linear" and x.dtype == y.dtype == self._dtype
            self._is_plain = is_read and x.stride(-1) == y.stride(-1) == 1
            if self._is_plain:
                job.x_stride = x.stride(-2) * x.element_size()
                job.y_stride = y.stride(-2) * y.element_size()
        if self._is_plain:
            job.x, job.y = x.data_ptr(), y.data_ptr()
            self._run(self._job_address)
        else:
            self._add_to_a_copy(x, y)

    def can_follow(self, product: "Product") -> bool:
        """Tell whether deltas can be added on the threads of a product, in float32 as it is."""
        last, width = self.parts[-1]
        return (
            self.kind == "linear"
            and self._dtype == torch.float32
            and product.in_features == self.in_features
            and product.out_features >= last + width
        )

    def job_after(self, product: "ProductJob", shape: torch.Size, groups: Groups) -> int:
        """Return the address of the loop's job for a product's rows; 0: no adapter changes them.

        Args:
            product: x and y, as those of add_deltas.
            shape: of x as the layer got it.
        Raises: EngineSeamError: as add_deltas.
        """
        if not self._fill(groups):
            return 0
        if _num_rows(shape, 2) < groups.num_rows:
            self._refuse(f"input {list(shape)}", groups)
            return 0
        job = self._job
        self._seen = None
        job.x, job.x_stride = product.x, product.x_stride
        job.y, job.y_stride = product.y, product.y_stride
        return self._job_address

    def _fill(self, groups: Groups) -> bool:
        """Point the job at a step's rows, unless it is already; tell whether any are ours."""
        if not groups.is_touched[self._index]:
            return False
        tables = groups.tables
        assert tables is not None, "a layer that is touched has rows"
        if tables.number != self._filled_from:
            tables.fill(self._job, self._index)
            self._filled_from = tables.number
            self.is_called = True
            self._seen = None
        return True

    def _fits(self, x: torch.Size, y: torch.Size, groups: Groups) -> bool:
        """Tell whether input and output have the rows of a step, and our columns."""
        last, width = self.parts[-1]
        is_linear = self.kind == "linear"
        num_rows = min(_num_rows(x, 2 if is_linear else 1), _num_rows(y, 2))
        has_columns = y[-1] >= last + width and (not is_linear or x[-1] == self.in_features)
        return num_rows >= groups.num_rows and has_columns

    def _refuse(self, found: str, groups: Groups) -> None:
        features = ", in_features" if self.kind == "linear" else ""
        self.misfit = (
            f"{self.name}: {found} for a step of {groups.num_rows} rows, "
            f"[num_rows{features}] is expected; this layer is not served yet"
        )
        if not self.in_rehearsal:
            raise EngineSeamError(self.misfit)

    def _add_to_a_copy(self, x: Tensor, y: Tensor) -> None:
        """Do it for tokens, for rows whose numbers are no neighbours, and for other dtypes.

        Routers of experts, for one, may answer in float32 where the model computes in bfloat16.
        """
        num_features = x.shape[-1:] if self.kind == "linear" else ()
        x, y = x.reshape(-1, *num_features), y.view(-1, y.shape[-1])
        x = x.to(self._dtype if self.kind == "linear" else torch.int64).contiguous()
        is_read = y.dtype == self._dtype
        result = y.contiguous() if is_read else torch.zeros(y.shape, dtype=self._dtype)
        job = self._job
        job.x, job.x_stride = x.data_ptr(), x.stride(0) * x.element_size()
        job.y, job.y_stride = result.data_ptr(), result.stride(0) * result.element_size()
        self._run(self._job_address)
        if not is_read:
            y += result
        elif result is not y:
            y.copy_(result)


def _num_rows(shape: torch.Size, num_axes: int) -> int:
    """Return the rows of a tensor, maybe behind a batch axis of 1; 0 if it has other axes."""
    if len(shape) == num_axes:
        return shape[0]
    return shape[1] if len(shape) == num_axes + 1 and shape[0] == 1 else 0


class DeltasAfterProduct:
    """What a step's adapters add to a layer's product, on the threads that multiply.

    Args:
        layer: one that can follow the product.
        batch: the rows of steps.
    """

    def __init__(self, layer: RaggedLayer, batch: RaggedBatch) -> None:
        self._layer = layer
        self._batch = batch
        self.function = layer.function

    def job_after(self, product: "ProductJob", shape: torch.Size) -> int:
        """See RaggedLayer.job_after."""
        return self._layer.job_after(product, shape, self._batch.tokens)
