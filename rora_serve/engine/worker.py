"""RaggedCpuWorker: vLLM's CPU worker with our LoRA manager, and what the server asks it by RPC."""

import gc
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.config import CompilationMode
from vllm.v1.worker.cpu_worker import CPUWorker

from adapters.errors import EngineSeamError
from rora_serve.engine.compat import (
    check_vllm_version,
    metadata_builders,
    mix_experts_as_without_lora,
    pack_heads,
    rank_tokens_uncompiled,
    rehearse,
    rehearse_decoding,
    replace_lora_manager,
    replace_products,
)
from rora_serve.engine.handover import SOCKET_VARIABLE, receive_slots, refusal_file
from rora_serve.engine.kv_memory import kv_memory
from rora_serve.engine.manager import RaggedLoraManager
from rora_serve.engine.threads import Threads

# A recording has room for so many tokens, or all sequences if they are more; in longer steps calls
# from Python hardly count.
_REPLAYED_TOKENS = 256


class RaggedCpuWorker(CPUWorker):
    """A CPU worker whose adapters are ours."""

    def init_device(self) -> None:
        """Set up vLLM's worker, then put our manager where it will make its own."""
        check_vllm_version()
        rank_tokens_uncompiled()
        mix_experts_as_without_lora()
        self._kv_memory = kv_memory(self.cache_config.kv_cache_memory_bytes)
        super().init_device()  # type: ignore[no-untyped-call]
        self._ragged: RaggedLoraManager | None = None
        self._why_not_replayed = ""
        is_compiled = self.vllm_config.compilation_config.mode != CompilationMode.NONE
        if not is_compiled:
            # numba must come after vLLM has registered its own kernels, which it has by now.
            from rora_serve.engine.products import new_product  # noqa: PLC0415

            threads = Threads(torch.get_num_threads())
            if threads.count == threads.asked_for:
                import rora_serve.engine.activations  # noqa: PLC0415
                import rora_serve.engine.norm_layers  # noqa: F401, PLC0415

                replace_products(partial(new_product, threads=threads))

        def make_manager(model: Any) -> RaggedLoraManager:
            dtype = self.model_config.dtype
            assert isinstance(dtype, torch.dtype), "vLLM has resolved it by now"
            self._ragged = RaggedLoraManager(model, dtype, is_compiled=is_compiled)
            receive_slots(Path(os.environ[SOCKET_VARIABLE]), self._ragged)
            return self._ragged

        replace_lora_manager(self.model_runner, make_manager)

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Load the base model, and copy the weight of its head now, not in the first step."""
        try:
            super().load_model(*arguments, **options)
        except EngineSeamError as error:  # which vLLM only logs on its way to the server
            refusal_file().write_text(str(error))
            raise
        pack_heads(self.model_runner.model)

    def determine_available_memory(self) -> int:
        """Return what the KV cache may take; if that is too little, without what was found for it.

        vLLM wants as much memory free as the cache takes, beside what was found by then.
        """
        try:
            return int(super().determine_available_memory())
        except ValueError:
            if self._kv_memory is None:
                raise
            self._kv_memory.give_up()
            self._kv_memory = None
            return int(super().determine_available_memory())

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV cache, of memory that has been looked for since the start."""
        with self._kv_memory or nullcontext():
            super().initialize_from_config(kv_cache_config)
        if self._kv_memory is not None:
            self._kv_memory.give_up()  # where vLLM made the cache of other memory
            self._kv_memory = None

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, rehearse, and keep what is there by then out of garbage collections.

        To look through all that imports made takes 0.4 s, in a step. vLLM does so in its other
        processes and in its worker on GPUs.
        """
        times = super().compile_or_warm_up_model()
        if self._ragged is not None:
            with self._ragged.rehearsal():
                rehearse(self.model_runner)
                self._why_not_replayed = self._let_steps_be_replayed(self._ragged)
        gc.collect()
        gc.freeze()
        return times

    def _let_steps_be_replayed(self, ragged: RaggedLoraManager) -> str:
        """Let steps be replayed. Returns: why they are not; "" if they are."""
        runner = self.model_runner
        if self.vllm_config.compilation_config.mode != CompilationMode.NONE:
            return "the model is compiled"
        if self.model_config.dtype != torch.float32:
            return f"the model computes in {self.model_config.dtype}, not in float32"
        # numba: as in `init_device`.
        from rora_serve.engine.attention_backend import DecodeMetadataBuilder  # noqa: PLC0415
        from rora_serve.engine.replayed_steps import ReplayedSteps  # noqa: PLC0415

        builders = metadata_builders(runner)
        if not all(isinstance(builder, DecodeMetadataBuilder) for builder in builders):
            return "not all layers attend to all that came before"
        if len(builders) != 1:
            return f"{len(builders)} kinds of layers attend"
        max_rows = min(max(runner.max_num_reqs, _REPLAYED_TOKENS), runner.max_num_tokens)
        steps = ReplayedSteps(runner.model, ragged.batch, max_rows=max_rows)
        with steps.rehearsal(runner.kv_cache_config.num_blocks):
            rehearse_decoding(runner)
        return steps.problem

    def execute_model(self, scheduler_output: Any) -> Any:
        """Make a step, whole where no grammar has to come from the engine's process.

        vLLM asks for its second half by another message only where this returns None.
        """
        output = super().execute_model(scheduler_output)
        if output is None and not scheduler_output.has_structured_output_requests:
            return self.sample_tokens(None)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Make the second half of a step, and note that it is over."""
        try:
            return super().sample_tokens(grammar_output)
        finally:
            if self._ragged is not None:
                self._ragged.end_step()

    def rora_status(self) -> dict[str, Any]:
        """Answer the start-up handshake: is our manager the one in use, on how many layers.

        And why steps are not replayed, "" where they are.
        """
        in_use: Any = self.model_runner.lora_manager
        active = self._ragged is not None and in_use is self._ragged
        return {
            "active": active,
            "num_layers": self._ragged.num_layers if self._ragged else 0,
            "why_not_replayed": self._why_not_replayed,
        }
