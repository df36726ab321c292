"""RaggedLoraManager: which adapters the worker holds, and the layers that apply them.

It stands where vLLM's LRUCacheWorkerLoRAManager stands in the model runner and has the methods that
the runner calls. A slot is the host copy itself: there is no second one, and an unused slot costs
nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import LinearBase

from adapters.errors import EngineSeamError
from rora_serve.engine.compat import linear_parts, vllm_module_name
from rora_serve.engine.loading import Target, load_factors
from rora_serve.engine.ragged_batch import RaggedBatch
from rora_serve.engine.ragged_layers import RaggedLayer


class RaggedLoraManager:
    """Holds adapters on the host and points every layer at the rows of each step.

    Args: model: vLLM's base model; a hook is hung on each of its linear layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._batch = RaggedBatch()
        self._layers: dict[str, RaggedLayer] = {}
        self._targets: dict[str, Target] = {}
        self._num_bytes: dict[int, int] = {}
        self._warming_up: set[int] = set()
        for name, layer in model.named_modules():
            if not isinstance(layer, LinearBase):
                continue
            self._layers[name] = RaggedLayer(name, layer, self._batch)
            for module, (start, size) in linear_parts(name, layer, model).items():
                self._targets[module] = Target(name, start, layer.input_size, size)

    @property
    def num_layers(self) -> int:
        """Linear layers of the base model that adapters can change."""
        return len(self._layers)

    def load(self, lora_int_id: int, folder: Path) -> int:
        """Read an adapter and make it usable in the next step; again is nothing.

        Returns: its bytes on the host.
        Raises: ArtifactError, AdapterMismatchError: as in `load_factors`; the engine is as before.
        Cost: reads the adapter once.
        """
        if lora_int_id not in self._num_bytes:
            factors = load_factors(
                folder, self._targets, rename=lambda name: vllm_module_name(name, self._model)
            )
            for layer, of_layer in factors.items():
                self._layers[layer].slots[lora_int_id] = of_layer
            self._num_bytes[lora_int_id] = sum(
                pair.num_bytes for of_layer in factors.values() for pair in of_layer
            )
        return self._num_bytes[lora_int_id]

    # What the model runner calls, by vLLM's names.

    def set_active_adapters(self, requests: set[LoRARequest], mapping: Any) -> None:
        """Group the next step's rows; every adapter in it must be loaded already.

        Args: mapping: vLLM's LoRAMapping; its index_mapping is the adapter of each row.
        """
        usable = self._num_bytes.keys() | self._warming_up
        missing = sorted(r.lora_name for r in requests if r.lora_int_id not in usable)
        if missing:
            # The front door loads an adapter before it lets its first request in.
            raise EngineSeamError(f"a step asks for adapters that are not loaded: {missing}")
        self._batch.set_rows(mapping.index_mapping)

    def add_adapter(self, request: LoRARequest) -> bool:
        """Refuse vLLM's own way of loading, whose ids are not ours."""
        raise EngineSeamError(f"adapter {request.lora_name}: only rora-serve loads adapters here")

    def remove_adapter(self, lora_int_id: int) -> bool:
        """Drop an adapter and free its memory."""
        for layer in self._layers.values():
            layer.slots.pop(lora_int_id, None)
        return self._num_bytes.pop(lora_int_id, None) is not None

    def remove_all_adapters(self) -> None:
        """Drop every adapter."""
        for lora_int_id in list(self._num_bytes):
            self.remove_adapter(lora_int_id)

    def list_adapters(self) -> set[int]:
        """Return the ids of what is loaded."""
        return set(self._num_bytes)

    def pin_adapter(self, lora_int_id: int) -> bool:
        """Nothing is evicted yet, so whatever is loaded stays."""
        return lora_int_id in self._num_bytes

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Surround the warm-up, in which vLLM adds dummy adapters."""
        try:
            yield
        finally:
            self._warming_up.clear()

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:  # noqa: ARG002
        """Take a warm-up adapter without weights: our layers need no warm-up."""
        self._warming_up.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Return the rank of warm-up adapters, which have no weights here."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Adapters change the language model only."""
        return False
