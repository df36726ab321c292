"""Which adapter a request's `model` means, as the engine knows it.

Owns the map from weights digests to vLLM's integer ids and the loading of each adapter once. Knows
neither HTTP nor vLLM's classes, so that all of it can be tested without an engine.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from adapters import AdapterStore, ResolvedVersion
from adapters.errors import AdapterMismatchError, AdapterNameError

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


class ModelDirectory:
    """Resolves `model` against base names and the store, and loads adapters on first use.

    Args:
        base_names: names of the base model.
        store: where adapters lie.
        load_in_engine: asks the worker to load an adapter.
    Raises: AdapterNameError: the store holds an adapter with a base model's name.
    """

    def __init__(
        self, base_names: Sequence[str], store: AdapterStore, load_in_engine: LoadInEngine
    ) -> None:
        self.base_names = tuple(base_names)
        self.store = store
        self._load_in_engine = load_in_engine
        self._ids: dict[str, int] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        for record in store.names():
            if record.name in self.base_names:
                raise AdapterNameError(
                    f"{store.root}: an adapter is named {record.name!r} like the base model; "
                    "store it under another name or serve the base with --served-model-name"
                )

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
        load = self._loads.get(weights)
        if load is None:
            load = asyncio.create_task(self._load(served))
            self._loads[weights] = load
        # One client that hangs up must not cancel the load that others wait for.
        await asyncio.shield(load)
        return served

    async def _load(self, served: ServedAdapter) -> None:
        weights = served.engine_name
        try:
            outcome = await self._load_in_engine(served.lora_int_id, served.folder)
        except BaseException:
            del self._loads[weights]  # the next request tries again
            raise
        if "error" in outcome:
            del self._loads[weights]
            # Clients see this; where the store lies is not their business.
            reason = str(outcome["error"]).replace(f"{served.folder}/", "")
            raise AdapterMismatchError(f"{served.resolved.public_id}: {reason}")
