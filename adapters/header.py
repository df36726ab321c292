"""Reading the header of a safetensors file, bounded, before any tensor.

Owns the checks of the file's frame: length, cap, bounds, UTF-8, JSON, dtype, shape, offsets. Knows
nothing of adapters.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import ArtifactError
from adapters.limits import MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_NAME_LENGTH, MAX_TENSORS
from adapters.problems import Code, Problem, refusal, shown
from adapters.reading import parse_json_object, refuse

LENGTH_FIELD_BYTES = 8
METADATA_KEY = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
# All types of the format with whole bytes: base models hold more of them than adapters may.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
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
    """Return the tensors of a base model's safetensors file by name, without reading any of them.

    Hubs keep such files behind symbolic links, so links are followed here.
    Raises: ArtifactError: the file is missing, can not be read, or its frame is wrong.
    Cost: two small reads.
    """
    try:
        if path.exists() and not path.is_file():
            raise refuse(Code.FILE_NOT_REGULAR, path, "can not be read (no regular file)")
        with path.open("rb") as file:
            return header_of(file, path)
    except FileNotFoundError:
        message = "no such file, a safetensors file is expected"
        raise refuse(Code.WEIGHTS_MISSING, path, message) from None
    except OSError as error:
        message = f"can not be read ({error.strerror})"
        raise refuse(Code.FILE_UNREADABLE, path, message) from error


def header_of(file: BinaryIO, path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of an open safetensors file by name.

    Args:
        file: at its beginning.
        path: named in errors.
    Raises: ArtifactError: every tensor whose entry is wrong, or what else is wrong with the frame.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes < LENGTH_FIELD_BYTES:
        message = (
            f"{file_bytes} bytes, a safetensors file begins with an 8-byte header length; "
            "copy the file again"
        )
        raise refuse(Code.HEADER_CUT, path, message)
    header_bytes = int.from_bytes(file.read(LENGTH_FIELD_BYTES), "little")
    rest = file_bytes - LENGTH_FIELD_BYTES
    if header_bytes > rest:
        message = f"header claims {header_bytes} bytes, {rest} follow; copy the file again"
        raise refuse(Code.HEADER_PAST_END, path, message)
    if header_bytes > MAX_HEADER_BYTES:
        message = f"header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES} are expected"
        raise refuse(Code.HEADER_TOO_LARGE, path, message)
    header = parse_json_object(file.read(header_bytes), path=path, where=f"{path.name}, header")
    _check_metadata(header.pop(METADATA_KEY, {}), path)
    if len(header) > MAX_TENSORS:
        message = f"{len(header)} tensors, at most {MAX_TENSORS} are expected"
        raise refuse(Code.TENSORS_TOO_MANY, path, message)
    data_start = LENGTH_FIELD_BYTES + header_bytes
    tensors: dict[str, TensorInfo] = {}
    problems = []
    for name, entry in header.items():
        found = _tensor_info(name, entry, data_start=data_start)
        if isinstance(found, TensorInfo):
            tensors[name] = found
        else:
            problems.append(found)
    if not problems:
        problems = _layout_problems(tensors, data_start, file_bytes, path.name)
    if problems:
        raise refusal(ArtifactError, path, problems)
    return tensors


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        message = f"{METADATA_KEY} is {shown(metadata)}, an object of texts is expected"
        raise refuse(Code.HEADER_METADATA, path, message)


def _tensor_info(  # noqa: PLR0911  (one return for each rule)
    name: str, entry: Any, *, data_start: int
) -> TensorInfo | Problem:
    if len(name) > MAX_NAME_LENGTH or not (name.isprintable() and name):
        message = f"a name of 1 to {MAX_NAME_LENGTH} printable characters is expected"
        return Problem(Code.TENSOR_NAME, name, message)
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        return Problem(Code.TENSOR_ENTRY, name, "dtype, shape and data_offsets are expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        message = f"dtype {shown(dtype)} is unknown, one of {', '.join(DTYPE_BYTES)} is expected"
        return Problem(Code.TENSOR_DTYPE, name, message)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        message = f"shape {shown(shape)}, at most {MAX_DIMENSIONS} sizes are expected"
        return Problem(Code.TENSOR_SHAPE, name, message)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        message = f"data_offsets {shown(offsets)}, [start, stop] is expected"
        return Problem(Code.TENSOR_OFFSETS, name, message)
    found, wanted = offsets[1] - offsets[0], math.prod(shape) * DTYPE_BYTES[dtype]
    if found != wanted:
        message = f"{found} bytes for {dtype} {shown(shape)}, {wanted} are expected"
        return Problem(Code.TENSOR_SIZE, name, message)
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _layout_problems(
    tensors: dict[str, TensorInfo], data_start: int, file_bytes: int, file_name: str
) -> list[Problem]:
    """Name the first gap or overlap, and bytes outside the file or after the last tensor."""
    expected = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != expected:
            code = Code.TENSOR_GAP if tensor.start > expected else Code.TENSOR_OVERLAP
            message = (
                f"starts at byte {tensor.start}, {expected} is expected (tensors lie end to end)"
            )
            return [Problem(code, tensor.name, message)]
        expected = tensor.stop
    if expected > file_bytes:
        message = f"tensors end at byte {expected}, the file has {file_bytes}; copy it again"
        return [Problem(Code.TENSOR_PAST_END, file_name, message)]
    if expected < file_bytes:
        message = f"tensors end at byte {expected}, the file has {file_bytes}; export it again"
        return [Problem(Code.BYTES_AFTER_TENSORS, file_name, message)]
    return []


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # and no bool
