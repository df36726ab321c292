"""RaggedLoraManager: which adapters the worker holds, and the layers that apply them.

It stands where vLLM's LRUCacheWorkerLoRAManager stands in the model runner and has the methods that
the runner calls. Adapters come from the loader, in slots that are ready to be read, and go when the
host tier says so; the engine's loop reads no file.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.request import LoRARequest

from adapters.errors import EngineSeamError
from rora_serve.engine.compat import base_layers, note_logits, vllm_module_name
from rora_serve.engine.first_steps import FirstSteps
from rora_serve.engine.hooks import AddDeltas, LayerHooks
from rora_serve.engine.loading import read_slot
from rora_serve.engine.ragged_batch import RaggedBatch
from rora_serve.engine.ragged_layers import DTYPES, DeltasAfterProduct, RaggedLayer
from rora_serve.engine.slots import Site, Slot, empty_slot
from rora_serve.engine.threads import Threads

logger = logging.getLogger(__name__)

_ELEMENTS = {dtype: element for element, dtype in DTYPES.items()}
_KNOWN_NAMES = 65_536  # of modules whose place is remembered
_SHOWN_REFUSALS = 5


def _is_ours(product: Any) -> bool:
    from rora_serve.engine.products import Product  # noqa: PLC0415  (numba comes after vLLM)

    return isinstance(product, Product)


class RaggedLoraManager:
    """Holds slots on the host and points every layer at the rows of each step.

    Args:
        model: vLLM's base model; each of its layers that an adapter can change gets our part.
        dtype: that it computes in.
        is_compiled: whether it is traced once for all batches.

    `batch` is the rows of the step.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, is_compiled: bool) -> None:
        # numba must come after vLLM has registered its own kernels, which it has by now.
        from rora_serve.engine.kernels import Loop  # noqa: PLC0415

        self._model = model
        self._slots: dict[int, Slot] = {}
        self._first_steps = FirstSteps()
        loop = Loop(_ELEMENTS[dtype], Threads(torch.get_num_threads()))
        layers = base_layers(model)
        self._sites = {
            module: Site(index, part, base.kind, base.in_features, size)
            for index, base in enumerate(layers)
            for part, (module, (_, size)) in enumerate(base.parts.items())
        }
        self._layers = [
            RaggedLayer(
                base.name,
                index,
                base.kind,
                in_features=base.in_features,
                parts=tuple(base.parts.values()),
                loop=loop,
            )
            for index, base in enumerate(layers)
        ]
        self.num_parts = max((len(base.parts) for base in layers), default=1)
        self._empty_slot = empty_slot(len(layers), self.num_parts)
        self.batch = RaggedBatch(len(layers))
        self.site = lru_cache(maxsize=_KNOWN_NAMES)(self._find_site)
        hooked, products = [], []
        for index, (base, layer) in enumerate(zip(layers, self._layers, strict=True)):
            if not is_compiled and _is_ours(base.product) and layer.can_follow(base.product):
                products.append((base.product, DeltasAfterProduct(layer, self.batch)))
            else:
                hooked.append((base, self._adding(index, is_head=base.is_head)))
        self._hooks = LayerHooks(hooked, products)
        self._is_compiled = is_compiled
        self._heads = {index for index, base in enumerate(layers) if base.is_head}
        self._groups_of_logits = self.batch.samples
        if self._heads:
            note_logits(model, self._note_logits)

    @property
    def num_layers(self) -> int:
        """Layers of the base model that adapters can change."""
        return len(self._layers)

    def publish(self, lora_int_id: int, slot: Slot) -> threading.Event:
        """Let the next step use an adapter; from any thread.

        No step reads a slot that was not there when it began, so that nothing has to wait.
        Returns: what is set when its first step is over, see `FirstSteps.expect`.
        """
        first_step = self._first_steps.expect(lora_int_id)
        self._slots[lora_int_id] = slot
        return first_step

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Surround a run of the model on rows of a dummy adapter, and learn what can be served.

        Adapters of a layer that the model does not call, or calls with other rows than the step's,
        are refused from then on: the one would change nothing, the other be added to anything.
        Embeddings may go uncalled, as dummy runs of models that see images start behind them; and
        heads do, as logits are asked by another call.
        """
        for layer in self._layers:
            layer.in_rehearsal = True
        yield
        refused = []
        for layer in self._layers:
            layer.in_rehearsal = False
        for module, site in list(self._sites.items()):
            layer = self._layers[site.layer]
            is_expected = layer.kind == "linear" and site.layer not in self._heads
            if layer.misfit is not None:
                refused.append(f"{module} ({layer.misfit})")
            elif is_expected and not layer.is_called:
                refused.append(f"{module} (the model does not call it)")
            else:
                continue
            del self._sites[module]
        self.site.cache_clear()
        if refused:
            logger.warning(
                "adapters of %d modules are refused: %s%s",
                len(refused),
                "; ".join(refused[:_SHOWN_REFUSALS]),
                "; .." if len(refused) > _SHOWN_REFUSALS else "",
            )

    def end_step(self) -> None:
        """Note that a step is over."""
        self._first_steps.end()

    def _find_site(self, module: str) -> Site | None:
        return self._sites.get(vllm_module_name(module, self._model))

    def _adding(self, index: int, *, is_head: bool) -> AddDeltas:
        batch, layer = self.batch, self._layers[index]

        def add_deltas(x: Tensor, y: Tensor) -> None:
            layer.add_deltas(x, y, batch.tokens)

        def add_to_logits(hidden: Tensor, logits: Tensor) -> None:
            # The warm-up's logits are of no step's rows.
            if batch.tokens.is_touched[index]:
                layer.add_deltas(hidden, logits, self._groups_of_logits)

        return add_to_logits if is_head else add_deltas

    def _note_logits(self, hidden: Tensor) -> None:
        """Find the rows of which logits are asked: those that are sampled, or a prompt's own.

        vLLM takes the former out of the step's rows, into a tensor of their own, and the latter as
        a view of some of them.
        """
        batch = self.batch
        if not any(batch.tokens.is_touched[index] for index in self._heads):
            return
        num_rows = hidden.shape[0]
        row_bytes = hidden.stride(0) * hidden.element_size()
        if hidden.untyped_storage().nbytes() == num_rows * row_bytes:
            if num_rows == batch.samples.num_rows:
                self._groups_of_logits = batch.samples
                return
            if num_rows != batch.tokens.num_rows:
                raise EngineSeamError(
                    f"lm_head: {num_rows} rows for {batch.samples.num_rows} samples; this "
                    "model's head is not served yet"
                )
        first = hidden.storage_offset() // hidden.stride(0)
        self._groups_of_logits = batch.tokens_between(first, first + num_rows)

    # What the model runner calls, by vLLM's names.

    def set_active_adapters(self, requests: set[LoRARequest], mapping: Any) -> None:
        """Group the next step's rows.

        Args: mapping: vLLM's LoRAMapping; its index_mapping is the adapter of each row, its
            prompt_mapping that of each row of logits.
        """
        self._first_steps.begin({request.lora_int_id for request in requests})
        for request in requests:
            key = request.lora_int_id
            if key not in self._slots:
                self._read_now(request)
        self.batch.set_rows(mapping.index_mapping, mapping.prompt_mapping, self._slots)
        if not self._is_compiled:  # steps of the base alone go without our part
            self._hooks.switch(on=self.batch.tokens.tables is not None)

    def _read_now(self, request: LoRARequest) -> None:
        """Read an adapter that a step needs and nobody holds, which leases are there to prevent.

        Everybody waits for it, and the engine ends if the file is bad by then: to go on would be
        to answer as the base does, in the adapter's name.
        """
        logger.error("adapter %s is read within a step: its lease was broken", request.lora_name)
        self._slots[request.lora_int_id] = read_slot(
            Path(request.lora_path),
            self.site,
            weights_digest=request.lora_name,
            num_layers=self.num_layers,
            num_parts=self.num_parts,
        )

    def add_adapter(self, request: LoRARequest) -> bool:
        """Refuse vLLM's own way of loading, whose ids are not ours."""
        raise EngineSeamError(f"adapter {request.lora_name}: only rora-serve loads adapters here")

    def remove_adapter(self, lora_int_id: int) -> bool:
        """Drop an adapter and free its memory."""
        slot = self._slots.pop(lora_int_id, None)
        self._forget_step()
        return slot is not None

    def remove_all_adapters(self) -> None:
        """Drop every adapter."""
        self._slots.clear()
        self._forget_step()

    def _forget_step(self) -> None:
        """Forget the last step's rows, which keep slots in memory."""
        self.batch.clear()
        self._groups_of_logits = self.batch.samples

    def list_adapters(self) -> set[int]:
        """Return the ids of what is loaded."""
        return set(self._slots)

    def pin_adapter(self, lora_int_id: int) -> bool:
        """Nothing is evicted here; the host tier in front of the engine pins."""
        return lora_int_id in self._slots

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Surround a dummy run, in which vLLM adds dummy adapters."""
        try:
            yield
        finally:
            self.end_step()  # the run's, whose second half is none

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:  # noqa: ARG002
        """Take a dummy run's adapter, which touches every layer and adds nothing."""
        self._slots[request.lora_int_id] = self._empty_slot
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Return the rank of dummy adapters, which have no weights here."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Adapters change the language model only."""
        return False
