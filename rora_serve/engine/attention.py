"""Attention of decoding: one new token of each sequence, to all that its cache holds.

vLLM's own function for CPUs reads the cache at 20 to 30 GB/s on two cores that read memory at 50 to
80 (docs/decisions/0013). This one reads it in the order in which it lies. Each block of the cache
is a unit of its own, whose result is a maximum, a sum and a row for each head; a second, short pass
puts a sequence's blocks together. So a long sequence alone keeps all threads busy, and a token's
numbers are the same, to the last bit, whichever sequences are beside it.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels.
"""

import ctypes
import math
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rora_serve.engine.instructions import (
    BITS_64,
    CACHE_LINE,
    HAS_AVX2,
    HAS_AVX512,
    LANES,
    Builder,
    call_address,
    compiled,
    inlined,
    int64_fields,
    read_int,
    read_int32,
    read_number,
    record_of,
    take,
    this_thread,
    write_int,
    write_number,
)
from rora_serve.engine.threads import Threads, declare
from rora_serve.engine.tiles import new_multiply_tile

# A tile's sums leave registers for a row of keys or values and a number of the other side: 24 of 32
# with AVX-512, else 12 of 16.
_HEADS = 6
_VECTORS = 4 if HAS_AVX512 else 2
_AHEAD = 2048  # bytes of the cache that are asked for before they are read


