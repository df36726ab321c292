"""Operators of vLLM and PyTorch as compiled functions of one address, for steps that are replayed.

A replayed step (rora_serve.engine.replay) runs nothing but such functions. Products, attention,
activations and adapters have theirs; what is here is what decoding needs besides, float32 only.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels.
Checked against: vLLM's and PyTorch's operators, tests/rora_serve/test_row_functions.py.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic
from torch import Tensor

from rora_serve.engine.instructions import (
    BITS_64,
    FLOAT,
    LANES,
    Builder,
    int64_fields,
    read_int,
    read_number,
    record_of,
    this_thread,
)
from rora_serve.engine.threads import Threads, declare

_FLOAT32 = np.float32(0)  # tells compiled functions what lies at an address
_Job = ctypes.Structure


class NormJob(ctypes.Structure):
    """RMSNorm of rows, or of the sum of two. Numbers and addresses, all int64.

    Args:
        x: address of [num_rows, width].
        residual: address of the same, to which x is added first; 0 for none.
        y: address of what is written; may be x.
        weight: address of [width].
        epsilon: address of what is added to the mean of squares.
        num_rows, width: the latter in whole vectors.
        thread_num, num_threads: addresses of OpenMP's functions; 0 for one thread.
    """

    _fields_ = int64_fields(
        "x", "residual", "y", "weight", "epsilon", "num_rows", "width", "thread_num", "num_threads"
    )


class RotateJob(ctypes.Structure):
    """Rotary position embedding of some heads of each row, in place.

    Args:
        x, x_stride: address of [num_rows, num_heads, head_dim] and bytes from row to row.
        num_rows, num_heads, head_dim: heads follow each other.
        positions: address of [num_rows] int64.
        table: address of cosines, [positions, half], beside sines, [positions, half].
        half: of the numbers of a head that are turned, in whole vectors; the first of them with the
            first of the other half.
        thread_num, num_threads: as NormJob's.
    """

    _fields_ = int64_fields(
        "x", "x_stride", "num_rows", "num_heads", "head_dim", "positions", "table", "half",
        "thread_num", "num_threads",
    )  # fmt: skip


class CopyJob(ctypes.Structure):
    """Rows to lay out one after the other.

    Args:
        x, x_stride: address of [num_rows, width] and bytes from row to row.
        y: address of [num_rows, width].
        num_rows, width: of both.
        thread_num, num_threads: as NormJob's.
    """

    _fields_ = int64_fields("x", "x_stride", "y", "num_rows", "width", "thread_num", "num_threads")


@intrinsic
def _norm_row(_: Any, x: Any, residual: Any, y: Any, weight: Any, epsilon: Any, length: Any) -> Any:
    """Write a row's norm; where there is a residual, add x to it first and norm that."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        x, residual, y, weight, epsilon, length = values
        to = Builder(builder, LANES)
        squares = to.zero()
        is_sum = builder.icmp_signed("!=", residual, BITS_64(0))
        with to.steps(BITS_64(0), length, LANES) as (i, ____):
            offset = to.times(i, 4)
            found = to.load(to.plus(x, offset), types.float32)
            with builder.if_else(is_sum) as (then, otherwise):
                with then:
                    at = to.plus(residual, offset)
                    total = builder.fadd(found, to.load(at, types.float32))
                    to.store(total, at, types.float32)
                    from_then = builder.block
                with otherwise:
                    from_otherwise = builder.block
            number = builder.phi(total.type)
            number.add_incoming(total, from_then)
            number.add_incoming(found, from_otherwise)
            builder.store(to.times_plus(number, number, builder.load(squares)), squares)
        count = builder.sitofp(length, FLOAT)
        mean = builder.fdiv(to.sum(builder.load(squares)), count)
        root = to.call("llvm.sqrt.f32", FLOAT, builder.fadd(mean, epsilon))
        scale = to.all(builder.fdiv(ir.Constant(FLOAT, 1.0), root))
        source = builder.select(is_sum, residual, x)
        with to.steps(BITS_64(0), length, LANES) as (i, ____):
            offset = to.times(i, 4)
            found = to.load(to.plus(source, offset), types.float32)
            scaled = builder.fmul(found, scale)
            product = builder.fmul(scaled, to.load(to.plus(weight, offset), types.float32))
            to.store(product, to.plus(y, offset), types.float32)

    arguments = [types.int64] * 4 + [types.float32, types.int64]
    return types.void(*arguments), generate


