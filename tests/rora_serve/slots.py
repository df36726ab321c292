"""Slots without adapter folders, for tests."""

from collections.abc import Mapping

import numpy as np

from adapters import LoraModule
from adapters.artifact import Kind
from adapters.header import TensorInfo
from adapters.tensors import NUMPY_DTYPES, Array
from rora_serve.engine.pages import new_memory
from rora_serve.engine.slots import Site, Slot, SlotLayout

_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def make_slot(
    factors: Mapping[tuple[int, int], tuple[Array, Array, float]],
    *,
    num_layers: int,
    num_parts: int,
    kind: Kind = "linear",
) -> Slot:
    """factors: A, B and scaling by layer and part."""
    modules, sites, tensors = {}, {}, []
    for (layer, part), (a, b, scaling) in factors.items():
        name = f"{layer}.{part}"
        module = LoraModule(name, kind, a.shape[0], 1.0, scaling, _info(a), _info(b))
        modules[name] = module
        sites[name] = Site(layer, part, kind, a.shape[1], b.shape[0])
        tensors += [(module, module.lora_a, a), (module, module.lora_b, b)]
    layout = SlotLayout(modules, sites, num_layers=num_layers, num_parts=num_parts)
    memory = new_memory(layout.num_bytes)
    layout.fill(iter(tensors), np.frombuffer(memory, np.uint8))
    return Slot(memory, element=layout.element, num_layers=num_layers, num_parts=num_parts)


def _info(array: Array) -> TensorInfo:
    return TensorInfo("", _NAMES[array.dtype], array.shape, 0, array.nbytes)
