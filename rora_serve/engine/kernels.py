"""The compiled loop for short groups of rows: y[row] += (scaling * x[row] Aᵀ) Bᵀ at real ranks.

A row alone reads every factor once and does two operations with each number, so that memory decides
the speed: factors are read in the order in which they lie, where they lie, in the dtype that they
have. Sums are float32 whatever that is.

The loop is a C function of one address, that of a Job, so that calling it costs a microsecond. It
works on addresses and on vectors of its own: numba's arrays count references and check indices,
which costs more than the sums of a short row, and its loops can not ask for memory ahead.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels.
"""

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, models, register_model

from rora_serve.engine.slots import Element
from rora_serve.engine.threads import Threads

_LANES = 16  # numbers of a vector, a cache line of float32
_CHUNK = 1024  # columns of y that are summed up in the first-level cache
_BLOCK = 8  # rows that share one reading of B
_AHEAD = 4096  # bytes of factors that are asked for before they are read
# All that lets sums be vectorised; not-a-number stays what it is.
_FAST = {"reassoc", "nsz", "contract", "arcp"}
_FLOAT32, _BFLOAT16 = int(Element.F32), int(Element.BF16)

_SCRATCH_BYTES = _BLOCK * _CHUNK * 4  # that every thread sums up in

# What tells compiled functions which numbers lie at an address. numba has neither 16-bit float, so
# that two integers stand for them.
_LIKE_FLOAT32, _LIKE_BFLOAT16, _LIKE_FLOAT16 = np.float32(0), np.uint16(0), np.int16(0)
_LIKE = {
    Element.F32: _LIKE_FLOAT32,
    Element.BF16: _LIKE_BFLOAT16,
    Element.F16: _LIKE_FLOAT16,
}


class Job(ctypes.Structure):
    """A layer's short groups of rows in one step. Numbers and addresses, all int64.

    Args:
        x, x_stride: address of [num_rows, in_features] and bytes from row to row; of an embedding,
            [num_rows] int64 tokens.
        y, y_stride: the same of [num_rows, out_features].
        is_embedding: 1 or 0.
        in_features: columns of A; of an embedding, its vocabulary.
        num_parts, columns: of the layer; [num_parts, 2] int64, first column and number of columns.
        num_groups: of rows.
        rows: [n] int64, rows of x and y, group by group.
        starts: [num_groups + 1] int64, where each group begins in `rows`.
        blocks: [num_groups] int64, addresses of each group's factors; 0 where it has none.
        elements: [num_groups] int64, dtypes of the blocks, as Element counts them.
        ranks, scalings: [num_groups, largest num_parts] int64 and float32.
        ranks_stride: largest num_parts of all layers.
        shrunk, shrunk_stride: [n, shrunk_stride] float32, for what is between A and B.
        scratch: _SCRATCH_BYTES a thread.
        thread_num, num_threads, barrier: functions of OpenMP; all 0 outside of its regions.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "x", "x_stride", "y", "y_stride", "is_embedding", "in_features", "num_parts", "columns",
            "num_groups", "rows", "starts", "blocks", "elements", "ranks", "scalings",
            "ranks_stride", "shrunk", "shrunk_stride", "scratch", "thread_num", "num_threads",
            "barrier",
        )
    ]  # fmt: skip


_JOB = types.Record.make_c_struct([(field[0], types.int64) for field in Job._fields_])


class _Vector(types.Type):  # type: ignore[misc]  # numba has no types of its own
    """16 float32, in as many registers as a processor needs for them."""

    def __init__(self) -> None:
        super().__init__(name="rora_vector")


_vector = _Vector()
_FLOAT, _BITS_32, _BITS_16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_FLOATS = ir.VectorType(_FLOAT, _LANES)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _FLOATS)


def _pointer(builder: Any, address: Any, index: Any, like: Any, lanes: int) -> Any:
    """Return LLVM's pointer to the element at `index` after `address`."""
    stored = _FLOAT if like == types.float32 else _BITS_16
    element = builder.gep(builder.inttoptr(address, stored.as_pointer()), [index])
    if lanes == 1:
        return element
    return builder.bitcast(element, ir.VectorType(stored, lanes).as_pointer())


