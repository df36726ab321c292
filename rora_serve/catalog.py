"""Catalog: what a version of an adapter holds, and what of it matches the base model.

Both are read from its files, once per version, and kept.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from adapters import ResolvedVersion, open_artifact
from adapters.errors import AdapterMismatchError, ArtifactError
from adapters.problems import refusal
from adapters.receipt import BaseShapes, Receipt, receipt
from rora_serve.side_process import SideProcess

_MAX_KEPT = 256  # descriptions; each takes tens of kilobytes, by the base's number of modules


@dataclass(frozen=True)
class ModuleScale:
    """How one module of an adapter is scaled."""

    name: str
    rank: int
    alpha: float
    scaling: float


@dataclass(frozen=True)
class Description:
    """What the files of a version say; of a folder that breaks the format, only what is broken."""

    modules: tuple[ModuleScale, ...]
    receipt: Receipt


def describe(folder: Path, base: BaseShapes) -> Description:
    """Return what an adapter folder holds and what of it matches `base`.

    Cost: reads every tensor once.
    """
    try:
        artifact = open_artifact(folder)
        found = receipt(artifact, base)
    except ArtifactError as error:
        problems = error.problems
        return Description((), Receipt(folder, base.name, base.fingerprint, None, (), problems, ()))
    modules = artifact.modules.values()
    return Description(
        tuple(ModuleScale(m.name, m.rank, m.alpha, m.scaling) for m in modules), found
    )


def describe_fitting(folder: Path, base: BaseShapes) -> Description:
    """Return what an adapter folder holds, all of which fits `base`.

    Raises: AdapterMismatchError: every module that does not, or another base; or a broken format.
    Cost: as `describe`.
    """
    description = describe(folder, base)
    problems = description.receipt.problems
    if problems:
        raise refusal(AdapterMismatchError, f"adapter on base model {base.name}", problems)
    return description


class Catalog:
    """Describes versions.

    Args:
        base: layers of the base model that runs.
        process: where files are read.
    """

    def __init__(self, base: BaseShapes, process: SideProcess) -> None:
        self._base = base
        self._process = process
        self._kept: OrderedDict[str, Description] = OrderedDict()  # least recently used first
        self._reading = asyncio.Lock()

    def keep(self, digest: str, description: Description) -> None:
        """Remember what a version holds for good; one that was damaged may be mended."""
        if not description.modules:
            return
        self._kept[digest] = description
        self._kept.move_to_end(digest)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)

    async def describe(self, resolved: ResolvedVersion) -> Description:
        """Return what a version holds.

        Cost: reads every tensor once, in another process, unless it was asked for lately.
        """
        digest = resolved.version.digest
        if digest not in self._kept:
            async with self._reading:  # two who ask at once read once
                if digest not in self._kept:
                    job = (resolved.folder, self._base)
                    found = await self._process.run(resolved.public_id, describe, *job)
                    self.keep(digest, found)
                    return found
        self._kept.move_to_end(digest)
        return self._kept[digest]
