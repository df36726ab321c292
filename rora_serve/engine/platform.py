"""RoraCpuPlatform: vLLM's CPU platform, with our worker."""

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

from adapters.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER_CLASS = "rora_serve.engine.worker.RaggedCpuWorker"


class RoraCpuPlatform(CpuPlatform):
    """Names our worker where adapters are served; everything else is vLLM's."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Let vLLM set up its CPU engine, then name our worker.

        Raises: ConfigError: an option that our layers do not serve.
        """
        # vLLM would switch compilation off beside its own adapter layers; ours can be compiled.
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            super().check_and_update_config(vllm_config)
        finally:
            vllm_config.lora_config = lora_config
        if lora_config is None:
            return
        parallel = vllm_config.parallel_config
        for option, size in (
            ("--tensor-parallel-size", parallel.tensor_parallel_size),
            ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
            ("--data-parallel-size", parallel.data_parallel_size),
        ):
            if size > 1:
                raise ConfigError(
                    f"{option}: {size}, adapters are served by one worker on CPUs; leave it at 1"
                )
        if vllm_config.speculative_config is not None:
            raise ConfigError(
                "--speculative-config: guessing tokens ahead is not served beside adapters on CPUs "
                "yet; leave it out"
            )
        parallel.worker_cls = WORKER_CLASS
