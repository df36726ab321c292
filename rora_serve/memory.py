"""How much memory there is for adapters."""

import json
from contextlib import suppress
from pathlib import Path

import psutil

_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_DTYPE_BYTES = {"float32": 4, "float": 4}  # of others two


def cpu_dtype() -> str:
    """Return the dtype that this processor is fast in: bfloat16 only with instructions for it."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return "auto"
    return "auto" if any(flag in flags for flag in _BF16_FLAGS) else "float32"


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process may still take, in a container or outside.

    Args: cgroup: where a container's limits stand, of version 2.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        free = min(free, limit - _used_of(cgroup))
    except (OSError, ValueError):  # no container, or none with a limit
        pass
    return max(free, 0)


def free_memory(
    model: Path, cgroup: Path = Path("/sys/fs/cgroup"), *, dtype: str | None = None
) -> int:
    """Return the bytes that this process may still take once the base model is loaded.

    Args:
        cgroup: where a container's limits stand, of version 2.
        dtype: that the model is served in, as vLLM's option has it; by default `cpu_dtype`.
    """
    free = available_memory(cgroup)
    return max(free - _weights_bytes(model, dtype or cpu_dtype()), free // 8)


def _used_of(cgroup: Path) -> int:
    """Return what a container takes, without what of read files goes when memory is needed."""
    used = int((cgroup / "memory.current").read_text())
    with suppress(OSError):
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))
    return used


def _weights_bytes(model: Path, dtype: str) -> int:
    files = [*model.glob("*.safetensors")] or [*model.glob("*.bin")]
    stored = sum(path.stat().st_size for path in files)
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError):
        return stored
    stored_as = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    served_as = stored_as if dtype == "auto" else dtype
    return stored * _DTYPE_BYTES.get(served_as, 2) // _DTYPE_BYTES.get(stored_as, 2)


def adapter_memory(given: int | None, model: Path, *, dtype: str | None = None) -> int:
    """Return the bytes that adapters may take: those that were given, or a quarter of what is free.

    Args:
        model: folder of the base model, which is not loaded yet.
        dtype: as in `free_memory`.
    """
    return given or free_memory(model, dtype=dtype) // 4
