"""RoraCpuPlatform: vLLM's CPU platform, with our worker."""

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER_CLASS = "rora_serve.engine.worker.RaggedCpuWorker"


class RoraCpuPlatform(CpuPlatform):
    """Names our worker where adapters are served; everything else is vLLM's."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Let vLLM set up its CPU engine, then name our worker."""
        # vLLM would switch compilation off beside its own adapter layers; ours can be compiled.
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            super().check_and_update_config(vllm_config)
        finally:
            vllm_config.lora_config = lora_config
        if lora_config is not None:
            vllm_config.parallel_config.worker_cls = WORKER_CLASS
