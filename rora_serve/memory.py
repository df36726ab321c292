"""How much memory there is for adapters."""

from pathlib import Path

import psutil


def free_memory(model: Path, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process may still take once the base model is loaded.

    Args: cgroup: where a container's limits stand, of version 2.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        free = min(free, limit - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or none with a limit
        pass
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return max(free - weights, free // 8)


def adapter_memory(given: int | None, model: Path) -> int:
    """Return the bytes that adapters may take: those that were given, or a quarter of what is free.

    Args: model: folder of the base model, which is not loaded yet.
    """
    return given or free_memory(model) // 4
