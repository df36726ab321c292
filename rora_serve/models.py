"""Which adapter a request's `model` means, as the engine knows it.

Owns the map from weights digests to vLLM's integer ids, the check of each version and the leases of
requests. Knows neither HTTP nor vLLM's classes, so that all of it can be tested without an engine.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from adapters import AdapterStore, ResolvedVersion, Version
from adapters.base_model import chat_template
from adapters.digest import CHANGED, base_claim, read_chat_template, version_digest
from adapters.errors import (
    AdapterMismatchError,
    AdapterNameError,
    ArtifactError,
    QuarantinedError,
    StoreError,
)
from adapters.objects import Lease
from adapters.receipt import BaseShapes, read_base_shapes
from rora_serve.chat_templates import ChatTemplate, TemplateProcess
from rora_serve.host_tier import HostTier
from rora_serve.probing import Prober

logger = logging.getLogger(__name__)

# A request whose client hung up keeps its adapter this long; vLLM takes milliseconds to give it up.
_ABORT_SECONDS = 5.0
_READING_THREADS = 4

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServedAdapter:
    """A request's adapter, resolved once and for the whole request.

    Args:
        requested: what stood in `model`; responses echo it.
        resolved: the version that this meant when the request came.
        lora_int_id: the engine's id of its weights.
        chat_template: the version's own; None is the base model's.
    """

    requested: str
    resolved: ResolvedVersion
    lora_int_id: int
    chat_template: ChatTemplate | None = None

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
        chat_template: that chats are written by, or None.
    """

    names: tuple[str, ...]
    fingerprint: str
    chat_template: str | None

    def mismatch(self, folder: Path) -> str | None:
        """Say why an adapter can not be served beside this base, as far as its folder tells."""
        claim = base_claim(folder)
        if claim is not None and claim.is_of_another(self.fingerprint, self.names):
            return f"it was trained on {claim.name!r}, this is {self.names[0]!r}"
        return None

    def check(self, resolved: ResolvedVersion) -> bytes | None:
        """Refuse a version that is for another base, or whose small files are not what was stored.

        Its weights are checked when they are loaded.
        Returns: its chat template, if that is another one than the base's.
        Raises: AdapterMismatchError, ArtifactError.
        """
        version, folder = resolved.version, resolved.folder
        reason = self.mismatch(folder)
        if reason is not None:
            raise AdapterMismatchError(reason)
        if version_digest(version.weights_digest, folder) != version.digest:
            raise ArtifactError(f"{folder}: {CHANGED}")
        content = read_chat_template(folder)
        base = (self.chat_template or "").strip().encode()
        return None if content is None or content.strip() == base else content


def read_base(folder: Path, names: Sequence[str]) -> tuple[ServedBase, BaseShapes]:
    """Return a base model that is to be served, and its layers.

    Args: names: what requests call it; the first is its name.
    Raises and cost: as `read_base_shapes`.
    """
    name, *others = names
    shapes = replace(read_base_shapes(folder, name=name), other_names=tuple(others))
    return ServedBase(tuple(names), shapes.fingerprint, chat_template(folder)), shapes


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


class AdapterEngine(Protocol):
    """What the directory asks of the engine."""

    async def load(self, lora_int_id: int, resolved: ResolvedVersion) -> int:
        """Bring a version's weights in. Returns: bytes that they take.

        Raises: RoraError: they can not be served; the engine is as before.
        """
        ...

    async def drop(self, lora_int_id: int) -> None:
        """Take weights out that no request needs, and free their memory."""
        ...


