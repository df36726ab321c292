"""What our routes show of adapters, and to whom."""

import asyncio
from collections.abc import Callable, Mapping

from adapters import NameRecord, ResolvedVersion, Version
from adapters.errors import AdapterNotFoundError
from adapters.receipt import to_json
from rora_serve.api.errors import Refusal, adapter_not_found
from rora_serve.api.front_door import current_tenant
from rora_serve.api.protocol import (
    AdapterCard,
    AdapterDetail,
    AdapterList,
    AliasMove,
    ModuleScaling,
    RankRange,
    Receipt,
    VersionCard,
)
from rora_serve.catalog import Catalog
from rora_serve.models import ModelDirectory
from rora_serve.residency import Residents

# Says why a version is not served, or None; called off the loop.
Quarantine = Callable[[ResolvedVersion], str | None]


def check_visible(name: str) -> None:
    """End the route if the caller may neither use nor manage the adapter, as if there were none."""
    tenant = current_tenant.get()
    if not (tenant.may_use(name) or tenant.may_manage(name)):
        raise Refusal(adapter_not_found(name))


def check_manageable(name: str) -> None:
    """End the route if the caller may not manage the adapter, as if there were none."""
    if not current_tenant.get().may_manage(name):
        raise Refusal(adapter_not_found(name))


class Views:
    """Shows adapters as they are now.

    Args:
        directory: that serves them.
        residents: that are in memory.
        catalog: that describes them.
        quarantine: why one is not served.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        residents: Residents,
        catalog: Catalog,
        quarantine: Quarantine,
    ) -> None:
        self._store = directory.store
        self._residents = residents
        self._catalog = catalog
        self._quarantine = quarantine

    async def listing(self) -> str:
        """Return an AdapterList of all adapters that the caller may see, sorted by name, as JSON.

        Cost: as `AdapterStore.names`; all of it off the loop, since there may be thousands.
        """
        tenant = current_tenant.get()

        def write() -> str:
            cards = [
                self._card(record, self._reasons(record))
                for record in self._store.names()
                if tenant.may_use(record.name) or tenant.may_manage(record.name)
            ]
            return AdapterList(data=cards).model_dump_json()

        return await asyncio.to_thread(write)

    async def record(self, name: str) -> NameRecord:
        """Return what a name holds; without one the route ends."""
        try:
            return await asyncio.to_thread(self._store.record, name)
        except AdapterNotFoundError as error:
            raise Refusal(adapter_not_found(name)) from error

    async def card(self, name: str) -> AdapterCard:
        """Return one adapter."""
        record = await self.record(name)
        return self._card(record, await asyncio.to_thread(self._reasons, record))

    async def detail(self, name: str, wanted: str | None) -> AdapterDetail:
        """Return one adapter with all that is known of one of its versions.

        Args: wanted: alias or digest of the version; None is the latest.
        """
        record = await self.record(name)
        version = record.latest if wanted is None else record.find(wanted)
        events = await asyncio.to_thread(self._store.history, name)
        card = self._card(record, await asyncio.to_thread(self._reasons, record))
        described = await self._catalog.describe(self._store.resolved(name, version))
        return AdapterDetail(
            **dict(card),
            history=[
                AliasMove(
                    at=event.at,
                    alias=event.alias,
                    action=event.action,
                    version=None if event.digest is None else f"sha256:{event.digest}",
                )
                for event in events
            ],
            version=f"sha256:{version.digest}",
            modules=[ModuleScaling(**vars(module)) for module in described.modules],
            receipt=Receipt.model_validate(to_json(described.receipt)),
        )

    def _reasons(self, record: NameRecord) -> dict[str, str | None]:
        """Return why versions are not served. Cost: as `quarantine`, for each."""
        return {
            version.digest: self._quarantine(self._store.resolved(record.name, version))
            for version in record.versions
        }

    def _card(self, record: NameRecord, reasons: Mapping[str, str | None]) -> AdapterCard:
        return AdapterCard(
            name=record.name,
            aliases={alias: f"sha256:{digest}" for alias, digest in record.aliases.items()},
            versions=[
                self._version(record.name, version, reasons[version.digest])
                for version in record.versions
            ],
        )

    def _version(self, name: str, version: Version, reason: str | None) -> VersionCard:
        residency = self._residents.residency(name, version)
        return VersionCard(
            version=f"sha256:{version.digest}",
            weights=f"sha256:{version.weights_digest}",
            added=version.added,
            num_bytes=version.num_bytes,
            rank=RankRange(min=version.min_rank, max=version.max_rank),
            tier=residency.tier,
            is_pinned=residency.is_pinned,
            num_running_requests=residency.num_running,
            quarantine=reason,
        )