def can_attend(dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Tell whether there is code for a cache; on other processors nothing was measured."""
    is_whole = head_dim % LANES == block_size % LANES == 0
    return dtype == torch.float32 and is_whole and HAS_AVX2


class Job(ctypes.Structure):
    """One layer's attention in one step. Numbers and addresses, all int64.

    Args:
        query, query_stride: address of [num_seqs, num_kv_heads * group, head_dim] and bytes from
            sequence to sequence.
        output, output_stride: the same of what is written.
        key, key_stride, value, value_stride: the same of [num_seqs, num_kv_heads, head_dim], which
            are put into the cache; 0 where they are there already.
        slots: address of [num_seqs] int64, where in the cache; below 0 for nowhere.
        cache, block_bytes: address and bytes from block to block of [num_blocks, num_kv_heads,
            keys and values], the former [head_dim, block_size], the latter [block_size, head_dim].
        head_bytes: from one head's keys to the next one's.
        block_size, head_dim: multiples of a vector.
        num_kv_heads, group: heads of keys, and of queries for each.
        num_seqs: in the step.
        lengths: address of [num_seqs] int32, tokens of each sequence, with the new one.
        table, table_stride: address of the blocks of each sequence, int32, and bytes from one
            sequence to the next.
        first_blocks: address of [num_seqs + 1] int64, blocks of all sequences before.
        scale: address of what scores are multiplied by.
        partial: address of [blocks of all, num_kv_heads, group, head_dim + 2], for what is between
            the passes: rows, maxima and sums.
        scores, scores_bytes: address of each thread's [group, block_size], and bytes of one.
        zeros: address of head_dim or block_size zeros, whichever are more.
        taken: address of the numbers of units that were taken of each thread's part, 0 before and
            after, and a cache line apart.
        thread_num, num_threads, barrier: addresses of OpenMP's functions; all 0 for one thread.

    All other numbers are float32.
    """

    _fields_ = int64_fields(
        "query", "query_stride", "output", "output_stride", "key", "key_stride", "value",
        "value_stride", "slots", "cache", "block_bytes", "head_bytes", "block_size", "head_dim",
        "num_kv_heads", "group", "num_seqs", "lengths", "table", "table_stride", "first_blocks",
        "scale", "partial", "scores", "scores_bytes", "zeros", "taken", "thread_num",
        "num_threads", "barrier",
    )  # fmt: skip


# What is the same for all layers of a step, if their heads are alike.
STEP_FIELDS = (
    "slots", "num_seqs", "lengths", "table", "table_stride", "first_blocks", "partial", "scores",
    "scores_bytes", "zeros", "taken", "thread_num", "num_threads", "barrier",
)  # fmt: skip
_JOB = record_of(Job)

_FLOAT32 = np.float32(0)  # tells compiled functions what lies at an address
_multiply_tile = new_multiply_tile(_HEADS, _VECTORS)
_multiply_vector = new_multiply_tile(_HEADS, 1)


@intrinsic
def _soften(_: Any, scores: Any, length: Any, scale: Any, maximum: Any, total: Any) -> Any:
    """Make scores exp(scale * scores - their maximum), and write that maximum and their sum.

    Args:
        scores, maximum, total: addresses.
        length: of scores. Up to the next whole vector they become 0.
    """

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        scores, length, scale, maximum, total = values
        to = Builder(builder, LANES)
        lowest = to.constant(-math.inf)
        largest, summed = to.zero(), to.zero()
        builder.store(lowest, largest)
        all_scale = to.all(scale)

        end = to.plus(length, BITS_64(LANES - 1))
        with to.steps(BITS_64(0), end, LANES) as (i, ____):
            at = to.plus(scores, to.times(i, 4))
            scaled = builder.fmul(to.load(at, types.float32), all_scale)
            valid = builder.select(to.is_below(i, length), scaled, lowest)
            to.store(valid, at, types.float32)
            builder.store(to.larger(valid, builder.load(largest)), largest)
        top = to.largest(builder.load(largest))
        all_top = to.all(top)
        with to.steps(BITS_64(0), end, LANES) as (i, ____):
            at = to.plus(scores, to.times(i, 4))
            power = to.exp(builder.fsub(to.load(at, types.float32), all_top))
            to.store(power, at, types.float32)
            builder.store(builder.fadd(power, builder.load(summed)), summed)
        one = Builder(builder, 1)
        one.store(top, maximum, types.float32)
        one.store(to.sum(builder.load(summed)), total, types.float32)

    return types.void(types.int64, types.int64, types.float32, types.int64, types.int64), generate


@intrinsic
def _combine(
    _: Any, y: Any, x: Any, x_stride: Any, weights: Any, count: Any, length: Any, divisor: Any
) -> Any:
    """Write to y the sum of weights[i] x[i], over a divisor.

    Args:
        y, x, weights: addresses. Weights lie as far from each other as rows of x.
        count: of rows.
        length: of a row, whole vectors.
    """

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        y, x, x_stride, weights, count, length, divisor = values
        to, one = Builder(builder, LANES), Builder(builder, 1)
        with to.steps(BITS_64(0), length, LANES) as (c, ____):
            total, offset = to.zero(), to.times(c, 4)
            with to.steps(BITS_64(0), count, 1) as (i, ____):
                row = to.times(i, x_stride)
                weight = to.all(one.load(to.plus(weights, row), types.float32))
                found = to.load(to.plus(x, row, offset), types.float32)
                builder.store(to.times_plus(weight, found, builder.load(total)), total)
            mean = builder.fdiv(builder.load(total), to.all(divisor))
            to.store(mean, to.plus(y, offset), types.float32)

    return types.void(*[types.int64] * 6, types.float32), generate


@compiled
def _multiply(
    job: Any, num_rows: Any, x: Any, x_stride: Any, w: Any, length: Any, width: Any, y: Any,
    y_stride: Any, used: Any,
) -> None:  # fmt: skip
    """Write y = x W for the heads of a group, and W's first `used` columns in whole vectors.

    Args: width: of W, whose rows follow each other.
    """
    w_stride = 4 * width
    num_tiles = (num_rows + _HEADS - 1) // _HEADS
    for tile in range(num_tiles):
        first = num_rows * tile // num_tiles
        count = num_rows * (tile + 1) // num_tiles - first
        from_x, to_y = x + first * x_stride, y + first * y_stride
        c = 0
        while c < used:
            if c + _VECTORS * LANES <= width and c + (_VECTORS - 1) * LANES < used:
                _multiply_tile(
                    count, from_x, x_stride, w + 4 * c, w_stride, length, to_y + 4 * c, y_stride,
                    job.zeros, 0, _AHEAD,
                )  # fmt: skip
                c += _VECTORS * LANES
            else:
                _multiply_vector(
                    count, from_x, x_stride, w + 4 * c, w_stride, length, to_y + 4 * c, y_stride,
                    job.zeros, 0, _AHEAD,
                )  # fmt: skip
                c += LANES


@inlined
def _row_bytes(job: Any) -> Any:
    return 4 * (job.head_dim + 2)


@compiled
def _put(job: Any, seq: Any, head: Any, keys: Any, values: Any, offset: Any) -> None:
    """Put a token's key and value of one head into its block."""
    key = job.key + seq * job.key_stride + 4 * head * job.head_dim
    value = job.value + seq * job.value_stride + 4 * head * job.head_dim
    for d in range(job.head_dim):
        write_number(keys + 4 * (d * job.block_size + offset), read_number(key + 4 * d, _FLOAT32))
        write_number(values + 4 * (offset * job.head_dim + d), read_number(value + 4 * d, _FLOAT32))


@compiled
def _attend(job: Any, seq: Any, head: Any, block: Any, unit: Any, scores: Any) -> None:
    """Attend to one block of a sequence, for one head of keys."""
    length = read_int32(job.lengths, seq)
    begin = block * job.block_size
    count = min(job.block_size, length - begin)
    physical = read_int32(job.table + seq * job.table_stride, block)
    keys = job.cache + physical * job.block_bytes + head * job.head_bytes
    values = keys + 4 * job.block_size * job.head_dim
    if job.key and begin + count == length:
        slot = read_int(job.slots, seq)
        if slot >= 0:
            at = job.cache + slot // job.block_size * job.block_bytes + head * job.head_bytes
            _put(job, seq, head, at, at + values - keys, slot % job.block_size)
    query = job.query + seq * job.query_stride + 4 * head * job.group * job.head_dim
    row_bytes, width = 4 * job.head_dim, 4 * job.block_size
    _multiply(
        job, job.group, query, row_bytes, keys, job.head_dim, job.block_size, scores, width, count
    )
    partial = job.partial + unit * job.group * _row_bytes(job)
    scale = read_number(job.scale, _FLOAT32)
    for i in range(job.group):
        maximum = partial + i * _row_bytes(job) + row_bytes
        _soften(scores + i * width, count, scale, maximum, maximum + 4)
    _multiply(
        job, job.group, scores, width, values, count, job.head_dim, partial, _row_bytes(job),
        job.head_dim,
    )  # fmt: skip


@compiled
def _put_together(job: Any, seq: Any, head: Any) -> None:
    """Write one head's output of a sequence, out of what its blocks gave."""
    first, last = read_int(job.first_blocks, seq), read_int(job.first_blocks, seq + 1)
    output = job.output + seq * job.output_stride + 4 * head * job.head_dim
    if first == last:  # a row that is none
        for d in range(job.head_dim):
            write_number(output + 4 * d, _FLOAT32)
        return
    stride = job.num_kv_heads * job.group * _row_bytes(job)
    row = job.partial + first * stride + head * _row_bytes(job)
    maxima = row + 4 * job.head_dim
    largest = read_number(maxima, _FLOAT32)
    for i in range(1, last - first):
        largest = max(largest, read_number(maxima + i * stride, _FLOAT32))
    total = np.float32(0)
    for i in range(last - first):
        weight = np.float32(math.exp(read_number(maxima + i * stride, _FLOAT32) - largest))
        total += weight * read_number(maxima + i * stride + 4, _FLOAT32)
        write_number(maxima + i * stride, weight)
    _combine(output, row, stride, maxima, last - first, job.head_dim, total)


@inlined
def _sequence(job: Any, block: Any) -> Any:
    """Return the sequence that has a block, counted over all sequences."""
    low, high = 0, job.num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if read_int(job.first_blocks, middle) <= block:
            low = middle
        else:
            high = middle
    return low


@cfunc(types.void(types.CPointer(_JOB)), cache=True, error_model="numpy")
def _run(at: Any) -> None:
    """Take blocks of the thread's own part until none is left, then others'; put rows together."""
    job = carray(at, 1)[0]
    thread, num_threads = this_thread(job)
    scores = job.scores + thread * job.scores_bytes
    num_units = read_int(job.first_blocks, job.num_seqs) * job.num_kv_heads
    for others in range(num_threads):
        owner = (thread + others) % num_threads
        begin = num_units * owner // num_threads
        end = num_units * (owner + 1) // num_threads
        unit = begin + take(job.taken + owner * CACHE_LINE)
        while unit < end:
            block, head = unit // job.num_kv_heads, unit % job.num_kv_heads
            seq = _sequence(job, block)
            _attend(job, seq, head, block - read_int(job.first_blocks, seq), unit, scores)
            unit = begin + take(job.taken + owner * CACHE_LINE)
    if num_threads > 1:
        call_address(job.barrier)
    write_int(job.taken + thread * CACHE_LINE, 0)  # nobody takes anything any more
    num_rows = job.num_seqs * job.num_kv_heads * job.group
    for row in range(num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads):
        heads = job.num_kv_heads * job.group
        _put_together(job, row // heads, row % heads)


declare(_run.address, Job)


class Workspace:
    """Memory and threads that the attention of all layers uses, one after the other.

    Args: threads: to run on.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._taken = np.zeros((threads.count, CACHE_LINE // 8), np.int64)
        self._fields = {
            "taken": self._taken.ctypes.data,
            "thread_num": threads.thread_num,
            "num_threads": threads.num_threads,
            "barrier": threads.barrier,
        }
        self._numbers: dict[str, NDArray[np.float32]] = {}
        self.has_all_threads = threads.count == threads.asked_for
        self.version = 0  # of the memory; what was lent from an older one is gone

    def lend(self, job: Job, num_blocks: int) -> None:
        """Point a job at memory that is enough for the blocks of all its sequences.

        It is valid as long as `version` stays.
        """
        width = job.group * job.block_size
        row = job.head_dim + 2
        self._reserve("partial", num_blocks * job.num_kv_heads * job.group * row)
        self._reserve("scores", self._threads.count * width)
        self._reserve("zeros", max(job.head_dim, job.block_size))
        job.scores_bytes = 4 * width
        for name, address in self._fields.items():
            setattr(job, name, address)

    def _reserve(self, name: str, count: int) -> None:
        if name not in self._numbers or count > len(self._numbers[name]):
            self._numbers[name] = np.zeros(count + count // 2, np.float32)
            self._fields[name] = self._numbers[name].ctypes.data
            self.version += 1

    def run(self, job: int) -> None:
        """Attend; the job is named by its address."""
        self._threads.run(_run.address, job)
