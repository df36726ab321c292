"""The compiled loop for short groups of rows: y[row] += (scaling * x[row] Aᵀ) Bᵀ at real ranks.

A row alone reads every factor once and does two operations with each number, so that memory decides
the speed: factors are read in the order in which they lie, where they lie, in the dtype that they
have. Sums are float32 whatever that is.

Functions take addresses: numba's own arrays count references and check indices, which costs more
than the sums of a short row.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rora_serve.engine.slots import Element

_CHUNK = 1024  # columns of y that are summed up in the first-level cache
_BLOCK = 8  # rows that share one reading of B
_ALIGNED = 16  # columns, of threads that share a row
_AHEAD = 6  # rows of A that are asked for before they are read
_GROUPS_A_THREAD = 2  # from which on threads get whole groups
# All that lets sums be vectorised; not-a-number stays what it is.
_FAST = {"reassoc", "nsz", "contract", "arcp"}
_FLOAT32, _BFLOAT16 = int(Element.F32), int(Element.BF16)

# What tells compiled functions which numbers lie at an address. numba has neither 16-bit float, so
# that two integers stand for them.
LIKE_FLOAT32, LIKE_BFLOAT16, LIKE_FLOAT16 = np.float32(0), np.uint16(0), np.int16(0)

_FLOAT, _BITS_32, _BITS_16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)


def _element(builder: Any, address: Any, index: Any, like: Any) -> Any:
    """Return LLVM's pointer to the element at `index` after `address`."""
    stored = _FLOAT if like == types.float32 else _BITS_16
    return builder.gep(builder.inttoptr(address, stored.as_pointer()), [index])


def _loaded(builder: Any, pointer: Any, like: Any) -> Any:
    found = builder.load(pointer)
    if like == types.uint16:
        wide = builder.zext(found, _BITS_32)
        return builder.bitcast(builder.shl(wide, wide.type(16)), _FLOAT)
    if like == types.int16:
        return builder.fpext(builder.bitcast(found, ir.HalfType()), _FLOAT)
    return found


