"""Laying an adapter's folder out as a slot, proved to be the adapter that its digest names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from adapters import AdapterArtifact, open_artifact
from adapters.digest import read_verified
from rora_serve.engine.pages import new_memory
from rora_serve.engine.slots import Element, Site, Slot, SlotLayout


def lay_out(
    artifact: AdapterArtifact,
    sites: dict[str, Site | None],
    *,
    weights_digest: str,
    num_layers: int,
    num_parts: int,
    make_memory: Callable[[int], memoryview] = new_memory,
) -> tuple[memoryview, Element]:
    """Read an adapter and return its slot's memory, and the dtype of the numbers in it.

    Args:
        artifact: the adapter.
        sites: of its modules in the running model.
        weights_digest: what it has to be.
        num_layers, num_parts: of the running model.
        make_memory: returns memory of as many bytes, for the slot.

    Raises:
        ArtifactError: the file is another than the digest's, or changed while it was read.
        AdapterMismatchError: it does not fit the model.
    Cost: reads the adapter once.
    """
    layout = SlotLayout(artifact.modules, sites, num_layers=num_layers, num_parts=num_parts)
    memory = make_memory(layout.num_bytes)
    layout.fill(read_verified(artifact, weights_digest), np.frombuffer(memory, np.uint8))
    return memory, layout.element


def read_slot(
    folder: Path,
    find_site: Callable[[str], Site | None],
    *,
    weights_digest: str,
    num_layers: int,
    num_parts: int,
) -> Slot:
    """Return an adapter's slot. Raises and cost: as `lay_out`."""
    artifact = open_artifact(folder)
    sites = {name: find_site(name) for name in artifact.modules}
    memory, element = lay_out(
        artifact,
        sites,
        weights_digest=weights_digest,
        num_layers=num_layers,
        num_parts=num_parts,
    )
    return Slot(memory, element=element, num_layers=num_layers, num_parts=num_parts)
