"""Products of float32 rows and a weight of the base model, for the few rows of decoding.

vLLM multiplies by oneDNN. On two cores its product takes a fifth longer than this one where rows
are few, and within 3 % as long where they are many (docs/decisions/0011). And here a row's numbers
are the same, to the last bit, whichever rows are beside it: each sum is made in one order.

A weight lies in panels of as many of its rows as a tile has columns, so that it is read in order,
and a thread that is done with its own part takes panels from the others', which another process
may hold up.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels. The import compiles for a second the first time on a machine, then numba's cache has it.
"""

import ctypes
from typing import Any, Protocol

import numpy as np
import torch
from numba import carray, cfunc, types
from torch import Tensor

from rora_serve.engine.instructions import (
    CACHE_LINE,
    HAS_AVX2,
    HAS_AVX512,
    LANES,
    call_address,
    call_with,
    compiled,
    int64_fields,
    record_of,
    take,
    this_thread,
)
from rora_serve.engine.large_outputs import LargeOutputs
from rora_serve.engine.threads import Threads, declare
from rora_serve.engine.tiles import new_multiply_tile

# A tile's sums leave registers for a row of the panel and a number of x: 24 of 32 with AVX-512,
# else 12 of 16.
_ROWS = 12 if HAS_AVX512 else 6
_VECTORS = 2
_COLUMNS = _VECTORS * LANES
# Inputs that are summed up at a time, at most: a sum's error grows with its length.
_DEPTH = 384


class Job(ctypes.Structure):
    """A product. Numbers and addresses, all int64.

    Args:
        x, x_stride, num_rows: address of [num_rows, in_features], bytes from row to row, and rows.
        y, y_stride: the same of [num_rows, num_panels * _COLUMNS], which is written.
        start: address of what is added to every row, [num_panels * _COLUMNS].
        in_features, num_panels: of the weight.
        panels: address of [num_panels, in_features, _COLUMNS].
        taken: address of the numbers of panels that were taken of each thread's part, 0 at first
            and a cache line apart.
        after, after_job: addresses of a C function that every thread calls once all of y is
            written, and of what it is called with; 0 for none.
        thread_num, num_threads, barrier: addresses of OpenMP's functions; 0 for one thread.

    All numbers are float32.
    """

    _fields_ = int64_fields(
        "x", "x_stride", "num_rows", "y", "y_stride", "start", "in_features", "num_panels",
        "panels", "taken", "after", "after_job", "thread_num", "num_threads", "barrier",
    )  # fmt: skip


_JOB = record_of(Job)


_multiply_tile = new_multiply_tile(_ROWS, _VECTORS)


@compiled
def _multiply_panel(job: Any, panel: Any, following: Any) -> None:
    """Write a panel's columns of all rows of y; ask for the panel that follows."""
    row_bytes = _COLUMNS * 4
    panel_bytes = job.in_features * row_bytes
    ahead = (following - panel) * panel_bytes
    num_tiles = (job.num_rows + _ROWS - 1) // _ROWS
    num_pieces = (job.in_features + _DEPTH - 1) // _DEPTH
    for tile in range(num_tiles):
        first = job.num_rows * tile // num_tiles
        num_rows = job.num_rows * (tile + 1) // num_tiles - first
        x = job.x + first * job.x_stride
        y = job.y + first * job.y_stride + panel * row_bytes
        start, start_stride = job.start + panel * row_bytes, 0
        for piece in range(num_pieces):
            k = job.in_features * piece // num_pieces
            length = job.in_features * (piece + 1) // num_pieces - k
            weight = job.panels + panel * panel_bytes + k * row_bytes
            _multiply_tile(
                num_rows, x + 4 * k, job.x_stride, weight, row_bytes, length, y, job.y_stride,
                start, start_stride, ahead,
            )  # fmt: skip
            start, start_stride = y, job.y_stride
        ahead = 0  # it was asked for once


@cfunc(types.void(types.CPointer(_JOB)), cache=True, error_model="numpy")
def _run(at: Any) -> None:
    """Take panels of the thread's own part until none is left, then those of others.

    Then do what comes after, which needs no parallel region of its own, 8 us each time.
    """
    job = carray(at, 1)[0]
    thread, num_threads = this_thread(job)
    for others in range(num_threads):
        owner = (thread + others) % num_threads
        begin = job.num_panels * owner // num_threads
        end = job.num_panels * (owner + 1) // num_threads
        taken = job.taken + owner * CACHE_LINE
        panel = begin + take(taken)
        while panel < end:
            following = begin + take(taken)
            _multiply_panel(job, panel, min(following, end - 1))
            panel = following
    if job.after:
        if num_threads > 1:
            call_address(job.barrier)
        call_with(job.after, job.after_job)


declare(_run.address, Job)


