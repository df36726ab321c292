"""Slots: an adapter in one piece of memory, as the layers read it, at each module's real rank.

    offsets   int64 [num_layers], of each layer's block from the slot's start; 0: not touched
    ranks     int64 [num_layers, num_parts]
    scalings  float32 [num_layers, num_parts]
    blocks    one a touched layer, 64 bytes aligned: A of its parts one below the other, [sum of
              ranks, in_features]; then Bᵀ of each part, in panels of 64 columns, [rank, 64] each,
              the last one narrower. An embedding's A is transposed, [vocabulary, rank], so that a
              token's numbers are neighbours.

A slot is the host's copy of an adapter and the only one: what the loader laid out is what layers
read. Nothing is padded to another rank, and numbers stay in the dtype in which they were stored.
"""

from collections.abc import Iterator, Mapping
from enum import IntEnum
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapters import LoraModule
from adapters.artifact import Kind, served_dtype
from adapters.errors import AdapterMismatchError
from adapters.header import TensorInfo
from adapters.limits import MAX_LORA_RANK
from adapters.tensors import NUMPY_DTYPES, Array
from rora_serve.engine.pages import new_memory

PANEL = 64  # columns of Bᵀ that layers add up at a time, and therefore lie together
_ALIGNMENT = 64  # bytes of a cache line
_SHOWN_MISMATCHES = 5


class Element(IntEnum):
    """The dtype of a slot's numbers; names are those of safetensors."""

    F32 = 0
    F16 = 1
    BF16 = 2

    @property
    def num_bytes(self) -> int:
        """Bytes of one number."""
        return 4 if self is Element.F32 else 2


class Site(NamedTuple):
    """A place in the running model that an adapter's module can match.

    Args:
        layer: index of the layer that holds it.
        part: which of the layer's parts it is; a fused layer has several.
        kind: of module.
        in_features, out_features: of the module; an embedding's are vocabulary and hidden size.
    """

    layer: int
    part: int
    kind: Kind
    in_features: int
    out_features: int


class SlotLayout:
    """Where everything of an adapter lies in its slot.

    Args:
        modules: of the adapter, by name.
        sites: where each of them goes; None for a module that the model lacks.
        num_layers, num_parts: of the running model; parts of the layer that has most.
    Raises: AdapterMismatchError: a module without a place, of other sizes or of a rank above 512;
        all are named.
    """

    def __init__(
        self,
        modules: Mapping[str, LoraModule],
        sites: Mapping[str, Site | None],
        *,
        num_layers: int,
        num_parts: int,
    ) -> None:
        placed = _placed(modules, sites)
        self.element = Element[served_dtype(modules.values())]
        self.offsets = np.zeros(num_layers, np.int64)
        self.ranks = np.zeros((num_layers, num_parts), np.int64)
        self.scalings = np.zeros((num_layers, num_parts), np.float32)
        self._places: dict[str, tuple[Site, int, int]] = {}
        end = self._tables_bytes
        size = self.element.num_bytes
        ordered = sorted(placed, key=lambda pair: (pair[1].layer, pair[1].part))
        for layer, pairs in groupby(ordered, key=lambda pair: pair[1].layer):
            of_layer = list(pairs)
            begin = _aligned(end)
            self.offsets[layer] = begin
            at_a = begin
            at_b = begin + size * sum(m.rank * site.in_features for m, site in of_layer)
            for module, site in of_layer:
                self.ranks[layer, site.part] = module.rank
                self.scalings[layer, site.part] = module.scaling
                self._places[module.name] = (site, at_a, at_b)
                at_a += size * module.rank * site.in_features
                at_b += size * module.rank * site.out_features
            end = at_b
        self.num_bytes = end

    @property
    def _tables_bytes(self) -> int:
        return self.offsets.nbytes + self.ranks.nbytes + self.scalings.nbytes

    def fill(
        self, tensors: Iterator[tuple[LoraModule, TensorInfo, Array]], memory: NDArray[np.uint8]
    ) -> None:
        """Write tables and factors.

        Args:
            tensors: modules, which of their tensors, and the factor as stored.
            memory: [num_bytes], what the slot is laid out in.
        Cost: one pass over the adapter.
        """
        at = 0
        for table in (self.offsets, self.ranks, self.scalings):
            memory[at : at + table.nbytes] = table.reshape(-1).view(np.uint8)
            at += table.nbytes
        dtype = NUMPY_DTYPES[self.element.name]
        for module, tensor, factor in tensors:
            site, at_a, at_b = self._places[module.name]
            is_a = tensor is module.lora_a
            begin = at_a if is_a else at_b
            numbers = _plain(factor.astype(dtype, copy=False))
            piece = memory[begin : begin + numbers.nbytes].view(numbers.dtype)
            if not is_a:
                _copy_in_panels(numbers, piece)
            elif site.kind == "embedding":
                np.copyto(piece.reshape(factor.shape[::-1]), numbers.T)
            else:
                np.copyto(piece.reshape(factor.shape), numbers)


