"""Which adapter a request's `model` means, as the engine knows it.

Owns the map from weights digests to vLLM's integer ids and the loading of each adapter once. Knows
neither HTTP nor vLLM's classes, so that all of it can be tested without an engine.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters import AdapterStore, ResolvedVersion
from adapters.digest import base_claim, read_chat_template
from adapters.errors import AdapterMismatchError, AdapterNameError, ArtifactError, StoreError
from adapters.objects import Lease
from adapters.store import verify

logger = logging.getLogger(__name__)

# (lora_int_id, folder) -> {"num_bytes": n} or {"error": text}, from the worker.
LoadInEngine = Callable[[int, str], Awaitable[dict[str, object]]]


@dataclass(frozen=True)
class ServedAdapter:
    """A request's adapter, resolved once and for the whole request.

    Args:
        requested: what stood in `model`; responses echo it.
        resolved: the version that this meant when the request came.
        lora_int_id: the engine's id of its weights.
    """

    requested: str
    resolved: ResolvedVersion
    lora_int_id: int

    @property
    def engine_name(self) -> str:
        """Identity in engine and prefix cache: the weights digest, so that no swap is stale."""
        return self.resolved.version.weights_digest

    @property
    def folder(self) -> str:
        """Where the engine reads it."""
        return str(self.resolved.folder)


@dataclass(frozen=True)
class ServedBase:
    """The base model that runs.

    Args:
        names: what requests call it; the first is its name.
        fingerprint: of its weights, from adapters.base_model.
        chat_template: its own, or None.
    """

    names: tuple[str, ...]
    fingerprint: str
    chat_template: str | None

    def mismatch(self, folder: Path) -> str | None:
        """Say why an adapter can not be served beside this base, as far as its folder tells."""
        template = read_chat_template(folder)
        if template is not None:
            text = template.decode(errors="replace")
            if text.strip() != (self.chat_template or "").strip():
                return "it has a chat template of its own, which is not served yet"
        claim = base_claim(folder)
        if claim is not None and claim.is_of_another(self.fingerprint, self.names):
            return f"it was trained on {claim.name!r}, this is {self.names[0]!r}"
        return None


def check_names(base_names: Sequence[str], store: AdapterStore) -> None:
    """Refuse a store in which an adapter has a base model's name.

    Raises: AdapterNameError: it has.
    """
    for record in store.names():
        if record.name in base_names:
            raise AdapterNameError(
                f"{store.root}: an adapter is named {record.name!r} like the base model; "
                "store it under another name or serve the base with --served-model-name"
            )


class ModelDirectory:
    """Resolves `model` against base names and the store, and loads adapters on first use.

    Args:
        base: the base model that runs.
        store: where adapters lie.
        load_in_engine: asks the worker to load an adapter.
    """

    def __init__(self, base: ServedBase, store: AdapterStore, load_in_engine: LoadInEngine) -> None:
        self.base_names = base.names
        self.store = store
        self._base = base
        self._load_in_engine = load_in_engine
        self._ids: dict[str, int] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        # Of the versions that fit, by digest; None where the store can not be written.
        self._leases: dict[str, Lease | None] = {}

    async def open(self, model: str) -> ServedAdapter | None:
        """Return the adapter that `model` means, loaded in the engine; None is the base model.

        Requests that come while it loads wait for the same load.

        Raises:
            AdapterNotFoundError: neither a base name nor an adapter.
            AdapterMismatchError: the adapter can not be served by this base model.
        """
        if model in self.base_names:
            return None
        # Reading a name is one small file; it may still wait for a slow disk.
        resolved = await asyncio.to_thread(self.store.resolve, model)
        weights = resolved.version.weights_digest
        served = ServedAdapter(model, resolved, self._ids.setdefault(weights, len(self._ids) + 1))
        # Of each version: two of them may share weights and differ in their templates.
        digest = resolved.version.digest
        if digest not in self._leases:
            await asyncio.to_thread(self._admit, resolved)
        load = self._loads.get(weights)
        if load is None:
            load = asyncio.create_task(self._load(served))
            self._loads[weights] = load
        # One client that hangs up must not cancel the load that others wait for.
        await asyncio.shield(load)
        return served

    def _admit(self, resolved: ResolvedVersion) -> None:
        """Check a version, and keep it from garbage collection while this process runs."""
        lease = self._lease(resolved)
        try:
            self._check_version(resolved)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        known = self._leases.setdefault(resolved.version.digest, lease)
        if known is not lease and lease is not None:  # two first requests at once
            lease.release()

    def _lease(self, resolved: ResolvedVersion) -> Lease | None:
        try:
            return self.store.lease(resolved)
        except StoreError as error:
            # A store that is mounted to be read: whoever writes it has to know what runs.
            logger.warning("no lease on %s: %s", resolved.public_id, error)
            return None

    def _check_version(self, resolved: ResolvedVersion) -> None:
        """Refuse a version that is for something else, or is no longer what was stored."""
        try:
            reason = self._base.mismatch(resolved.folder)
            if reason is None:
                verify(resolved)
        except ArtifactError as error:
            reason = _without_place(str(error), resolved.folder)
        if reason is not None:
            raise AdapterMismatchError(f"{resolved.public_id}: {reason}")

    async def _load(self, served: ServedAdapter) -> None:
        weights = served.engine_name
        folder = served.resolved.folder
        try:
            outcome = await self._load_in_engine(served.lora_int_id, served.folder)
        except BaseException:
            del self._loads[weights]  # the next request tries again
            raise
        if "error" in outcome:
            del self._loads[weights]
            reason = _without_place(str(outcome["error"]), folder)
            raise AdapterMismatchError(f"{served.resolved.public_id}: {reason}")


def _without_place(text: str, folder: Path) -> str:
    """Return an error's text as clients may see it: where the store lies is not their business."""
    return text.replace(f"{folder}/", "").replace(str(folder), "the adapter")
