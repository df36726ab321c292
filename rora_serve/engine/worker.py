"""RaggedCpuWorker: vLLM's CPU worker with our LoRA manager, and what the server asks it by RPC."""

import logging
from pathlib import Path
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from adapters.errors import RoraError
from rora_serve.engine.compat import check_vllm_version, replace_lora_manager
from rora_serve.engine.manager import RaggedLoraManager

logger = logging.getLogger(__name__)


class RaggedCpuWorker(CPUWorker):
    """A CPU worker whose adapters are ours."""

    def init_device(self) -> None:
        """Set up vLLM's worker, then put our manager where it will make its own."""
        check_vllm_version()
        super().init_device()  # type: ignore[no-untyped-call]
        self._ragged: RaggedLoraManager | None = None

        def make_manager(model: Any) -> RaggedLoraManager:
            self._ragged = RaggedLoraManager(model)
            return self._ragged

        replace_lora_manager(self.model_runner, make_manager)

    def rora_status(self) -> dict[str, Any]:
        """Answer the start-up handshake: is our manager the one in use, on how many layers."""
        in_use: Any = self.model_runner.lora_manager
        active = self._ragged is not None and in_use is self._ragged
        return {"active": active, "num_layers": self._ragged.num_layers if self._ragged else 0}

    def rora_load_adapter(self, lora_int_id: int, folder: str) -> dict[str, Any]:
        """Load an adapter. Returns {"num_bytes": n}, or {"error": why it can not be served}."""
        assert self._ragged is not None
        try:
            return {"num_bytes": self._ragged.load(lora_int_id, Path(folder))}
        except RoraError as error:
            return {"error": str(error)}
        except Exception:  # an adapter is somebody else's file; it fails its own requests only
            logger.exception("adapter in %s could not be loaded", folder)
            return {"error": "the adapter can not be read; the server's log says why"}
