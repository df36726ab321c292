"""Reading tensors of an open safetensors file, with checked lengths.

Files are never mapped: a mapped file that somebody truncates kills the process that reads it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adapters.header import TensorInfo
from adapters.limits import MAX_ADAPTER_BYTES, MIB
from adapters.problems import Code
from adapters.reading import open_regular, reading, refuse

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CHUNK_BYTES = MIB

Array = NDArray[Any]


class TensorFile:
    """An open weights file whose header was read before."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._buffer = bytearray()

    def read(self, tensor: TensorInfo) -> Array:
        """Return a tensor in its stored dtype (float32, float16, or ml_dtypes' bfloat16), new.

        Raises: ArtifactError: the file became shorter than its header said.
        """
        array = np.empty(tensor.shape, dtype=NUMPY_DTYPES[tensor.dtype])
        self._read_into(array.reshape(-1).view(np.uint8).data, tensor, offset=0)
        return array

    def chunks(self, tensor: TensorInfo) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, at most 1 MiB at a time; use each view before the next.

        Raises: as `read`.
        """
        if not self._buffer:
            self._buffer = bytearray(_CHUNK_BYTES)
        for offset in range(0, tensor.num_bytes, _CHUNK_BYTES):
            view = memoryview(self._buffer)[: min(_CHUNK_BYTES, tensor.num_bytes - offset)]
            self._read_into(view, tensor, offset=offset)
            yield view

    def _read_into(self, view: memoryview, tensor: TensorInfo, *, offset: int) -> None:
        done = 0
        while done < len(view):
            start = tensor.start + offset + done
            with reading(self._path):
                read = os.preadv(self._descriptor, [view[done:]], start)
            if read == 0:
                message = (
                    f"ends after {offset + done} of {tensor.num_bytes} bytes; the file was changed "
                    "while it was read"
                )
                raise refuse(Code.FILE_CHANGED, self._path, message, where=tensor.name)
            done += read


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a weights file to read tensors that its header named.

    Raises: ArtifactError: it is gone, or no regular file any more.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path, max_bytes=MAX_ADAPTER_BYTES))
        except FileNotFoundError as error:
            message = "is gone; the folder was changed while it was read"
            raise refuse(Code.FILE_CHANGED, path, message) from error
        yield TensorFile(path, file.fileno())