@intrinsic
def _turn(_: Any, x: Any, cosines: Any, sines: Any, half: Any) -> Any:
    """Turn each number of a head's first half with the one of its second half."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        x, cosines, sines, half = values
        to = Builder(builder, LANES)
        half_bytes = to.times(half, 4)
        with to.steps(BITS_64(0), half, LANES) as (i, ____):
            offset = to.times(i, 4)
            at, at_other = to.plus(x, offset), to.plus(x, half_bytes, offset)
            a, b = to.load(at, types.float32), to.load(at_other, types.float32)
            cosine = to.load(to.plus(cosines, offset), types.float32)
            sine = to.load(to.plus(sines, offset), types.float32)
            first = builder.fsub(builder.fmul(a, cosine), builder.fmul(b, sine))
            second = builder.fadd(builder.fmul(b, cosine), builder.fmul(a, sine))
            to.store(first, at, types.float32)
            to.store(second, at_other, types.float32)

    return types.void(*[types.int64] * 4), generate


@intrinsic
def _copy_bytes(_: Any, y: Any, x: Any, count: Any) -> Any:
    """Copy bytes that do not overlap."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        y, x, count = values
        to = Builder(builder, 1)
        pointers = [builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in (y, x)]
        is_volatile = ir.Constant(ir.IntType(1), 0)
        name = "llvm.memcpy.p0i8.p0i8.i64"
        to.call(name, ir.VoidType(), *pointers, count, is_volatile)

    return types.void(*[types.int64] * 3), generate


