"""LargeOutputs: memory for what layers return for long prompts, used again and again.

What is larger than 32 MiB C's allocator takes from the system and gives back at once, whatever its
settings, and the system fills each page with zeros: 5 % of a step of 4,000 tokens. Its setting to
keep all (mallopt's M_MMAP_MAX) lets the heap grow instead, since aligned pieces leave gaps that the
next one does not fit into.
"""

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rora_serve.engine.pages import new_memory
from rora_serve.engine.threads import Threads

_LARGE_BYTES = 32 << 20  # from here on C's allocator keeps nothing
# More is for what hardly ever comes, as are the logits of a long prompt's every token.
_MOST_KEPT = 256 << 20


def lend(
    memory: memoryview,
    shape: Sequence[int],
    dtype: torch.dtype,
    take_back: Callable[[memoryview], None],
) -> Tensor:
    """Return a tensor in memory that is given to `take_back` when nothing refers to it any more."""
    # What tensors keep for as long as they, or others on their memory, live.
    lent = (ctypes.c_char * len(memory)).from_buffer(memory)
    weakref.finalize(lent, take_back, memory).atexit = False
    return torch.frombuffer(lent, dtype=dtype, count=math.prod(shape)).view(*shape)


class LargeOutputs:
    """Makes tensors in memory of which one piece is kept, the largest that was needed.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self._kept: memoryview | None = None

    def new(self, x: Tensor, num_rows: int, width: int) -> Tensor:
        """Return [num_rows, width], of any numbers, for what a layer makes of x, float32.

        Large memory comes back when nothing refers to the tensor.
        Raises: OSError: the system has no more of it.
        """
        count = num_rows * width
        if 4 * count < _LARGE_BYTES or Threads.are_noted():  # whose memory must not come back
            return x.new_empty(num_rows, width)
        memory, self._kept = self._kept, None
        if memory is None or len(memory) < 4 * count:
            memory = new_memory(4 * count)
        return lend(memory, (num_rows, width), torch.float32, self._take_back)

    def _take_back(self, memory: memoryview) -> None:
        if len(self._kept or b"") < len(memory) <= _MOST_KEPT:
            self._kept = memory