class Addition(Protocol):
    """What is added to a product on the same threads, before its caller has it."""

    @property
    def function(self) -> int:
        """The address of a C function of one address, that of a job."""

    def job_after(self, product: Job, shape: torch.Size) -> int:
        """Return the address of the job for rows x and y of a product; 0: nothing is added.

        Args: shape: of x as the product got it, before it was laid out by rows.
        """


_large_outputs = LargeOutputs()


class Product:
    """Multiplies rows by one weight of the base model.

    Args:
        weight: [out_features, in_features] float32. Its numbers are copied, by `pack` or at the
            first use.
        threads: to run on.

    Not for two threads at once, nor to be copied: there is one job, which is named by its address.
    """

    def __init__(self, weight: Tensor, threads: Threads) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight: Tensor | None = weight
        self._threads = threads
        num_panels = -(-self.out_features // _COLUMNS)
        self._width = num_panels * _COLUMNS
        # While a model is loaded, torch's default is the model's dtype.
        self._start = torch.zeros(self._width, dtype=torch.float32, device="cpu")
        self._bias: Tensor | None = None
        self._taken = np.zeros((threads.count, CACHE_LINE // 8), np.int64)
        self._job = Job(
            y_stride=4 * self._width,
            start=self._start.data_ptr(),
            in_features=self.in_features,
            num_panels=num_panels,
            taken=self._taken.ctypes.data,
            thread_num=threads.thread_num,
            num_threads=threads.num_threads,
            barrier=threads.barrier,
        )
        self._job_address = ctypes.addressof(self._job)
        self._addition: Addition | None = None

    def add(self, addition: Addition | None) -> None:
        """Let something be added to the output from now on; None: nothing."""
        self._addition = addition
        self._job.after = 0

    def pack(self) -> None:
        """Copy the weight into panels, which are all that is kept of it."""
        if self._weight is None:
            return
        weight = self._weight.detach()
        shape = (self._job.num_panels, self.in_features, _COLUMNS)
        self._panels = torch.empty(shape, dtype=torch.float32, device="cpu")
        whole, rest = divmod(self.out_features, _COLUMNS)
        panels = weight[: whole * _COLUMNS].view(whole, _COLUMNS, self.in_features)
        self._panels[:whole] = panels.transpose(1, 2)
        if rest:
            self._panels[whole] = 0
            self._panels[whole, :, :rest] = weight[whole * _COLUMNS :].T
        self._job.panels = self._panels.data_ptr()
        self._weight = None

    def __call__(self, x: Tensor, _: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + bias, and what is added to it.

        Args:
            x: [..., in_features] float32.
            _: the weight, or what vLLM left of it.
            bias: [out_features] float32.
        Raises: ValueError: x or bias is of another dtype or size.
        """
        shape = x.shape
        if len(shape) != 2:
            x = x.reshape(-1, shape[-1])
        num_rows, in_features = x.shape
        if x.dtype is not torch.float32 or in_features != self.in_features:
            raise ValueError(
                f"input {list(x.shape)} of {x.dtype}: [..., {self.in_features}] of torch.float32 "
                "is expected"
            )
        row_stride, stride = x.stride()
        if stride != 1:
            x = x.contiguous()
            row_stride = in_features
        if self._weight is not None:
            self.pack()
        # It may have been written to since the last time; while a step is recorded nothing is done.
        is_set = bias is self._bias and (bias is None or Threads.are_noted())
        if not is_set:
            self._set_bias(bias)
        y = _large_outputs.new(x, num_rows, self._width)
        job = self._job
        job.x, job.x_stride, job.num_rows = x.data_ptr(), 4 * row_stride, num_rows
        job.y = y.data_ptr()
        if self._addition is not None:
            job.after_job = self._addition.job_after(job, shape)
            job.after = self._addition.function if job.after_job else 0
        self._taken.fill(0)
        self._threads.run(_run.address, self._job_address)
        if self._width != self.out_features:
            y = y[:, : self.out_features].contiguous()
        return y if len(shape) == 2 else y.view(*shape[:-1], self.out_features)

    def _set_bias(self, bias: Tensor | None) -> None:
        if bias is None:
            self._start.zero_()
            self._bias = None
            return
        if bias.dtype != torch.float32 or bias.shape != (self.out_features,):
            raise ValueError(
                f"bias {list(bias.shape)} of {bias.dtype}: [{self.out_features}] of torch.float32 "
                "is expected"
            )
        self._start[: self.out_features].copy_(bias.detach())
        self._bias = bias


def new_product(weight: Tensor, threads: Threads) -> Product | None:
    """Return the product with a weight; None where vLLM's own is to be used.

    That is for other dtypes and other processors than x86's with AVX2, where nothing was measured.
    """
    if weight.dtype != torch.float32 or weight.dim() != 2 or not HAS_AVX2:
        return None
    return Product(weight, threads)
