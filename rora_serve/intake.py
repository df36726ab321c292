"""Intake: adapters that somebody sends, from their arrival in the store's folder to their name.

Received, unpacked, examined by every rule, matched with the base model, admitted, and only then
named: whatever refuses one leaves the store as it was.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters import AdapterStore, ResolvedVersion
from adapters.errors import AdapterNameError, RoraError
from adapters.examination import Examined
from adapters.names import check_alias, check_name
from adapters.objects import Incoming
from adapters.receipt import BaseShapes
from adapters.sources import unpack
from adapters.writer import sync_files, write_error
from rora_serve.catalog import Catalog, Description, describe_fitting
from rora_serve.side_process import SideProcess

# Refuses a version that is stored and has no name yet, by an error whose text clients may see.
Admit = Callable[[ResolvedVersion, str], Awaitable[None]]  # the latter for whom


@dataclass(frozen=True)
class Arrival:
    """An adapter that keeps every rule and fits the base model."""

    examined: Examined
    description: Description


class Intake:
    """Takes adapters into a store.

    Args:
        store: that gets them.
        base: layers of the base model that runs.
        base_names: what requests call it, and so no adapter.
        catalog: which is told what was found.
        process: where they are read.
        import_folders: below which administrators may name an adapter's folder.
        admit: asked last, or None.
    """

    def __init__(
        self,
        store: AdapterStore,
        base: BaseShapes,
        catalog: Catalog,
        process: SideProcess,
        *,
        base_names: Sequence[str],
        import_folders: Sequence[Path] = (),
        admit: Admit | None = None,
    ) -> None:
        self.store = store
        self._base = base
        self._catalog = catalog
        self._process = process
        self._base_names = base_names
        self._import_folders = [folder.resolve() for folder in import_folders]
        self._admit = admit

    def check_name(self, name: str, alias: str) -> None:
        """See that an adapter may have this name and alias.

        Raises: AdapterNameError: a name or alias against the grammar, or the base model's name.
        """
        check_name(name)
        check_alias(alias)
        if name in self._base_names:
            raise AdapterNameError(
                f"adapter name {name!r}: it is the base model's; choose another one"
            )

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[Incoming]:
        """Yield a folder of the store's for what is sent; what is there at the end is deleted.

        Raises: StoreError: the store can not be written.
        """
        incoming = await asyncio.to_thread(self.store.incoming)
        try:
            yield incoming
        except RoraError:
            raise
        except OSError as error:
            advice = "make room, or name a folder that is yours"
            raise write_error(self.store.root, error, advice=advice) from error
        finally:
            await asyncio.to_thread(incoming.close)

    async def unpack(self, archive: Path, name: str) -> Path:
        """Unpack an archive beside itself and delete it; return the adapter's folder.

        Raises: ArtifactError: it breaks a rule; StoreError: it can not be written.
        """
        return await self._process.run(name, _unpack, archive)

    async def take(self, folder: Path, name: str, alias: str, *, user: str) -> ResolvedVersion:
        """Let `name` and `alias` of it mean the adapter in `folder`, if nothing refuses it.

        Args:
            folder: below one of `receiving`, which loses it.
            user: who sent it, whose time trying it out is.

        Raises:
            AdapterNameError: as `check_name`.
            ArtifactError: every rule that it breaks.
            AdapterMismatchError: every module that does not fit the base; or what `admit` said.
            StoreError: the store can not be written.
        Cost: reads the adapter three times, in another process.
        """
        self.check_name(name, alias)
        return await self.accept(await self.examine(folder, name), name, alias, user=user)

    async def examine(self, folder: Path, name: str) -> Arrival:
        """Return what an adapter is, if it keeps every rule and fits: the first half of `take`.

        Raises: ArtifactError, AdapterMismatchError: as `take`.
        """
        job = (self.store.root, folder, self._base)
        return await self._process.run(name, _examine, *job)

    async def accept(
        self, arrival: Arrival, name: str, alias: str, *, user: str
    ) -> ResolvedVersion:
        """Admit what was examined, and name it: the second half of `take`.

        Raises: AdapterMismatchError, StoreError: as `take`.
        """
        examined = arrival.examined
        staged, lease = await asyncio.to_thread(self.store.stage, examined, name)
        try:
            if self._admit is not None:
                await self._admit(staged, user)
            published = await asyncio.to_thread(self.store.publish, staged, alias)
        except BaseException:
            await asyncio.to_thread(lease.release)
            await asyncio.to_thread(self.store.discard, examined.version.digest)
            raise
        await asyncio.to_thread(lease.release)
        self._catalog.keep(examined.version.digest, arrival.description)
        return published

    def importable(self, path: str) -> Path | None:
        """Return the folder that `path` means if it lies below an import folder, links followed.

        Cost: looks at the disk.
        """
        try:
            folder = Path(path).resolve(strict=True)
            is_inside = any(folder.is_relative_to(root) for root in self._import_folders)
            return folder if is_inside and folder.is_dir() else None
        except (OSError, ValueError, RuntimeError):  # none such, no path, or links in a circle
            return None


def _unpack(archive: Path) -> Path:
    target = archive.with_name("unpacked")
    target.mkdir()
    folder = unpack(archive, target)
    archive.unlink()
    return folder


def _examine(root: Path, folder: Path, base: BaseShapes) -> Arrival:
    sync_files(folder)
    examined = AdapterStore(root).examine(folder, given="adapter")
    return Arrival(examined, describe_fitting(folder, base))