class ModelDirectory:
    """Resolves `model` against base names and the store, and loads adapters on first use.

    Args:
        base: the base model that runs.
        store: where adapters lie.
        engine: which loads them.
        capacity: bytes that adapters may take in the engine.
        prober: that each version's probe is checked by; without one, none is.
        templates: that writes chats by adapters' own templates.
        evicted: told the name of an adapter that has to make room for others.

    tier: what the engine holds.
    """

    def __init__(
        self,
        base: ServedBase,
        store: AdapterStore,
        engine: AdapterEngine,
        *,
        capacity: int,
        prober: Prober | None = None,
        templates: TemplateProcess | None = None,
        evicted: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.base_names = base.names
        self.store = store
        self.templates = templates or TemplateProcess()
        self._base = base
        self._engine = engine
        self._prober = prober
        self._evicted = evicted
        self.tier = HostTier(capacity, self._drop, self._dismiss_unused, self._note_evicted)
        self._ids: dict[str, int] = {}
        # Versions that were checked, by digest, which go with their weights.
        self._admitted: dict[str, _Admitted] = {}
        # By name and version digest: two names may hold the same version.
        self._running: Counter[tuple[str, str]] = Counter()
        # What a request for a loaded adapter reads is small. It may still wait for a slow disk, but
        # not for asyncio's own threads, all of which uploads and imports may keep busy.
        self._threads = ThreadPoolExecutor(_READING_THREADS, thread_name_prefix="reading")

    async def open(self, model: str) -> ServedAdapter | None:
        """Return the adapter that `model` means, in the engine until `close`; None is the base.

        Requests that come while it loads wait for the same load.

        Raises:
            AdapterNotFoundError: neither a base name nor an adapter.
            AdapterMismatchError: the adapter can not be served by this base model.
            QuarantinedError: the engine does not answer its probe as it was trained.
        """
        if model in self.base_names:
            return None
        return await self.open_version(model, await self.resolve(model))

    async def resolve(self, model: str) -> ResolvedVersion:
        """Return the version that `model` means now. Raises: as `AdapterStore.resolve`."""
        return await self._read(self.store.resolve, model)

    async def open_version(
        self, model: str, resolved: ResolvedVersion, *, user: str = ""
    ) -> ServedAdapter:
        """Return a version as `open` does, whatever its name means now or if it has none yet.

        Args:
            model: what responses call it.
            user: whose time trying its chat template takes, as in TemplateProcess.
        """
        weights = resolved.version.weights_digest
        served = ServedAdapter(model, resolved, self._ids.setdefault(weights, len(self._ids) + 1))
        self._running[resolved.name, resolved.version.digest] += 1
        try:
            await self._refuse_quarantined(resolved)
            template = await self._admit(resolved, user)
            served = replace(served, chat_template=template)
            await self.tier.lease(
                weights,
                resolved.version.num_bytes,
                lambda: self._engine.load(served.lora_int_id, resolved),
            )
            await self._prove(served)
        except BaseException as error:
            self._end_running(resolved)
            await self._dismiss_unused(weights)
            if isinstance(error, ArtifactError):
                reason = without_place(str(error), resolved.folder)
                is_known = isinstance(error, QuarantinedError)
                kind = QuarantinedError if is_known else AdapterMismatchError
                raise kind(f"{resolved.public_id}: {reason}") from error
            raise
        return served

    def close(self, served: ServedAdapter, *, was_answered: bool) -> None:
        """End what `open` began.

        Args: was_answered: whether the request came to its end. vLLM gives up one that did not in
            its own time, and may put it into another step before it does.
        """
        if was_answered:
            self._end(served)
        else:
            asyncio.get_running_loop().call_later(_ABORT_SECONDS, self._end, served)

    def _end(self, served: ServedAdapter) -> None:
        self.tier.release(served.resolved.version.weights_digest)
        self._end_running(served.resolved)

    def _end_running(self, resolved: ResolvedVersion) -> None:
        held = (resolved.name, resolved.version.digest)
        self._running[held] -= 1
        if not self._running[held]:
            del self._running[held]

    @contextmanager
    def expecting(self, resolved: ResolvedVersion) -> Iterator[None]:
        """Count a request as running that will open this version."""
        self._running[resolved.name, resolved.version.digest] += 1
        try:
            yield
        finally:
            self._end_running(resolved)

    def num_running(self, name: str, versions: Sequence[Version]) -> int:
        """Return how many requests use these versions under this name, or wait for them."""
        return sum(self._running[name, version.digest] for version in versions)

    def leases(self) -> list[Lease]:
        """Return the leases on versions whose weights are in memory, under whatever name."""
        leases = [admitted.lease for admitted in self._admitted.values()]
        return [lease for lease in leases if lease is not None]

    def bytes_by_name(self) -> Counter[str]:
        """Return what adapters take in memory; from any thread.

        Weights of several names count once, for one that was asked for.
        """
        names = self._names_by_weights()
        found: Counter[str] = Counter()
        for weights, num_bytes in self.tier.sizes().items():
            if weights in names:  # else it is on its way out
                found[names[weights]] += num_bytes
        return found

    def _names_by_weights(self) -> dict[str, str]:
        # Copied in one go, which no other thread comes between.
        admitted = list(self._admitted.values())
        return {each.resolved.version.weights_digest: each.resolved.name for each in admitted}

    def _note_evicted(self, weights: str) -> None:
        self._evicted(self._names_by_weights()[weights])

    async def _refuse_quarantined(self, resolved: ResolvedVersion) -> None:
        """Refuse a version that is known to be quarantined, before anything is loaded for it."""
        reason = None if self._prober is None else await self._prober.quarantine(resolved)
        if reason is not None:
            raise QuarantinedError(reason)

    async def _prove(self, served: ServedAdapter) -> None:
        """See that the engine answers a version's probe; the lease on its weights ends if not."""
        if self._prober is None:
            return
        proof = asyncio.create_task(self._prober.check(served))
        try:
            await asyncio.shield(proof)
        except BaseException:

            def end(done: "asyncio.Task[None]") -> None:
                if not done.cancelled():
                    done.exception()  # seen, also if this client hung up
                weights = served.resolved.version.weights_digest
                loop = asyncio.get_running_loop()
                loop.call_later(_ABORT_SECONDS, self.tier.release, weights)

            # The engine needs the adapter as long as it is asked, which others may wait for.
            proof.add_done_callback(end)
            raise

    async def _admit(self, resolved: ResolvedVersion, user: str) -> ChatTemplate | None:
        """Check a version once, and keep it from garbage collection while its weights are here.

        Returns: its own chat template.
        Two versions may share weights and differ in what is checked here.
        """
        digest = resolved.version.digest
        known = self._admitted.get(digest)
        if known is not None:
            return known.template
        admitted = await self._checked(resolved, user)
        if digest not in self._admitted:
            self._admitted[digest] = admitted
        elif admitted.lease is not None:  # two first requests at once
            admitted.lease.release()
        return admitted.template

    async def _checked(self, resolved: ResolvedVersion, user: str) -> "_Admitted":
        # It may have to wait for whoever changes the store.
        lease = await asyncio.to_thread(self._lease, resolved)
        try:
            content = await self._read(self._base.check, resolved)
            template = None
            if content is not None:
                template = await asyncio.wrap_future(self.templates.read(content, user=user))
            return _Admitted(resolved, lease, template)
        except BaseException:
            if lease is not None:
                lease.release()
            raise

    async def _read(self, read: Callable[[Argument], Result], argument: Argument) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, read, argument)

    def _lease(self, resolved: ResolvedVersion) -> Lease | None:
        try:
            return self.store.lease(resolved)
        except StoreError as error:
            # A store that is mounted to be read: whoever writes it has to know what runs.
            logger.warning("no lease on %s: %s", resolved.public_id, error)
            return None

    async def _drop(self, keys: list[str]) -> None:
        for weights in keys:
            await self._engine.drop(self._ids[weights])
            await self._dismiss_unused(weights)

    async def _dismiss_unused(self, weights: str) -> None:
        """Let go of the versions of weights that the engine does not hold."""
        if self.tier.holds(weights) or self.tier.is_awaited(weights):
            return
        # All of them before anything else can run: new requests admit them anew.
        versions = [
            digest
            for digest, admitted in self._admitted.items()
            if admitted.resolved.version.weights_digest == weights
        ]
        for admitted in [self._admitted.pop(digest) for digest in versions]:
            if admitted.lease is not None:
                await asyncio.to_thread(admitted.lease.release)


@dataclass(frozen=True)
class _Admitted:
    """A version that was checked; without a lease where the store can not be written."""

    resolved: ResolvedVersion
    lease: Lease | None
    template: ChatTemplate | None


def without_place(text: str, folder: Path) -> str:
    """Return an error's text as clients may see it: where the store lies is not their business."""
    return text.replace(f"{folder}/", "").replace(str(folder), "the adapter")