class Slot:
    """An adapter that layers can read.

    Args:
        memory: what a SlotLayout filled; read, never written.
        element: dtype of its numbers.
        num_layers, num_parts: of the running model.
    """

    def __init__(
        self, memory: memoryview, *, element: Element, num_layers: int, num_parts: int
    ) -> None:
        self.memory = memory
        self.element = element
        offsets = np.frombuffer(memory, np.int64, num_layers)
        at = offsets.nbytes
        self.ranks = np.frombuffer(memory, np.int64, num_layers * num_parts, at)
        at += self.ranks.nbytes
        self.scalings = np.frombuffer(memory, np.float32, num_layers * num_parts, at)
        self.ranks = self.ranks.reshape(num_layers, num_parts)
        self.scalings = self.scalings.reshape(num_layers, num_parts)
        self.offsets = offsets
        start = offsets.ctypes.data
        self.addresses = np.where(offsets > 0, offsets + start, 0)


def empty_slot(num_layers: int, num_parts: int) -> Slot:
    """Return a slot that touches every layer of the running model, at rank 0: it adds nothing."""
    layout = SlotLayout({}, {}, num_layers=num_layers, num_parts=num_parts)
    layout.offsets.fill(layout.num_bytes)
    memory = new_memory(layout.num_bytes)
    layout.fill(iter(()), np.frombuffer(memory, np.uint8))
    return Slot(memory, element=layout.element, num_layers=num_layers, num_parts=num_parts)


def _copy_in_panels(b: Array, piece: Array) -> None:
    """Write B, [out_features, rank], as panels of Bᵀ."""
    out_features, rank = b.shape
    whole = out_features // PANEL * PANEL
    panels = piece[: whole * rank].reshape(-1, rank, PANEL)
    np.copyto(panels, b[:whole].reshape(-1, PANEL, rank).transpose(0, 2, 1))
    np.copyto(piece[whole * rank :].reshape(rank, out_features - whole), b[whole:].T)


def _placed(
    modules: Mapping[str, LoraModule], sites: Mapping[str, Site | None]
) -> list[tuple[LoraModule, Site]]:
    placed, problems = [], []
    taken: dict[tuple[int, int], str] = {}
    for name, module in modules.items():
        site = sites.get(name)
        problem = _mismatch(module, site)
        if problem is None and site is not None:
            other = taken.setdefault((site.layer, site.part), name)
            if other != name:
                problem = f"the base model has one place for it and {other}"
        if problem is not None:
            problems.append(f"{name}: {problem}")
        elif site is not None:
            placed.append((module, site))
    if problems:
        shown = "; ".join(problems[:_SHOWN_MISMATCHES])
        others = len(problems) - _SHOWN_MISMATCHES
        more = f"; and {others} more modules" if others > 0 else ""
        raise AdapterMismatchError(f"the adapter does not fit the base model: {shown}{more}")
    return placed


def _mismatch(module: LoraModule, site: Site | None) -> str | None:
    layer = "linear layer" if module.kind == "linear" else "embedding"
    if site is None or site.kind != module.kind:
        return f"the base model has no such {layer} that its engine can serve"
    if (module.in_features, module.out_features) != (site.in_features, site.out_features):
        return (
            f"the adapter is for [{module.out_features}, {module.in_features}], the base model has "
            f"[{site.out_features}, {site.in_features}]"
        )
    if module.rank > MAX_LORA_RANK:
        return f"rank {module.rank}, at most {MAX_LORA_RANK} is served"
    return None


def _plain(factor: Array) -> Array:
    """Return numbers of ml_dtypes as bits, which numpy copies ten times as fast."""
    return factor.view(np.uint16) if factor.dtype.itemsize == 2 else factor


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
