"""Reading the header of a safetensors file, bounded, before any tensor.

Owns the checks of the file's frame: length, cap, bounds, UTF-8, JSON, dtype, shape, offsets. Knows
nothing of adapters.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import ArtifactHeaderError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
LENGTH_FIELD_BYTES = 8
MAX_DIMENSIONS = 8
# All types of the format with whole bytes: base models hold more of them than adapters may.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `stop` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor on disk."""
        return self.stop - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name, without reading any of them.

    Raises: ArtifactHeaderError: the file is missing, or its frame is wrong.
    Cost: two small reads.
    """
    if path.exists() and not path.is_file():
        raise ArtifactHeaderError(f"{path}: can not be read (no regular file)")
    try:
        with path.open("rb") as file:
            return _read_header(file, path)
    except FileNotFoundError:
        raise ArtifactHeaderError(f"{path}: no such file, a safetensors file is expected") from None
    except OSError as error:
        raise ArtifactHeaderError(f"{path}: can not be read ({error.strerror})") from error


def _read_header(file: BinaryIO, path: Path) -> dict[str, TensorInfo]:
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes < LENGTH_FIELD_BYTES:
        raise ArtifactHeaderError(
            f"{path}: {file_bytes} bytes, a safetensors file begins with an 8-byte header length; "
            "copy the file again"
        )
    header_bytes = int.from_bytes(file.read(LENGTH_FIELD_BYTES), "little")
    rest = file_bytes - LENGTH_FIELD_BYTES
    if header_bytes > rest:
        raise ArtifactHeaderError(
            f"{path}: header claims {header_bytes} bytes, {rest} follow; copy the file again"
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise ArtifactHeaderError(
            f"{path}: header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )
    try:
        header = json.loads(file.read(header_bytes).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactHeaderError(f"{path}: header is not UTF-8 JSON ({error})") from error
    if not isinstance(header, dict):
        raise ArtifactHeaderError(
            f"{path}: header is a {type(header).__name__}, a JSON object is expected"
        )
    data_start = LENGTH_FIELD_BYTES + header_bytes
    tensors = {
        name: _tensor_info(name, entry, data_start=data_start, path=path)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_layout(tensors, data_start=data_start, file_bytes=file_bytes, path=path)
    return tensors


def _tensor_info(name: str, entry: Any, *, data_start: int, path: Path) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactHeaderError(f"{where}: dtype, shape and data_offsets are expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ArtifactHeaderError(
            f"{where}: dtype {dtype!r} is unknown, one of {', '.join(DTYPE_BYTES)} is expected"
        )
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(_is_count(size) for size in shape)
    ):
        raise ArtifactHeaderError(
            f"{where}: shape {str(shape)[:80]}, at most {MAX_DIMENSIONS} sizes are expected"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ArtifactHeaderError(f"{where}: data_offsets {offsets!r}, [start, stop] is expected")
    start, stop = offsets
    wanted = math.prod(shape) * DTYPE_BYTES[dtype]
    if stop - start != wanted:
        raise ArtifactHeaderError(
            f"{where}: {stop - start} bytes for {dtype} {shape}, {wanted} are expected"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _check_layout(
    tensors: dict[str, TensorInfo], *, data_start: int, file_bytes: int, path: Path
) -> None:
    """Refuse gaps, overlaps and bytes outside the file, as the format asks."""
    expected = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != expected:
            raise ArtifactHeaderError(
                f"{path}: tensor {tensor.name!r} starts at byte {tensor.start}, {expected} is "
                "expected (tensors lie end to end)"
            )
        expected = tensor.stop
    if expected != file_bytes:
        raise ArtifactHeaderError(
            f"{path}: tensors end at byte {expected}, the file has {file_bytes}; copy it again"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
