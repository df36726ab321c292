"""What vLLM asks us for in each of its processes; light, since all of them import it."""

import os

# Set by rora_serve.launch alone, so that a stock vLLM in the same environment stays stock.
SEAM_FLAG = "RORA_SERVE_ENGINE_SEAM"
# Set by it too, where every core computes.
SLEEP_FLAG = "RORA_SERVE_SLEEP_BETWEEN_MESSAGES"
# Set by rora_serve.engine.forking, while processes can be forked.
FORK_FLAG = "RORA_SERVE_FORK"


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


def process_plugin() -> None:
    """Set up one of vLLM's processes."""
    if os.environ.get(SLEEP_FLAG) == "1":
        from rora_serve.engine.compat import sleep_between_messages  # noqa: PLC0415

        sleep_between_messages()
    if os.environ.get(FORK_FLAG) == "1":
        from rora_serve.engine.compat import fork_processes  # noqa: PLC0415
        from rora_serve.engine.forking import ForkingContext  # noqa: PLC0415

        fork_processes(ForkingContext())
