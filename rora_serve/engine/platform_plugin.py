"""The entry point that vLLM asks for a platform; light, since every process imports it."""

import os

# Set by rora_serve.launch alone, so that a stock vLLM in the same environment stays stock.
SEAM_FLAG = "RORA_SERVE_ENGINE_SEAM"


def platform_plugin() -> str | None:
    """Return our platform's name on CPU builds of a server that rora-serve started, else None.

    On GPUs vLLM's own platform and kernels serve.
    """
    if os.environ.get(SEAM_FLAG) != "1":
        return None
    from vllm.platforms import cpu_platform_plugin  # noqa: PLC0415  (only where it is asked for)

    if cpu_platform_plugin() is None:
        return None
    return "rora_serve.engine.platform.RoraCpuPlatform"