def _rounded(builder: Any, number: Any, like: Any) -> Any:
    """Round to the nearest, ties to even."""
    if like == types.uint16:
        bits = builder.bitcast(number, _BITS_32)
        last = builder.and_(builder.lshr(bits, bits.type(16)), bits.type(1))
        nearest = builder.add(bits, builder.add(last, bits.type(0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", number, number)
        kept = builder.lshr(builder.select(is_nan, bits, nearest), bits.type(16))
        return builder.trunc(kept, _BITS_16)
    if like == types.int16:
        return builder.bitcast(builder.fptrunc(number, ir.HalfType()), _BITS_16)
    return number


@intrinsic
def _size(_: Any, like: Any) -> Any:
    """Bytes of an element."""

    def generate(context: Any, __: Any, ___: Any, ____: Any) -> Any:
        return context.get_constant(types.int64, like.bitwidth // 8)

    return types.int64(like), generate


@intrinsic
def _get(_: Any, address: Any, index: Any, like: Any) -> Any:
    """The number at `index` after `address`, as float32."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        return _loaded(builder, _element(builder, values[0], values[1], like), like)

    return types.float32(types.int64, types.int64, like), generate


@intrinsic
def _add(_: Any, address: Any, index: Any, number: Any, like: Any) -> Any:
    """Add a float32 to the number at `index` after `address`."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        pointer = _element(builder, values[0], values[1], like)
        total = builder.fadd(_loaded(builder, pointer, like), values[2])
        builder.store(_rounded(builder, total, like), pointer)

    return types.void(types.int64, types.int64, types.float32, like), generate


@intrinsic
def _set(_: Any, address: Any, index: Any, number: Any) -> Any:
    """Write a float32 at `index` after `address`."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        builder.store(values[2], _element(builder, values[0], values[1], types.float32))

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def _prefetch(_: Any, address: Any) -> Any:
    """Ask for a cache line that will be read soon."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[_BITS_32] * 3])
        name = "llvm.prefetch.p0i8"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        pointer = builder.inttoptr(values[0], ir.IntType(8).as_pointer())
        builder.call(function, [pointer, _BITS_32(0), _BITS_32(3), _BITS_32(1)])

    return types.void(types.int64), generate


_compiled = njit(nogil=True, fastmath=_FAST, cache=True, error_model="numpy")
_inlined = njit(nogil=True, fastmath=_FAST, cache=True, error_model="numpy", forceinline=True)


def new_scratch(num_threads: int) -> NDArray[np.float32]:
    """Return what every thread sums up in; the caller keeps it."""
    return np.empty((num_threads, _BLOCK, _CHUNK), np.float32)


class Groups(NamedTuple):
    """A layer's short groups of rows in one step.

    Args:
        rows: [n] int64, rows of x and y, group by group.
        starts: [num_groups + 1] int64, where each group begins in `rows`.
        addresses: [num_groups] int64, of each group's block of factors; 0 where it has none.
        elements: [num_groups] int64, dtypes of the blocks, as Element counts them.
        ranks, scalings: [num_groups, num_parts] int64 and float32.
        columns: [num_parts, 2] int64, first column and number of columns of each part.
        shrunk: [n, largest sum of ranks] float32, for what is between A and B.
    """

    rows: Any
    starts: Any
    addresses: Any
    elements: Any
    ranks: Any
    scalings: Any
    columns: Any
    shrunk: Any


class Matrix(NamedTuple):
    """Rows in memory: address of the first, bytes from one to the next, and LIKE_ their numbers."""

    address: int
    stride: int
    like: Any


@_compiled
def _dot(x: Any, like_x: Any, row: Any, like: Any, length: Any) -> Any:
    total = np.float32(0)
    for index in range(length):
        total += _get(x, index, like_x) * _get(row, index, like)
    return total


@_compiled
def _four_dots(x: Any, like_x: Any, row: Any, like: Any, length: Any) -> Any:
    """Four rows of x, by their addresses, for one reading of a row of A."""
    t0 = t1 = t2 = t3 = np.float32(0)
    for index in range(length):
        number = _get(row, index, like)
        t0 += _get(x[0], index, like_x) * number
        t1 += _get(x[1], index, like_x) * number
        t2 += _get(x[2], index, like_x) * number
        t3 += _get(x[3], index, like_x) * number
    return t0, t1, t2, t3


@_inlined
def _shrink_rows(
    x: Any, groups: Any, g: Any, a: Any, like: Any, length: Any, begin: Any, end: Any
) -> None:
    """shrunk[i, r] = x[rows[i]] . A[r] for some rows of A, each read once."""
    rows, shrunk = groups.rows, groups.shrunk
    first, last = groups.starts[g], groups.starts[g + 1]
    for r in range(begin, end):
        row = a + r * length * _size(like)
        for line in range(0, length * _size(like), 64):
            _prefetch(row + _AHEAD * length * _size(like) + line)
        i = first
        while i + 3 < last:
            four = (
                x.address + rows[i] * x.stride,
                x.address + rows[i + 1] * x.stride,
                x.address + rows[i + 2] * x.stride,
                x.address + rows[i + 3] * x.stride,
            )
            t0, t1, t2, t3 = _four_dots(four, x.like, row, like, length)
            shrunk[i, r], shrunk[i + 1, r] = t0, t1
            shrunk[i + 2, r], shrunk[i + 3, r] = t2, t3
            i += 4
        while i < last:
            shrunk[i, r] = _dot(x.address + rows[i] * x.stride, x.like, row, like, length)
            i += 1


@_inlined
def _shrink(x: Any, in_features: Any, groups: Any, g: Any, share: Any, shares: Any) -> None:
    """One thread's share of the rows of a group's A, scaled."""
    rank = groups.ranks[g].sum()
    begin, end = rank * share // shares, rank * (share + 1) // shares
    a = groups.addresses[g]
    if groups.elements[g] == _FLOAT32:
        _shrink_rows(x, groups, g, a, LIKE_FLOAT32, in_features, begin, end)
    elif groups.elements[g] == _BFLOAT16:
        _shrink_rows(x, groups, g, a, LIKE_BFLOAT16, in_features, begin, end)
    else:
        _shrink_rows(x, groups, g, a, LIKE_FLOAT16, in_features, begin, end)
    at = 0
    for part in range(groups.ranks.shape[1]):
        to = at + groups.ranks[g, part]
        for r in range(max(at, begin), min(to, end)):
            for i in range(groups.starts[g], groups.starts[g + 1]):
                groups.shrunk[i, r] *= groups.scalings[g, part]
        at = to


@_compiled
def _clear(sums: Any, width: Any) -> None:
    for c in range(width):
        _set(sums, c, np.float32(0))


@_compiled
def _add_scaled(sums: Any, width: Any, b: Any, like: Any, s: Any) -> None:
    for c in range(width):
        _add(sums, c, s * _get(b, c, like), LIKE_FLOAT32)


@_compiled
def _add_four_scaled(sums: Any, width: Any, b: Any, row_bytes: Any, like: Any, s: Any) -> None:
    """Four rows of Bᵀ for one pass over a row of sums."""
    b1, b2, b3 = b + row_bytes, b + 2 * row_bytes, b + 3 * row_bytes
    s0, s1, s2, s3 = s
    for c in range(width):
        total = s0 * _get(b, c, like) + s1 * _get(b1, c, like)
        total += s2 * _get(b2, c, like) + s3 * _get(b3, c, like)
        _add(sums, c, total, LIKE_FLOAT32)


@_compiled
def _add_sums(y: Any, like_y: Any, width: Any, sums: Any) -> None:
    for c in range(width):
        _add(y, c, _get(sums, c, LIKE_FLOAT32), like_y)


@_inlined
def _expand_rows(
    y: Any,
    groups: Any,
    g: Any,
    b: Any,
    like: Any,
    shape: Any,
    at: Any,
    column: Any,
    width: Any,
    sums: Any,
) -> None:
    """y[rows[i], column:] += shrunk[i, at : at + rank] Bᵀ, for a few rows and columns.

    `b` is the address of the first of these columns in Bᵀ, whose shape is [rank, length].
    """
    rank, length = shape
    row_bytes, sums_bytes = length * _size(like), _CHUNK * 4
    rows, shrunk = groups.rows, groups.shrunk
    to = y.address + column * _size(y.like)
    for first in range(groups.starts[g], groups.starts[g + 1], _BLOCK):
        count = min(_BLOCK, groups.starts[g + 1] - first)
        for i in range(count):
            _clear(sums + i * sums_bytes, width)
        r = 0
        while r + 3 < rank:
            for k in range(4):
                for line in range(0, width * _size(like), 64):
                    _prefetch(b + (r + 4 + k) * row_bytes + line)
            for i in range(count):
                k = at + r
                s = shrunk[first + i]
                four = (s[k], s[k + 1], s[k + 2], s[k + 3])
                where = sums + i * sums_bytes
                _add_four_scaled(where, width, b + r * row_bytes, row_bytes, like, four)
            r += 4
        while r < rank:
            for i in range(count):
                s = shrunk[first + i, at + r]
                _add_scaled(sums + i * sums_bytes, width, b + r * row_bytes, like, s)
            r += 1
        for i in range(count):
            _add_sums(to + rows[first + i] * y.stride, y.like, width, sums + i * sums_bytes)


@_inlined
def _expand(
    y: Any, in_features: Any, groups: Any, g: Any, share: Any, shares: Any, sums: Any
) -> None:
    """One thread's share of the columns of a group's rows."""
    element, ranks = groups.elements[g], groups.ranks[g]
    size = 4 if element == _FLOAT32 else 2
    # Bᵀ of the first part comes after all of A.
    b, at = groups.addresses[g] + ranks.sum() * in_features * size, 0
    for part in range(len(groups.columns)):
        rank, (start, length) = ranks[part], groups.columns[part]
        if not rank:
            continue
        pieces = (length + _ALIGNED - 1) // _ALIGNED
        left = pieces * share // shares * _ALIGNED
        right = min(pieces * (share + 1) // shares * _ALIGNED, length)
        for c in range(left, right, _CHUNK):
            width, column, of_part = min(_CHUNK, right - c), start + c, b + c * size
            shape = (rank, length)
            if element == _FLOAT32:
                _expand_rows(y, groups, g, of_part, LIKE_FLOAT32, shape, at, column, width, sums)
            elif element == _BFLOAT16:
                _expand_rows(y, groups, g, of_part, LIKE_BFLOAT16, shape, at, column, width, sums)
            else:
                _expand_rows(y, groups, g, of_part, LIKE_FLOAT16, shape, at, column, width, sums)
        b += rank * length * size
        at += rank


@_compiled
def add_linear(
    x: Any,
    x_stride: Any,
    y: Any,
    y_stride: Any,
    like: Any,
    in_features: Any,
    rows: Any,
    starts: Any,
    addresses: Any,
    elements: Any,
    ranks: Any,
    scalings: Any,
    columns: Any,
    shrunk: Any,
    scratch: Any,
) -> None:
    """Add every group's delta to its rows of `y`, in one thread.

    Args:
        x, x_stride: address of [num_rows, in_features] and bytes from row to row.
        y, y_stride: the same of [num_rows, out_features].
        like: LIKE_FLOAT32, LIKE_BFLOAT16 or LIKE_FLOAT16, as the numbers of both are.
        in_features: columns of A.
        rows, starts, addresses, elements, ranks, scalings, columns, shrunk: Groups; one by one,
            since numba takes a tuple apart at three times the cost.
        scratch: as `new_scratch` returns it; an array of the loop's own would be freed as soon as
            only its address is used.
    """
    groups = Groups(rows, starts, addresses, elements, ranks, scalings, columns, shrunk)
    for g in range(len(addresses)):
        if addresses[g]:
            _shrink(Matrix(x, x_stride, like), in_features, groups, g, 0, 1)
            _expand(Matrix(y, y_stride, like), in_features, groups, g, 0, 1, scratch.ctypes.data)


@_inlined
def _work(groups: Any, g: Any) -> Any:
    """Numbers of a group's factors, as far as threads have to share them."""
    return groups.ranks[g].sum() if groups.addresses[g] else 0


# One loop a function: of two in one, numba would let threads begin the second before others have
# ended the first.
_parallel = njit(nogil=True, fastmath=_FAST, cache=True, error_model="numpy", parallel=True)


@_parallel
def _add_whole_groups(x: Any, y: Any, in_features: Any, groups: Any, scratch: Any) -> None:
    """Each group by the thread whose share of all work the group's middle falls into."""
    num_groups, num_threads = len(groups.addresses), len(scratch)
    total = 0
    for g in range(num_groups):
        total += _work(groups, g)
    for t in prange(num_threads):
        sums = scratch.ctypes.data + t * _BLOCK * _CHUNK * 4
        done = 0
        for g in range(num_groups):
            work = _work(groups, g)
            if work and (2 * done + work) * num_threads // (2 * total) == t:
                _shrink(x, in_features, groups, g, 0, 1)
                _expand(y, in_features, groups, g, 0, 1, sums)
            done += work


@_parallel
def _shrink_shared(x: Any, in_features: Any, groups: Any, num_threads: Any) -> None:
    """Each group's rows of A by all threads."""
    for t in prange(num_threads):
        for g in range(len(groups.addresses)):
            if groups.addresses[g]:
                # A low rank does not fill all threads: others get none the next time.
                _shrink(x, in_features, groups, g, (t + g) % num_threads, num_threads)


@_parallel
def _expand_shared(y: Any, in_features: Any, groups: Any, scratch: Any) -> None:
    """Each group's columns by all threads."""
    for t in prange(len(scratch)):
        sums = scratch.ctypes.data + t * _BLOCK * _CHUNK * 4
        for g in range(len(groups.addresses)):
            if groups.addresses[g]:
                _expand(y, in_features, groups, g, t, len(scratch), sums)


@_compiled
def add_linear_threaded(
    x: Any,
    x_stride: Any,
    y: Any,
    y_stride: Any,
    like: Any,
    in_features: Any,
    rows: Any,
    starts: Any,
    addresses: Any,
    elements: Any,
    ranks: Any,
    scalings: Any,
    columns: Any,
    shrunk: Any,
    scratch: Any,
) -> None:
    """As `add_linear`, in several threads.

    Many groups are shared out whole; of few, each group's rows of A, and then its columns.
    """
    groups = Groups(rows, starts, addresses, elements, ranks, scalings, columns, shrunk)
    inputs, outputs = Matrix(x, x_stride, like), Matrix(y, y_stride, like)
    if len(addresses) >= _GROUPS_A_THREAD * len(scratch):
        _add_whole_groups(inputs, outputs, in_features, groups, scratch)
    else:
        _shrink_shared(inputs, in_features, groups, len(scratch))
        _expand_shared(outputs, in_features, groups, scratch)


@_inlined
def _picked(a: Any, element: Any, index: Any) -> Any:
    if element == _FLOAT32:
        return _get(a, index, LIKE_FLOAT32)
    if element == _BFLOAT16:
        return _get(a, index, LIKE_BFLOAT16)
    return _get(a, index, LIKE_FLOAT16)


@_compiled
def add_embedding(
    ids: Any,
    y: Any,
    y_stride: Any,
    like: Any,
    vocabulary: Any,
    rows: Any,
    starts: Any,
    addresses: Any,
    elements: Any,
    ranks: Any,
    scalings: Any,
    columns: Any,
    shrunk: Any,
    scratch: Any,
) -> None:
    """Add every group's delta of an embedding to its rows of `y`.

    Args:
        ids: [num_rows] int64, tokens.
        vocabulary: number of tokens; the others as in `add_linear`.
    """
    groups = Groups(rows, starts, addresses, elements, ranks, scalings, columns, shrunk)
    for g in range(len(addresses)):
        if not addresses[g]:
            continue
        rank = ranks[g, 0]
        for i in range(starts[g], starts[g + 1]):
            # Its A is laid out by tokens.
            begin = min(max(ids[rows[i]], 0), vocabulary - 1) * rank
            for r in range(rank):
                shrunk[i, r] = scalings[g, 0] * _picked(addresses[g], elements[g], begin + r)
        _expand(Matrix(y, y_stride, like), vocabulary, groups, g, 0, 1, scratch.ctypes.data)
