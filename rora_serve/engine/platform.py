"""RoraCpuPlatform: vLLM's CPU platform, with our worker, smaller blocks and unused kernels."""

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig

WORKER_CLASS = "rora_serve.engine.worker.RaggedCpuWorker"
# Tokens of a block of the KV cache, instead of vLLM's default on CPUs. With that one attention to
# short texts takes a quarter longer, and to long ones as long. Prefixes are found in the cache by
# whole blocks.
_BLOCK_SIZE, _VLLM_BLOCK_SIZE = 64, 128


class RoraCpuPlatform(CpuPlatform):
    """Names our worker where adapters are served, a block size and compiled norms."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Let vLLM set up its CPU engine, then name our block size and worker."""
        # vLLM would switch compilation off beside its own adapter layers; ours can be compiled.
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            super().check_and_update_config(vllm_config)
        finally:
            vllm_config.lora_config = lora_config
        cache_config = vllm_config.cache_config
        is_default = cache_config.block_size == _VLLM_BLOCK_SIZE  # some models need another
        if is_default and not cache_config.user_specified_block_size:
            cache_config.block_size = _BLOCK_SIZE
        if lora_config is not None:
            vllm_config.parallel_config.worker_cls = WORKER_CLASS

    @classmethod
    def import_ir_kernels(cls) -> None:
        """Import what implements vLLM's operators: its own modules, then ours."""
        super().import_ir_kernels()
        import rora_serve.engine.norms  # noqa: F401, PLC0415  (operators come after platforms)

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: "VllmConfig") -> "IrOpPriorityConfig":
        """Prefer compiled norms, unless torch.compile makes its own of PyTorch's code."""
        from vllm.config import CompilationMode  # noqa: PLC0415  (configurations know platforms)
        from vllm.config.kernel import IrOpPriorityConfig  # noqa: PLC0415

        from rora_serve.engine.norms import PROVIDER  # noqa: PLC0415

        if vllm_config.compilation_config.mode != CompilationMode.NONE:
            return super().get_default_ir_op_priority(vllm_config)
        norms = [PROVIDER, "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=norms, fused_add_rms_norm=norms)
