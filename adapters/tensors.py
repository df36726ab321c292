"""Reading tensors of an open safetensors file, with checked lengths.

Files are never mapped: a mapped file that somebody truncates kills the process that reads it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
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
        self._fill(array.reshape(-1).view(np.uint8).data, tensor.start, [tensor])
        return array

    def read_all(self, tensors: Sequence[TensorInfo]) -> Iterator[Array]:
        """Yield what `read` returns of each; use each array before the next one.

        Tensors that lie end to end are read together, up to 1 MiB. Raises: as `read`.
        """
        first = 0
        while first < len(tensors):
            start, stop = tensors[first].start, tensors[first].stop
            last = first + 1
            while last < len(tensors) and tensors[last].start == stop:
                if tensors[last].stop - start > _CHUNK_BYTES:
                    break
                stop = tensors[last].stop
                last += 1
            together = tensors[first:last]
            content = self._room(stop - start)
            self._fill(content, start, together)
            numbers = np.frombuffer(content, np.uint8)
            for tensor in together:
                part = numbers[tensor.start - start : tensor.stop - start]
                yield part.view(NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)
            first = last

    def chunks(self, tensor: TensorInfo) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, at most 1 MiB at a time; use each view before the next.

        Raises: as `read`.
        """
        room = self._room(min(_CHUNK_BYTES, tensor.num_bytes))
        for offset in range(0, tensor.num_bytes, _CHUNK_BYTES):
            view = room[: min(_CHUNK_BYTES, tensor.num_bytes - offset)]
            self._fill(view, tensor.start + offset, [tensor])
            yield view

    def _room(self, num_bytes: int) -> memoryview:
        """Return memory that is used again the next time."""
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(max(num_bytes, _CHUNK_BYTES))
        return memoryview(self._buffer)[:num_bytes]

    def _fill(self, view: memoryview, start: int, tensors: Sequence[TensorInfo]) -> None:
        """Read from `start` on. Args: tensors: that lie there, one of which an error names."""
        done = 0
        while done < len(view):
            with reading(self._path):
                read = os.preadv(self._descriptor, [view[done:]], start + done)
            if read == 0:
                end = start + done
                tensor = next(tensor for tensor in tensors if tensor.stop > end)
                message = (
                    f"ends after {max(end - tensor.start, 0)} of {tensor.num_bytes} bytes; the "
                    "file was changed while it was read"
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
