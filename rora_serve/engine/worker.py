"""RaggedCpuWorker: vLLM's CPU worker with our LoRA manager, and what the server asks it by RPC."""

import os
from pathlib import Path
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from rora_serve.engine.compat import check_vllm_version, replace_lora_manager
from rora_serve.engine.handover import SOCKET_VARIABLE, receive_slots
from rora_serve.engine.manager import RaggedLoraManager


class RaggedCpuWorker(CPUWorker):
    """A CPU worker whose adapters are ours."""

    def init_device(self) -> None:
        """Set up vLLM's worker, then put our manager where it will make its own."""
        check_vllm_version()
        super().init_device()  # type: ignore[no-untyped-call]
        self._ragged: RaggedLoraManager | None = None

        def make_manager(model: Any) -> RaggedLoraManager:
            dtype = self.model_config.dtype
            assert isinstance(dtype, torch.dtype), "vLLM has resolved it by now"
            self._ragged = RaggedLoraManager(model, dtype)
            receive_slots(Path(os.environ[SOCKET_VARIABLE]), self._ragged)
            return self._ragged

        replace_lora_manager(self.model_runner, make_manager)

    def rora_status(self) -> dict[str, Any]:
        """Answer the start-up handshake and tests.

        Returns: whether our manager is the one in use, on how many layers, with how many bytes of
            adapters.
        """
        in_use: Any = self.model_runner.lora_manager
        if self._ragged is None or in_use is not self._ragged:
            return {"active": False}
        return {
            "active": True,
            "num_layers": self._ragged.num_layers,
            "num_bytes": self._ragged.num_bytes,
        }
