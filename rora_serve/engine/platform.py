"""RoraCpuPlatform: vLLM's CPU platform, with our worker, decoding, small blocks, unused kernels."""

from typing import TYPE_CHECKING

import torch
from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

DECODE_BACKEND = "rora_serve.engine.attention_backend.DecodeBackend"
WORKER_CLASS = "rora_serve.engine.worker.RaggedCpuWorker"
# Tokens of a block of the KV cache, instead of vLLM's default on CPUs. With that one attention to
# short texts takes a quarter longer, and to long ones as long. Prefixes are found in the cache by
# whole blocks.
_BLOCK_SIZE, _VLLM_BLOCK_SIZE = 64, 128


class RoraCpuPlatform(CpuPlatform):
    """Names our worker where adapters are served, our decoding, a block size and compiled norms."""

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
    def get_attn_backend_cls(
        cls,
        selected_backend: "AttentionBackendEnum",
        attn_selector_config: "AttentionSelectorConfig",
        num_heads: int | None = None,
    ) -> str:
        """Return our backend's path for layers whose decoding is ours, else vLLM's."""
        from vllm.v1.attention.backend import AttentionType  # noqa: PLC0415  (see above)
        from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: PLC0415

        theirs = super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        asked = attn_selector_config
        is_plain = (
            asked.dtype == torch.float32
            and asked.kv_cache_dtype in {None, "auto"}
            and asked.attn_type == AttentionType.DECODER
            and not asked.has_sink
            and not asked.has_sliding_window
            and not asked.use_kv_connector
        )
        is_theirs = theirs == AttentionBackendEnum.CPU_ATTN.get_path()
        return DECODE_BACKEND if is_plain and is_theirs else theirs

    @classmethod
    def opaque_attention_op(cls) -> bool:
        """Let layers call attention straight away, unless a compiled graph has to.

        Multi-head latent attention goes the way that vLLM tests on CPUs.
        """
        from vllm import config as configuration  # noqa: PLC0415  (which knows platforms)

        config = configuration.get_current_vllm_config_or_none()
        if config is None or config.model_config is None or config.model_config.use_mla:
            return True
        return config.compilation_config.mode != configuration.CompilationMode.NONE

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