def _alike(number: int, kind: Any) -> Any:
    """Return a constant of an integer type, or a vector of such."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def _wide(kind: Any, lanes: int) -> Any:
    return kind if lanes == 1 else ir.VectorType(kind, lanes)


def _loaded(builder: Any, pointer: Any, like: Any, lanes: int) -> Any:
    found = builder.load(pointer, align=like.bitwidth // 8)
    if like == types.uint16:
        bits = _wide(_BITS_32, lanes)
        shifted = builder.shl(builder.zext(found, bits), _alike(16, bits))
        return builder.bitcast(shifted, _wide(_FLOAT, lanes))
    if like == types.int16:
        halves = builder.bitcast(found, _wide(ir.HalfType(), lanes))
        return builder.fpext(halves, _wide(_FLOAT, lanes))
    return found


def _rounded(builder: Any, number: Any, like: Any, lanes: int) -> Any:
    """Round to the nearest, ties to even."""
    if like == types.uint16:
        kind = _wide(_BITS_32, lanes)
        bits = builder.bitcast(number, kind)
        last = builder.and_(builder.lshr(bits, _alike(16, kind)), _alike(1, kind))
        nearest = builder.add(bits, builder.add(last, _alike(0x7FFF, kind)))
        is_nan = builder.fcmp_unordered("uno", number, number)
        kept = builder.lshr(builder.select(is_nan, bits, nearest), _alike(16, kind))
        return builder.trunc(kept, _wide(_BITS_16, lanes))
    if like == types.int16:
        halves = builder.fptrunc(number, _wide(ir.HalfType(), lanes))
        return builder.bitcast(halves, _wide(_BITS_16, lanes))
    return number


def _function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


@intrinsic
def _size(_: Any, like: Any) -> Any:
    """Bytes of an element."""

    def generate(context: Any, __: Any, ___: Any, ____: Any) -> Any:
        return context.get_constant(types.int64, like.bitwidth // 8)

    return types.int64(like), generate


@intrinsic
def _int(_: Any, address: Any, index: Any) -> Any:
    """The int64 at `index` after `address`."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(pointer, [values[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _get(_: Any, address: Any, index: Any, like: Any) -> Any:
    """The number at `index` after `address`, as float32."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        return _loaded(builder, _pointer(builder, values[0], values[1], like, 1), like, 1)

    return types.float32(types.int64, types.int64, like), generate


@intrinsic
def _put(_: Any, address: Any, index: Any, number: Any, like: Any) -> Any:
    """Round a float32 and write it at `index` after `address`."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        pointer = _pointer(builder, values[0], values[1], like, 1)
        builder.store(_rounded(builder, values[2], like, 1), pointer)

    return types.void(types.int64, types.int64, types.float32, like), generate