@cfunc(types.void(types.CPointer(record_of(NormJob))), cache=True, error_model="numpy")
def _norm(at: Any) -> None:
    job = carray(at, 1)[0]
    thread, num_threads = this_thread(job)
    epsilon = read_number(job.epsilon, _FLOAT32)
    row_bytes = 4 * job.width
    begin = job.num_rows * thread // num_threads
    for row in range(begin, job.num_rows * (thread + 1) // num_threads):
        offset = row * row_bytes
        residual = job.residual + offset if job.residual else 0
        _norm_row(job.x + offset, residual, job.y + offset, job.weight, epsilon, job.width)


@cfunc(types.void(types.CPointer(record_of(RotateJob))), cache=True, error_model="numpy")
def _rotate(at: Any) -> None:
    job = carray(at, 1)[0]
    thread, num_threads = this_thread(job)
    begin = job.num_rows * thread // num_threads
    for row in range(begin, job.num_rows * (thread + 1) // num_threads):
        cosines = job.table + read_int(job.positions, row) * 8 * job.half
        for head in range(job.num_heads):
            x = job.x + row * job.x_stride + 4 * head * job.head_dim
            _turn(x, cosines, cosines + 4 * job.half, job.half)


@cfunc(types.void(types.CPointer(record_of(CopyJob))), cache=True, error_model="numpy")
def _copy(at: Any) -> None:
    job = carray(at, 1)[0]
    thread, num_threads = this_thread(job)
    row_bytes = 4 * job.width
    begin = job.num_rows * thread // num_threads
    for row in range(begin, job.num_rows * (thread + 1) // num_threads):
        _copy_bytes(job.y + row * row_bytes, job.x + row * job.x_stride, row_bytes)


for _function, _type in ((_norm, NormJob), (_rotate, RotateJob), (_copy, CopyJob)):
    declare(_function.address, _type)


class RowFunctions:
    """Runs operators' arguments by the functions that stand for them.

    Args:
        threads: to run on.
        keep: is given what has to live as long as jobs do.
    """

    def __init__(self, threads: Threads, keep: Callable[[object], None]) -> None:
        self._threads = threads
        self._keep = keep
        self._shared = {"thread_num": threads.thread_num, "num_threads": threads.num_threads}
        ops: Any = torch.ops
        self._functions: Mapping[Any, Callable[..., bool]] = {
            ops._C.rms_norm.default: self.norm,
            ops._C.fused_add_rms_norm.default: self.norm_of_sum,
            ops._C.rotary_embedding.default: self.rotate,
        }

    def run(self, operator: Any, arguments: tuple[Any, ...]) -> bool:
        """Do what an operator that returns nothing does; tell whether there is a function for it.

        Args: operator: with its overload, as torch's dispatcher names it.
        """
        function = self._functions.get(operator)
        return function is not None and function(*arguments)

    def norm(self, y: Tensor, x: Tensor, weight: Tensor | None, epsilon: float) -> bool:
        """Write the norm of each row of x. Args: x, y: [..., width]. weight: [width]."""
        return self._norm(x, None, y, weight, epsilon)

    def norm_of_sum(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float
    ) -> bool:
        """Add x to residual, and write the norm of each row's sum to x."""
        return self._norm(x, residual, x, weight, epsilon)

    def _norm(
        self, x: Tensor, residual: Tensor | None, y: Tensor, weight: Tensor | None, epsilon: float
    ) -> bool:
        rows = [x, y] if residual is None else [x, y, residual]
        width = x.shape[-1]
        if weight is None or width % LANES or not all(map(_is_plain, [*rows, weight])):
            return False
        at_epsilon = np.array([epsilon], np.float32)
        self._keep((at_epsilon, weight))
        self._run(
            _norm,
            NormJob(
                x=x.data_ptr(),
                residual=0 if residual is None else residual.data_ptr(),
                y=y.data_ptr(),
                weight=weight.data_ptr(),
                epsilon=at_epsilon.ctypes.data,
                num_rows=x.numel() // width,
                width=width,
                **self._shared,
            ),
        )
        return True

    def rotate(
        self,
        positions: Tensor,
        query: Tensor,
        key: Tensor | None,
        head_dim: int,
        table: Tensor,
        is_halves: bool,  # noqa: FBT001
        first: int = 0,
        is_inverse: bool = False,  # noqa: FBT001, FBT002
    ) -> bool:
        """Turn queries' and keys' heads by their positions.

        Args:
            positions: [num_rows] int64.
            query, key: [num_rows, num_heads * head_dim].
            table: [positions, cosines and sines].
            is_halves: whether the first number is turned with the first of the second half, not
                with its neighbour.
        """
        half = table.shape[-1] // 2
        heads = [query] if key is None else [query, key]
        is_known = is_halves and not first and not is_inverse and half % LANES == 0
        has_rows = all(
            x.dim() == 2 and x.stride(1) == 1 and x.dtype == torch.float32 for x in heads
        )
        has_positions = positions.dim() == 1 and positions.dtype == torch.int64
        if not (is_known and has_rows and has_positions and _is_plain(table)):
            return False
        self._keep((positions, table))
        for x in heads:
            self._run(
                _rotate,
                RotateJob(
                    x=x.data_ptr(),
                    x_stride=4 * x.stride(0),
                    num_rows=len(x),
                    num_heads=x.shape[1] // head_dim,
                    head_dim=head_dim,
                    positions=positions.data_ptr(),
                    table=table.data_ptr(),
                    half=half,
                    **self._shared,
                ),
            )
        return True

    def copy(self, y: Tensor, x: Tensor) -> bool:
        """Copy rows that lie apart. Args: x, y: [num_rows, ...], a row's numbers are neighbours."""
        if not _is_plain(y) or x.dtype != torch.float32 or not x[0].is_contiguous():
            return False
        self._run(
            _copy,
            CopyJob(
                x=x.data_ptr(),
                x_stride=4 * x.stride(0),
                y=y.data_ptr(),
                num_rows=len(x),
                width=x[0].numel(),
                **self._shared,
            ),
        )
        return True

    def _run(self, function: Any, job: _Job) -> None:
        self._threads.run(function.address, ctypes.addressof(job))


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous()
