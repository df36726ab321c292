"""Recording: what a model's step does, as calls of compiled functions that can be made again.

The model runs once on tensors of which only shapes and places matter. Products, attention,
activations and adapters are compiled functions of one address, as are some of vLLM's and PyTorch's
operators here (rora_serve.engine.row_functions); views need nothing. A model that does anything
else is not recorded: nothing of a step is ever left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rora_serve.engine.large_outputs import lend
from rora_serve.engine.pages import new_memory
from rora_serve.engine.row_functions import RowFunctions
from rora_serve.engine.threads import Threads, job_at


class NotRecordableError(Exception):
    """The model does something that no compiled function here does."""


class Call(NamedTuple):
    """A compiled function's address, and what it is called with."""

    function: int
    job: Any


class Recording(NamedTuple):
    """Calls that make `output` of the inputs' numbers, as long as `kept` is kept."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    calls: Sequence[Call]
    kept: object


def record(
    run: Callable[..., Any], shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], threads: Threads
) -> Recording:
    """Record what `run` does with inputs of these shapes, without doing it.

    Args: threads: that operators' functions run on.
    Raises: NotRecordableError: see there; it names what is done.
    """
    recorder = _Recorder(threads)
    inputs = tuple(recorder.new(shape, dtype) for shape, dtype in shapes)
    with Threads.noting(recorder.note), recorder:
        output = run(*inputs)
    if not isinstance(output, Tensor):
        raise NotRecordableError(f"the model returns {type(output).__name__}, no tensor")
    return Recording(inputs, output, recorder.calls, recorder.kept)


_aten: Any = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default,
}  # fmt: skip
_COPIES = {_aten.clone.default, _aten.contiguous.default}


class _Recorder(TorchDispatchMode):
    """Sees every operator, and every call of a compiled function."""

    def __init__(self, threads: Threads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.kept: list[object] = []
        self._functions = RowFunctions(threads, self.kept.append)
        self._free: dict[int, list[memoryview]] = {}

    def note(self, function: int, job: Any) -> None:
        """Note a call; what comes after it, on the same threads, is one of its own."""
        after, after_job = getattr(job, "after", 0), getattr(job, "after_job", 0)
        if after:
            job.after = job.after_job = 0
        self.calls.append(Call(function, job))
        if after:
            self.calls.append(Call(after, job_at(after, after_job)))

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor in memory that is kept, and used again once nothing refers to it.

        What comes later in a step may lie where something was that nobody reads any more.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(num_bytes, [])
        if free:
            memory = free.pop()
        else:
            memory = new_memory(num_bytes)
            self.kept.append(memory)
        return lend(memory, shape, dtype, free.append)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func in _ALLOCATIONS:
            like = func(*args, **options)
            if not like.is_contiguous() or not like.numel():
                raise NotRecordableError(f"{func} makes {list(like.shape)} in an order of its own")
            return self.new(like.shape, like.dtype)
        if not options and self._functions.run(func, args):
            return None
        if func._schema.is_mutable:
            raise NotRecordableError(f"there is no compiled function for {func}")
        found = func(*args, **options)
        places = {_place(tensor) for tensor in _tensors(args)}
        outputs = list(_tensors([found]))
        if outputs and all(_place(tensor) in places for tensor in outputs):
            return found
        if func in _COPIES and found.is_contiguous():
            copied = self.new(found.shape, found.dtype)
            if self._functions.copy(copied, args[0]):
                return copied
        raise NotRecordableError(f"there is no compiled function for {func}")


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