@intrinsic
def _get_vector(_: Any, address: Any, index: Any, like: Any) -> Any:
    """16 numbers from `index` after `address` on."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        return _loaded(builder, _pointer(builder, values[0], values[1], like, _LANES), like, _LANES)

    return _vector(types.int64, types.int64, like), generate


@intrinsic
def _put_vector(_: Any, address: Any, index: Any, numbers: Any, like: Any) -> Any:
    """Round 16 numbers and write them from `index` after `address` on."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        pointer = _pointer(builder, values[0], values[1], like, _LANES)
        rounded = _rounded(builder, values[2], like, _LANES)
        builder.store(rounded, pointer, align=like.bitwidth // 8)

    return types.void(types.int64, types.int64, _vector, like), generate


@intrinsic
def _all(_: Any, number: Any) -> Any:
    """A vector of one number."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), values[0], _BITS_32(0))
        lanes = ir.Constant(ir.VectorType(_BITS_32, _LANES), [0] * _LANES)
        return builder.shuffle_vector(one, one, lanes)

    return _vector(types.float32), generate


@intrinsic
def _times_plus(_: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of vectors, in one rounding where the processor can."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        function = _function(builder, f"llvm.fmuladd.v{_LANES}f32", _FLOATS, *[_FLOATS] * 3)
        return builder.call(function, values)

    return _vector(_vector, _vector, _vector), generate


@intrinsic
def _sum(_: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sum of all numbers of four vectors."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        total = builder.fadd(builder.fadd(values[0], values[1]), builder.fadd(values[2], values[3]))
        function = _function(
            builder, f"llvm.vector.reduce.fadd.v{_LANES}f32", _FLOAT, _FLOAT, _FLOATS
        )
        return builder.call(function, [_FLOAT(0), total], fastmath=("reassoc",))

    return types.float32(_vector, _vector, _vector, _vector), generate


@intrinsic
def _prefetch(_: Any, address: Any) -> Any:
    """Ask for a cache line that will be read soon."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        function = _function(builder, "llvm.prefetch.p0i8", ir.VoidType(), byte, *[_BITS_32] * 3)
        pointer = builder.inttoptr(values[0], byte)
        builder.call(function, [pointer, _BITS_32(0), _BITS_32(3), _BITS_32(1)])

    return types.void(types.int64), generate


@intrinsic
def _call(_: Any, function: Any) -> Any:
    """Call a C function without arguments, by its address."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        kind = ir.FunctionType(_BITS_32, [])
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), [])

    return types.int32(types.int64), generate


_compiled = njit(nogil=True, fastmath=_FAST, error_model="numpy")
_inlined = njit(nogil=True, fastmath=_FAST, error_model="numpy", forceinline=True)


@_inlined
def _rest(x: Any, like_x: Any, row: Any, like: Any, first: Any, length: Any) -> Any:
    """The product of what is left of two rows after their vectors."""
    total = np.float32(0)
    for c in range(first, length):
        total += _get(x, c, like_x) * _get(row, c, like)
    return total


@_inlined
def _dot(x: Any, like_x: Any, row: Any, like: Any, length: Any) -> Any:
    zero = _all(np.float32(0))
    t0, t1, t2, t3 = zero, zero, zero, zero
    c = 0
    while c + 4 * _LANES <= length:
        for line in range(0, 4 * _LANES * _size(like), 64):
            _prefetch(row + c * _size(like) + line + _AHEAD)
        c1, c2, c3 = c + _LANES, c + 2 * _LANES, c + 3 * _LANES
        t0 = _times_plus(_get_vector(x, c, like_x), _get_vector(row, c, like), t0)
        t1 = _times_plus(_get_vector(x, c1, like_x), _get_vector(row, c1, like), t1)
        t2 = _times_plus(_get_vector(x, c2, like_x), _get_vector(row, c2, like), t2)
        t3 = _times_plus(_get_vector(x, c3, like_x), _get_vector(row, c3, like), t3)
        c += 4 * _LANES
    while c + _LANES <= length:
        t0 = _times_plus(_get_vector(x, c, like_x), _get_vector(row, c, like), t0)
        c += _LANES
    return _sum(t0, t1, t2, t3) + _rest(x, like_x, row, like, c, length)


@_inlined
def _four_dots(
    x0: Any, x1: Any, x2: Any, x3: Any, like_x: Any, row: Any, like: Any, length: Any
) -> Any:
    """Four rows of x for one reading of a row of A."""
    zero = _all(np.float32(0))
    t0, t1, t2, t3 = zero, zero, zero, zero
    c = 0
    while c + _LANES <= length:
        _prefetch(row + c * _size(like) + _AHEAD)
        numbers = _get_vector(row, c, like)
        t0 = _times_plus(_get_vector(x0, c, like_x), numbers, t0)
        t1 = _times_plus(_get_vector(x1, c, like_x), numbers, t1)
        t2 = _times_plus(_get_vector(x2, c, like_x), numbers, t2)
        t3 = _times_plus(_get_vector(x3, c, like_x), numbers, t3)
        c += _LANES
    return (
        _sum(t0, zero, zero, zero) + _rest(x0, like_x, row, like, c, length),
        _sum(t1, zero, zero, zero) + _rest(x1, like_x, row, like, c, length),
        _sum(t2, zero, zero, zero) + _rest(x2, like_x, row, like, c, length),
        _sum(t3, zero, zero, zero) + _rest(x3, like_x, row, like, c, length),
    )


@_inlined
def _row(job: Any, i: Any) -> Any:
    """The row of x and y at place i."""
    return _int(job.rows, i)


@_inlined
def _shrunk(job: Any, i: Any) -> Any:
    """Address of what is between A and B of the row at place i."""
    return job.shrunk + i * job.shrunk_stride * 4


@_compiled
def _shrink(job: Any, like_x: Any, g: Any, like: Any, begin: Any, end: Any) -> None:
    """shrunk[i, r] = x[rows[i]] . A[r] for some rows of a group's A, each read once."""
    length = job.in_features
    first, last = _int(job.starts, g), _int(job.starts, g + 1)
    for r in range(begin, end):
        row = _int(job.blocks, g) + r * length * _size(like)
        i = first
        while i + 3 < last:
            t0, t1, t2, t3 = _four_dots(
                job.x + _row(job, i) * job.x_stride,
                job.x + _row(job, i + 1) * job.x_stride,
                job.x + _row(job, i + 2) * job.x_stride,
                job.x + _row(job, i + 3) * job.x_stride,
                like_x,
                row,
                like,
                length,
            )
            _put(_shrunk(job, i), r, t0, _LIKE_FLOAT32)
            _put(_shrunk(job, i + 1), r, t1, _LIKE_FLOAT32)
            _put(_shrunk(job, i + 2), r, t2, _LIKE_FLOAT32)
            _put(_shrunk(job, i + 3), r, t3, _LIKE_FLOAT32)
            i += 4
        while i < last:
            x = job.x + _row(job, i) * job.x_stride
            _put(_shrunk(job, i), r, _dot(x, like_x, row, like, length), _LIKE_FLOAT32)
            i += 1


@_compiled
def _select(job: Any, g: Any, like: Any, begin: Any, end: Any) -> None:
    """shrunk[i, r] = A[r, token of rows[i]]; an embedding's A is laid out by tokens."""
    rank = _int(job.ranks, g * job.ranks_stride)
    for i in range(_int(job.starts, g), _int(job.starts, g + 1)):
        token = min(max(_int(job.x, _row(job, i)), 0), job.in_features - 1)
        for r in range(begin, end):
            number = _get(_int(job.blocks, g), token * rank + r, like)
            _put(_shrunk(job, i), r, number, _LIKE_FLOAT32)


@_inlined
def _copy(to: Any, like_to: Any, source: Any, like: Any, width: Any) -> None:
    c = 0
    while c + _LANES <= width:
        _put_vector(to, c, _get_vector(source, c, like), like_to)
        c += _LANES
    while c < width:
        _put(to, c, _get(source, c, like), like_to)
        c += 1


@_inlined
def _add_one(sums: Any, width: Any, b: Any, like: Any, s: Any) -> None:
    """Add s * row of Bᵀ to the sums."""
    all_s = _all(s)
    c = 0
    while c + _LANES <= width:
        _prefetch(b + c * _size(like) + _AHEAD)
        total = _times_plus(all_s, _get_vector(b, c, like), _get_vector(sums, c, _LIKE_FLOAT32))
        _put_vector(sums, c, total, _LIKE_FLOAT32)
        c += _LANES
    while c < width:
        total = s * _get(b, c, like) + _get(sums, c, _LIKE_FLOAT32)
        _put(sums, c, total, _LIKE_FLOAT32)
        c += 1


@_inlined
def _add_four(
    sums: Any, width: Any, b: Any, row_bytes: Any, like: Any, s0: Any, s1: Any, s2: Any, s3: Any
) -> None:
    """The same of four rows of Bᵀ, for one pass over the sums."""
    b1, b2, b3 = b + row_bytes, b + 2 * row_bytes, b + 3 * row_bytes
    all_0, all_1, all_2, all_3 = _all(s0), _all(s1), _all(s2), _all(s3)
    c = 0
    while c + _LANES <= width:
        at = c * _size(like) + 4 * row_bytes
        _prefetch(b + at)
        _prefetch(b1 + at)
        _prefetch(b2 + at)
        _prefetch(b3 + at)
        total = _times_plus(all_0, _get_vector(b, c, like), _get_vector(sums, c, _LIKE_FLOAT32))
        total = _times_plus(all_1, _get_vector(b1, c, like), total)
        total = _times_plus(all_2, _get_vector(b2, c, like), total)
        total = _times_plus(all_3, _get_vector(b3, c, like), total)
        _put_vector(sums, c, total, _LIKE_FLOAT32)
        c += _LANES
    while c < width:
        rest = s0 * _get(b, c, like) + s1 * _get(b1, c, like)
        rest += s2 * _get(b2, c, like) + s3 * _get(b3, c, like)
        _put(sums, c, rest + _get(sums, c, _LIKE_FLOAT32), _LIKE_FLOAT32)
        c += 1


@_inlined
def _is_float32(like: Any) -> Any:
    return _size(like) == 4


@_inlined
def _y(job: Any, i: Any, column: Any, like: Any) -> Any:
    """Address of a column of y in the row at place i."""
    return job.y + _row(job, i) * job.y_stride + column * _size(like)


@_inlined
def _sums(job: Any, like_y: Any, first: Any, i: Any, column: Any, scratch: Any) -> Any:
    """Where a row's columns are summed up: in y itself if it is float32."""
    if _is_float32(like_y):
        return _y(job, first + i, column, like_y)
    return scratch + i * _CHUNK * 4


@_compiled
def _expand_chunk(
    job: Any, like_y: Any, g: Any, like: Any, b: Any, part: Any, at: Any, column: Any, width: Any
) -> None:
    """y[rows[i], column : column + width] += scaling * shrunk[i, at : at + rank] Bᵀ.

    `b` is the address of the first of these columns in the part's Bᵀ, [rank, length].
    """
    rank = _int(job.ranks, g * job.ranks_stride + part)
    scaling = _get(job.scalings, g * job.ranks_stride + part, _LIKE_FLOAT32)
    row_bytes = _int(job.columns, 2 * part + 1) * _size(like)
    scratch = job.scratch
    if job.thread_num:
        scratch += _call(job.thread_num) * _SCRATCH_BYTES
    for first in range(_int(job.starts, g), _int(job.starts, g + 1), _BLOCK):
        count = min(_BLOCK, _int(job.starts, g + 1) - first)
        if not _is_float32(like_y):
            for i in range(count):
                y = _y(job, first + i, column, like_y)
                _copy(
                    _sums(job, like_y, first, i, column, scratch), _LIKE_FLOAT32, y, like_y, width
                )
        r = 0
        while r + 3 < rank:
            for i in range(count):
                s, k = _shrunk(job, first + i), at + r
                _add_four(
                    _sums(job, like_y, first, i, column, scratch),
                    width,
                    b + r * row_bytes,
                    row_bytes,
                    like,
                    scaling * _get(s, k, _LIKE_FLOAT32),
                    scaling * _get(s, k + 1, _LIKE_FLOAT32),
                    scaling * _get(s, k + 2, _LIKE_FLOAT32),
                    scaling * _get(s, k + 3, _LIKE_FLOAT32),
                )
            r += 4
        while r < rank:
            for i in range(count):
                s = scaling * _get(_shrunk(job, first + i), at + r, _LIKE_FLOAT32)
                sums = _sums(job, like_y, first, i, column, scratch)
                _add_one(sums, width, b + r * row_bytes, like, s)
            r += 1
        if not _is_float32(like_y):
            for i in range(count):
                y = _y(job, first + i, column, like_y)
                _copy(
                    y, like_y, _sums(job, like_y, first, i, column, scratch), _LIKE_FLOAT32, width
                )


@_inlined
def _total_rank(job: Any, g: Any) -> Any:
    total = 0
    for part in range(job.num_parts):
        total += _int(job.ranks, g * job.ranks_stride + part)
    return total


@_inlined
def _expand(job: Any, like_y: Any, g: Any, like: Any, begin: Any, end: Any, work: Any) -> None:
    """Add the columns from begin / work to end / work of each part to a group's rows."""
    # Bᵀ of the first part comes after all of A.
    b = _int(job.blocks, g) + _total_rank(job, g) * job.in_features * _size(like)
    at = 0
    for part in range(job.num_parts):
        rank = _int(job.ranks, g * job.ranks_stride + part)
        if not rank:
            continue
        start, length = _int(job.columns, 2 * part), _int(job.columns, 2 * part + 1)
        pieces = (length + _LANES - 1) // _LANES
        left = pieces * begin // work * _LANES
        right = min(pieces * end // work * _LANES, length)
        for c in range(left, right, _CHUNK):
            width = min(_CHUNK, right - c)
            _expand_chunk(job, like_y, g, like, b + c * _size(like), part, at, start + c, width)
        b += rank * length * _size(like)
        at += rank


@_inlined
def _work(job: Any, g: Any) -> Any:
    """Bytes of a group's factors, as far as threads have to share them."""
    if not _int(job.blocks, g):
        return 0
    numbers = 0
    for part in range(job.num_parts):
        features = job.in_features + _int(job.columns, 2 * part + 1)
        numbers += _int(job.ranks, g * job.ranks_stride + part) * features
    return numbers * (4 if _int(job.elements, g) == _FLOAT32 else 2)


@_inlined
def _do(
    job: Any, like: Any, g: Any, element: Any, begin: Any, end: Any, work: Any, is_second: Any
) -> None:
    """A thread's share of a group: of its A in the first half, of its B in the second."""
    if not is_second:
        rank = _total_rank(job, g)
        if job.is_embedding:
            _select(job, g, element, rank * begin // work, rank * end // work)
        else:
            _shrink(job, like, g, element, rank * begin // work, rank * end // work)
    # Nobody else has to be waited for where all of A was our own.
    if is_second == (end - begin < work):
        _expand(job, like, g, element, begin, end, work)


@_compiled
def _run(job: Any, like: Any) -> None:
    """Each thread takes an equal share of all bytes: whole groups, and a piece of one at each end.

    Groups are shared in the order in which they come. Of one that is cut, every thread that has a
    piece of it takes some rows of A, waits for the others, and takes some columns of y.
    """
    thread, num_threads = 0, 1
    if job.thread_num:
        thread, num_threads = _call(job.thread_num), _call(job.num_threads)
    total = 0
    for g in range(job.num_groups):
        total += _work(job, g)
    low, high = total * thread // num_threads, total * (thread + 1) // num_threads
    for half in range(2):
        if half and num_threads > 1:
            _call(job.barrier)
        at = 0
        for g in range(job.num_groups):
            work = _work(job, g)
            begin, end = max(low - at, 0), min(high - at, work)
            at += work
            if begin >= end or (half and end - begin == work):
                continue
            element = _int(job.elements, g)
            if element == _FLOAT32:
                _do(job, like, g, _LIKE_FLOAT32, begin, end, work, half == 1)
            elif element == _BFLOAT16:
                _do(job, like, g, _LIKE_BFLOAT16, begin, end, work, half == 1)
            else:
                _do(job, like, g, _LIKE_FLOAT16, begin, end, work, half == 1)


class Loop:
    """The loop for a model, and the threads that it runs on.

    Args:
        element: dtype that the model computes in.
        threads: to run on.
    Cost: 20 s of compiling the first time on a machine, then numba's cache has it.
    """

    def __init__(self, element: Element, threads: Threads) -> None:
        self.element = element
        like = _LIKE[element]

        @cfunc(types.void(types.CPointer(_JOB)), cache=True, error_model="numpy")
        def run(job: Any) -> None:
            _run(carray(job, 1)[0], like)

        self._function = run  # its code is freed with it
        self._threads = threads
        self._scratch = np.empty(threads.count * _SCRATCH_BYTES, np.uint8)

    def new_job(self) -> Job:
        """Return a job without rows, to be filled in and kept."""
        return Job(
            scratch=self._scratch.ctypes.data,
            thread_num=self._threads.thread_num,
            num_threads=self._threads.num_threads,
            barrier=self._threads.barrier,
        )

    def run(self, job: Job) -> None:
        """Add every group's delta to its rows of y."""
        self._threads.run(self._function.address, ctypes.addressof(job))
