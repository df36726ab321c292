"""Residents: which versions are in memory, by request of whoever runs the server.

What requests need, rora_serve.models brings in by itself.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from adapters import ResolvedVersion, Version
from adapters.errors import AdapterNotFoundError, ResidencyError
from rora_serve.host_tier import Tier
from rora_serve.models import ModelDirectory

logger = logging.getLogger(__name__)

# Asked before something is changed that took a while to get ready.
IsWanted = Callable[[], Awaitable[bool]]

_UNLOAD_SECONDS = 30.0
_ENDING_SECONDS = 6.0  # in which requests that ended let go of everything


@dataclass(frozen=True)
class Residency:
    """Where a version of a name is, and who needs it under that name.

    Args:
        tier: "slot": in the engine, and requests or pins need it, be it under another name of the
            same weights; "host": in the engine's memory, from where it answers and may make room
            for others; "store": on disk alone. On CPUs a slot is the host's copy.
        is_pinned: under this name.
        num_running: requests that use it or wait for it.
    """

    tier: Tier
    is_pinned: bool
    num_running: int


class Residents:
    """Loads, pins, unloads and removes versions.

    Args:
        directory: that serves them.
        unload_seconds: that an unload waits for running requests.
    """

    def __init__(
        self, directory: ModelDirectory, *, unload_seconds: float = _UNLOAD_SECONDS
    ) -> None:
        self._directory = directory
        self._unload_seconds = unload_seconds
        # Weights by name and version digest: two names may hold one version, and each has its pin.
        self._pins: dict[tuple[str, str], str] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def residency(self, name: str, version: Version) -> Residency:
        """Return where a version is, and who needs it as one of `name`."""
        return Residency(
            self._directory.tier.tier_of(version.weights_digest),
            (name, version.digest) in self._pins,
            self._directory.num_running(name, [version]),
        )

    @asynccontextmanager
    async def serving(self, reference: str) -> AsyncIterator[ResolvedVersion]:
        """Have what `reference` means in the engine while the body of the `with` runs.

        It is brought there, and proven, as its first request would.
        Raises: as `ModelDirectory.open`; AdapterNotFoundError: it is the base model.
        """
        served = await self._directory.open(reference)
        if served is None:
            raise AdapterNotFoundError(f"{reference}: the base model, an adapter is expected")
        try:
            yield served.resolved
        finally:
            self._directory.close(served, was_answered=True)

    async def load(self, reference: str) -> None:
        """Bring what `reference` means into the engine. Raises: as `serving`."""
        async with self.serving(reference):
            pass

    async def move(self, name: str, wanted: str, alias: str, *, is_wanted: IsWanted) -> None:
        """Let an alias of a name mean a version, once the engine has it.

        Args:
            wanted: the version, as after `name@`.
            is_wanted: asked once it has; if not, nothing moves.

        Raises: as `serving`, and as `AdapterStore.set_alias`; AliasMovedError: somebody else moved
            it meanwhile. The alias stays as it was.
        """
        store = self._directory.store
        meant = (await asyncio.to_thread(store.record, name)).aliases.get(alias)
        async with self.serving(f"{name}@{wanted}") as resolved:
            digest = resolved.version.digest
            reference, expected = f"{name}@sha256:{digest}", (meant, digest)
            if await is_wanted():
                await asyncio.to_thread(store.set_alias, reference, alias, instead_of=expected)

    async def roll_back(self, name: str, alias: str, *, is_wanted: IsWanted) -> None:
        """Let an alias mean what it meant before, once the engine has that.

        Args: is_wanted: as in `move`.
        Raises: as `move`, and as `AdapterStore.rollback`; the alias stays as it was.
        """
        store = self._directory.store
        before = await asyncio.to_thread(store.before, name, alias)
        async with self.serving(f"{name}@sha256:{before.digest}"):
            if await is_wanted():
                await asyncio.to_thread(store.rollback, name, alias, to=before.digest)

    async def try_out(self, staged: ResolvedVersion, user: str) -> None:
        """Load a version that has no name yet, as its first request would: what admits an upload.

        Args: user: whose time its chat template takes.
        Raises: as `ModelDirectory.open`; it leaves memory and store as soon as nothing needs it.
        """
        try:
            served = await self._directory.open_version(staged.name, staged, user=user)
        except BaseException:
            self._begin_to_retire([staged.version])
            raise
        self._directory.close(served, was_answered=True)

    async def pin(self, reference: str) -> None:
        """Bring what `reference` means into the engine and keep it there until `unpin`.

        Raises: as `load`; ResidencyError: too much would be pinned.
        """
        async with self.serving(reference) as resolved:
            weights = resolved.version.weights_digest
            pin = (resolved.name, resolved.version.digest)
            if pin not in self._pins:
                self._directory.tier.pin(weights)
                self._pins[pin] = weights

    def unpin(self, name: str, versions: Sequence[Version]) -> None:
        """Let versions of a name go like others; those that it does not pin stay as they are."""
        self._end_pins([(name, version.digest) for version in versions])

    def forget(self, name: str) -> None:
        """End the pins of a name that is gone: somebody removed it from the store beside us."""
        self._end_pins([pin for pin in self._pins if pin[0] == name])

    def _end_pins(self, pins: Sequence[tuple[str, str]]) -> None:
        for pin in pins:
            weights = self._pins.pop(pin, None)
            if weights is not None:
                self._directory.tier.unpin(weights)

    async def unload(self, name: str, versions: Sequence[Version]) -> None:
        """Unpin versions of a name, wait for its requests and free what they take in memory.

        Weights that another name pins or uses stay for it.

        Raises: ResidencyError: requests still use them after `unload_seconds`.
        """
        self.unpin(name, versions)
        weights = {version.weights_digest for version in versions}
        within = self._unload_seconds
        if not self._directory.num_running(name, versions):
            within = min(within, _ENDING_SECONDS)  # what is in use later is so by other names
        tier = self._directory.tier
        await asyncio.gather(*(tier.unload(each, within=within) for each in weights))
        self._check_idle(name, versions)

    async def remove(self, reference: str, *, force: bool) -> None:
        """Remove a name, `name@sha256:…` or an alias from the store, and free what it took.

        Requests that run keep their version; what they use is freed when they end.

        Raises:
            AdapterNotFoundError, StoreConflictError: as `AdapterStore.remove`.
            ResidencyError: without force: requests use it.
        """
        store, tier = self._directory.store, self._directory.tier
        name, at, wanted = reference.partition("@")
        record = await asyncio.to_thread(store.record, name)
        going: Sequence[Version] = () if at else record.versions
        if ":" in wanted:
            going = [record.find(wanted)]
        if not force:
            self._check_idle(name, going)
        # Our own leases are of what is in memory, which says nothing of this name.
        own = self._directory.leases()
        await asyncio.to_thread(store.remove, reference, force=force, besides=own)
        self.unpin(name, going)
        retiring = self._begin_to_retire(going)
        if not any(tier.is_needed(version.weights_digest) for version in going):
            await asyncio.shield(retiring)

    def _check_idle(self, name: str, versions: Sequence[Version]) -> None:
        num_running = self._directory.num_running(name, versions)
        if num_running:
            raise ResidencyError(
                f"adapter {name!r}: {num_running} requests use it, none is expected; try again "
                "when they have ended"
            )

    def _begin_to_retire(self, versions: Sequence[Version]) -> "asyncio.Task[None]":
        retiring = asyncio.create_task(self._retire(versions))
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)
        return retiring

    async def _retire(self, versions: Sequence[Version]) -> None:
        """Free what removed versions take, in memory and on disk, once nothing needs it."""
        for version in versions:
            try:
                await self._directory.tier.unload(version.weights_digest)
                await asyncio.to_thread(self._directory.store.discard, version.digest)
            except Exception:  # nobody waits; what stays is evicted, or collected as garbage
                logger.exception("freeing sha256:%s", version.digest)
