"""RaggedLayer: what adapters add to one linear layer of the base model, each at its own rank."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.errors import EngineSeamError
from rora_serve.engine.ragged_batch import RaggedBatch


@dataclass(frozen=True)
class Factors:
    """One adapter's pair for one part of a layer, unpadded and as stored.

    Args:
        lora_a: [rank, in_features], float32, float16 or bfloat16.
        lora_b: [out_features of the part, rank], the same dtype.
        scaling: multiplies the rank-sized intermediate.
        start: first output column of the part in the layer.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes that the pair takes."""
        return self.lora_a.nbytes + self.lora_b.nbytes


class RaggedLayer:
    """Adds the adapters' deltas to the output of one base layer.

    For each group g of rows with adapter a, and each of a's factors in this layer:
    y[g, start : start + n] += (scaling * x[g] Aᵀ) Bᵀ. Other rows are never touched.

    It hangs on the layer as a forward hook: the layer's own module, names and weights stay as they
        are.

    Args:
        name: of the layer, for errors.
        batch: the step's groups, shared by all layers.
    Checked against: tests/reference.py, ragged_delta_loop, and PEFT in a real engine.
    """

    def __init__(self, name: str, layer: nn.Module, batch: RaggedBatch) -> None:
        self.name = name
        self.slots: dict[int, tuple[Factors, ...]] = {}
        self._batch = batch
        layer.register_forward_hook(self._add_deltas)

    def _add_deltas(self, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # Layers that no adapter touches may see other rows, as those of an image encoder do.
        if not self._batch.groups or not self.slots:
            return
        y = output[0] if isinstance(output, tuple) else output  # some layers return (output, bias)
        add_deltas(inputs[0], y, self._batch, self.slots, layer_name=self.name)


def add_deltas(
    x: Tensor,
    y: Tensor,
    batch: RaggedBatch,
    slots: dict[int, tuple[Factors, ...]],
    *,
    layer_name: str,
) -> None:
    """Add every adapter's delta to its rows of `y`, in place.

    Computes in float32 whatever the dtypes, as PEFT does on a CPU.

    Args:
        x: [num_rows or more, in_features]. The layer's input; rows past the batch are padding.
        y: [num_rows or more, out_features]. The layer's output.
        slots: factors by lora_int_id.
    Raises: EngineSeamError: the layer got fewer rows than the step has, so that rows can not be
        told.
    """
    if x.dim() != 2 or x.shape[0] < batch.num_rows:
        raise EngineSeamError(
            f"{layer_name}: input {list(x.shape)} for a step of {batch.num_rows} rows, "
            "[num_rows, in_features] is expected; this model's layers are not served yet"
        )
    for lora_int_id, rows in batch.groups:
        factors_of_adapter = slots.get(lora_int_id)
        if not factors_of_adapter:
            continue
        group = x[rows].float()
        for factors in factors_of_adapter:
            shrunk = F.linear(group, factors.lora_a.float()) * factors.scaling
            delta = F.linear(shrunk, factors.lora_b.float())
            columns = slice(factors.start, factors.start + delta.shape[1])
            y[rows, columns] += delta.to(y.dtype)
