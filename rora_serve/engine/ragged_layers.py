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
        self._job.is_embedding = int(kind == "embedding")
        self._job.in_features = in_features
        self._job.num_parts = len(parts)
        self._job.columns = self._columns.ctypes.data
        self._filled_from = 0
        self._seen: tuple[object, ...] | None = None
        self._is_plain = False

    def add_deltas(self, x: Tensor, y: Tensor, groups: Groups) -> None:
        """Add every group's delta to its rows of `y`, in place.

        Sums are float32 whatever the dtypes.

        Args:
            x: [num_rows or more, in_features], or [num_rows or more] tokens for an embedding. The
                layer's input; rows past the step's are padding.
            y: [num_rows or more, out_features]. The layer's output.
        Raises: EngineSeamError: the layer got other rows than the step has, so that they can not be
            told apart.
        """
        if not self._fill(groups):
            return  # such layers may see other rows, as those of an image encoder do
        job = self._job
        # The compiled loop reads and writes where it is told, as what it is told. Mostly that is as
        # in the step before, and looking twice would cost more than the call.
        seen = (x.shape, x.stride(), x.dtype, y.shape, y.stride(), y.dtype)
        if seen != self._seen:
            self._check(x, y, groups)
            self._seen = seen
            is_read = self.kind == "linear" and x.dtype == y.dtype == self._dtype
            self._is_plain = is_read and x.stride(-1) == y.stride(-1) == 1
            job.x_stride = x.stride(0) * x.element_size()
            job.y_stride = y.stride(0) * y.element_size()
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
        if len(shape) != 2 or product.num_rows < groups.num_rows:
            raise EngineSeamError(
                f"{self.name}: input {list(shape)} for a step of {groups.num_rows} rows, "
                "[num_rows, in_features] is expected; this model's layers are not served yet"
            )
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
            self._seen = None
        return True

    def _check(self, x: Tensor, y: Tensor, groups: Groups) -> None:
        last, width = self.parts[-1]
        is_linear = self.kind == "linear"
        fits = (
            x.dim() == (2 if is_linear else 1)
            and y.dim() == 2
            and min(x.shape[0], y.shape[0]) >= groups.num_rows
            and y.shape[1] >= last + width
            and (not is_linear or x.shape[1] == self.in_features)
        )
        if not fits:
            raise EngineSeamError(
                f"{self.name}: input {list(x.shape)} and output {list(y.shape)} for a step of "
                f"{groups.num_rows} rows, [num_rows, in_features] and [num_rows, out_features] are "
                "expected; this model's layers are not served yet"
            )

    def _add_to_a_copy(self, x: Tensor, y: Tensor) -> None:
        """Do it for tokens, for rows whose numbers are no neighbours, and for other dtypes.

        Routers of experts, for one, may answer in float32 where the model computes in bfloat16.
        """
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
