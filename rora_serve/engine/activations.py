"""SwiGLU's activation in one pass, silu(gate) * up, on torch's threads.

vLLM uses PyTorch's operators for it on CPUs: two passes, each with memory of its own, 42 us a layer
in steps of 32 rows of SmolLM2-135M.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels, and a model that is made from then on has this activation.
"""

import ctypes
import functools
from typing import Any

import torch
from numba import carray, cfunc, types
from numba.extending import intrinsic
from torch import Tensor
from vllm.model_executor.layers.activation import SiluAndMul

from rora_serve.engine.instructions import (
    BITS_64,
    HAS_AVX2,
    LANES,
    Builder,
    int64_fields,
    record_of,
    this_thread,
)
from rora_serve.engine.large_outputs import LargeOutputs
from rora_serve.engine.threads import Threads, declare


class Job(ctypes.Structure):
    """Rows to activate. Numbers and addresses, all int64.

    Args:
        x, x_stride: address of [num_rows, 2 * width] and bytes from row to row.
        y: address of [num_rows, width].
        num_rows, width: the latter in whole vectors.
        thread_num, num_threads: addresses of OpenMP's functions; 0 for one thread.

    All numbers are float32.
    """

    _fields_ = int64_fields("x", "x_stride", "y", "num_rows", "width", "thread_num", "num_threads")


_JOB = record_of(Job)


@intrinsic
def _activate(_: Any, gate: Any, up: Any, y: Any, length: Any) -> Any:
    """Write y = silu(gate) * up, for numbers at addresses, in whole vectors."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        gate, up, y, length = values
        to = Builder(builder, LANES)
        zero, one = to.constant(0.0), to.constant(1.0)
        with to.steps(BITS_64(0), length, LANES) as (i, ____):
            offset = to.times(i, 4)
            g = to.load(to.plus(gate, offset), types.float32)
            # 1 / (1 + exp(-g)), without a power that could be too large.
            is_below = builder.fcmp_ordered("<", g, zero)
            power = to.exp(builder.select(is_below, g, builder.fsub(zero, g)))
            part = builder.select(is_below, power, one)
            silu = builder.fmul(g, builder.fdiv(part, builder.fadd(one, power)))
            product = builder.fmul(silu, to.load(to.plus(up, offset), types.float32))
            to.store(product, to.plus(y, offset), types.float32)

    return types.void(*[types.int64] * 4), generate


@cfunc(types.void(types.CPointer(_JOB)), cache=True, error_model="numpy")
def _run(at: Any) -> None:
    """Take an equal share of all vectors, wherever in a row it begins and ends."""
    job = carray(at, 1)[0]
    thread, num_threads = this_thread(job)
    num_vectors = job.width // LANES
    total = job.num_rows * num_vectors
    vector, end = total * thread // num_threads, total * (thread + 1) // num_threads
    while vector < end:
        row, first = vector // num_vectors, vector % num_vectors
        count = min(num_vectors - first, end - vector)
        x = job.x + row * job.x_stride + 4 * LANES * first
        y = job.y + 4 * LANES * vector
        _activate(x, x + 4 * job.width, y, count * LANES)
        vector += count


declare(_run.address, Job)


class Activation:
    """silu(gate) * up of rows of both.

    Args: threads: to run on.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._large_outputs = LargeOutputs()
        self._job = Job(thread_num=threads.thread_num, num_threads=threads.num_threads)
        self._job_address = ctypes.addressof(self._job)

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return silu(x[:, :width]) * x[:, width:], [num_rows, width]; None: there is no code.

        Args: x: [num_rows, 2 * width] float32, a width of whole vectors.
        """
        if x.dim() != 2 or x.dtype is not torch.float32:
            return None
        num_rows, both = x.shape
        row_stride, stride = x.stride()
        if both % (2 * LANES) or stride != 1:
            return None
        y = self._large_outputs.new(x, num_rows, both // 2)
        job = self._job
        job.x, job.x_stride, job.y = x.data_ptr(), 4 * row_stride, y.data_ptr()
        job.num_rows, job.width = num_rows, both // 2
        self._threads.run(_run.address, self._job_address)
        return y


@functools.cache
def _activation() -> Activation:
    return Activation(Threads(torch.get_num_threads()))


@SiluAndMul.register_oot
class CompiledSiluAndMul(SiluAndMul):
    """vLLM's layer, with our function where it can."""

    def forward_cpu(self, x: Tensor) -> Tensor:
        """Return silu(gate) * up. Args: x: [..., 2 * width], gate and up."""
        y = _activation()(x) if HAS_AVX2 else None
        return super().forward_cpu(x) if y is None else y


# By which vLLM's `custom_ops` switches it off.
CompiledSiluAndMul.name = "silu_and_mul"  # type: ignore[attr-defined]
