"""The compiled loop: y[row] += scaling * (x[row] Aᵀ) Bᵀ for groups of rows, at real ranks.

With few rows an adapter's factors are read once and two operations are done with each number, so
that memory decides the speed: factors are read in the order in which they lie, where they lie, in
the dtype that they have, and asked for ahead. With many rows it is a product of matrices, of which
tiles are summed up in registers. Sums are float32 whatever the dtypes.

The loop is a C function of one address, that of a Job, so that calling it costs a microsecond or
two.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, types
from numba.extending import intrinsic

from rora_serve.engine.instructions import (
    BITS_64,
    HAS_AVX512,
    LANES,
    Builder,
    call_address,
    compiled,
    inlined,
    int64_fields,
    read_int,
    read_number,
    record_of,
    size_of,
    this_thread,
    write_number,
)
from rora_serve.engine.slots import PANEL, Element
from rora_serve.engine.threads import Threads, declare

# A tile is a few rows of x and y, and as many rows of A or vectors of a row of Bᵀ as leave
# registers beside the sums: 16 of 32 are sums with AVX-512, else 12 or 8 of 16.
_ROWS = 4
_FACTORS = 4 if HAS_AVX512 else 3
_VECTORS = 4 if HAS_AVX512 else 2
_CHAINS = 4  # sums of a row alone, so that none waits for the one before
# Whether a row alone asks for factors ahead. It reads in order, which processors foresee; with
# AVX2 asking as well costs a tenth, with AVX-512 it saves as much. Tiles of several rows read in
# several places at once, and gain by it everywhere.
_ONE_ROW_ASKS = HAS_AVX512
_MANY = 16  # rows from which on threads share a group's rows, not its factors, if there are enough
# Rows that are finished before the next ones of a long group: their part of y is read as it lies,
# from memory, and an adapter's factors for each of them again, from the second-level cache.
_BLOCK = 2 * _ROWS
_AHEAD = 4096  # bytes of A that are asked for before a row alone reads them
_FLOAT32, _BFLOAT16 = int(Element.F32), int(Element.BF16)

# What tells compiled functions which numbers lie at an address. numba has neither 16-bit float, so
# that two integers stand for them.
_LIKE_FLOAT32, _LIKE_BFLOAT16, _LIKE_FLOAT16 = np.float32(0), np.uint16(0), np.int16(0)
_LIKE = {
    Element.F32: _LIKE_FLOAT32,
    Element.BF16: _LIKE_BFLOAT16,
    Element.F16: _LIKE_FLOAT16,
}


class Job(ctypes.Structure):
    """A layer's groups of rows in one step. Numbers and addresses, all int64.

    Args:
        x, x_stride: address of [num_rows, in_features] and bytes from row to row; of an embedding,
            [num_rows] int64 tokens, of which those outside the vocabulary count as its ends.
        y, y_stride: the same of [num_rows, out_features].
        layer: its index, by which tables of all layers are told apart; the loop does not look.
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
        thread_num, num_threads, barrier: addresses of OpenMP's functions; all 0 for one thread.
    """

    _fields_ = int64_fields(
        "x", "x_stride", "y", "y_stride", "layer", "is_embedding", "in_features", "num_parts",
        "columns", "num_groups", "rows", "starts", "blocks", "elements", "ranks", "scalings",
        "ranks_stride", "shrunk", "shrunk_stride", "thread_num", "num_threads",
        "barrier",
    )  # fmt: skip


_JOB = record_of(Job)


def _new_dots(num_rows: int, num_factors: int, num_chains: int = 1) -> Callable[..., None]:
    """Return a tile of x Aᵀ: out[i, r] = x[rows[i]] . A[r] for a few rows of each.

    Args: num_chains: vectors of a row that are read at a time, each for a sum of its own.
    """

    @intrinsic
    def dots(
        _: Any, x: Any, x_stride: Any, rows: Any, a: Any, length: Any, out: Any, out_stride: Any,
        ahead: Any, like_x: Any, like_a: Any,
    ) -> Any:  # fmt: skip
        """See above.

        Args:
            x, rows, a, out: addresses; the first of `rows`, A and `out` are the tile's own.
            x_stride, out_stride: bytes from row to row.
            length: of a row of A; the next one follows.
            ahead: bytes from what is read of A to what is asked for.
        """

        def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
            x, x_stride, rows, a, length, out, out_stride, ahead, *____ = values
            vectors, numbers = Builder(builder, LANES), Builder(builder, 1)
            size_x, size_a = like_x.bitwidth // 8, like_a.bitwidth // 8
            x_rows = [
                numbers.plus(x, numbers.times(numbers.integer(rows, i), x_stride))
                for i in range(num_rows)
            ]
            row_bytes = numbers.times(length, size_a)
            a_rows = [numbers.plus(a, numbers.times(row_bytes, r)) for r in range(num_factors)]
            tile = [(i, r) for i in range(num_rows) for r in range(num_factors)]
            step = num_chains * LANES

            def add(to: Builder, sums: Any, c: Any) -> None:
                a_offset, x_offset = to.times(c, size_a), to.times(c, size_x)
                factors = [to.load(to.plus(row, a_offset), like_a) for row in a_rows]
                inputs = [to.load(to.plus(row, x_offset), like_x) for row in x_rows]
                for i, r in tile:
                    total = to.times_plus(inputs[i], factors[r], builder.load(sums[i, r]))
                    builder.store(total, sums[i, r])

            chains = [{place: vectors.zero() for place in tile} for ______ in range(num_chains)]
            with vectors.steps(BITS_64(0), length, step) as (c, ______):
                for row in a_rows if num_rows > 1 or _ONE_ROW_ASKS else ():
                    asked = vectors.plus(row, vectors.times(c, size_a), ahead)
                    for offset in range(0, step * size_a, 64):
                        vectors.prefetch(vectors.plus(asked, BITS_64(offset)))
                for number, sums in enumerate(chains):
                    add(vectors, sums, vectors.plus(c, BITS_64(number * LANES)))
            whole = builder.sub(length, builder.urem(length, BITS_64(step)))
            with vectors.steps(whole, length, LANES) as (c, ______):
                add(vectors, chains[0], c)
            rests = {place: numbers.zero() for place in tile}
            whole = builder.and_(length, BITS_64(-LANES))
            with numbers.steps(whole, length, 1) as (c, ______):
                add(numbers, rests, c)
            for i, r in tile:
                vector, *others = (builder.load(sums[i, r]) for sums in chains)
                for other in others:
                    vector = builder.fadd(vector, other)
                total = builder.fadd(vectors.sum(vector), builder.load(rests[i, r]))
                place = numbers.plus(out, numbers.times(out_stride, i), BITS_64(4 * r))
                numbers.store(total, place, types.float32)

        return types.void(*[types.int64] * 8, like_x, like_a), generate

    return dots  # type: ignore[no-any-return]


def _new_add_tile(num_rows: int, num_vectors: int, lanes: int) -> Callable[..., None]:
    """Return a tile of s Bᵀ: y[rows[i]] += scaling * s[i] Bᵀ for a few rows and columns."""

    @intrinsic
    def add_tile(
        _: Any, y: Any, y_stride: Any, rows: Any, s: Any, s_stride: Any, b: Any, b_stride: Any,
        rank: Any, ahead: Any, scaling: Any, like_y: Any, like_b: Any,
    ) -> Any:  # fmt: skip
        """See above.

        Args:
            y, rows, s, b: addresses; the first of `rows`, s and Bᵀ, and the first column of y, are
                the tile's own.
            y_stride, s_stride, b_stride: bytes from row to row.
            rank: rows of Bᵀ, of which `ahead` are asked for before they are read.
        """

        def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
            y, y_stride, rows, s, s_stride, b, b_stride, rank, ahead, scaling, *____ = values
            to = Builder(builder, lanes)
            numbers = Builder(builder, 1)
            size_y, size_b = like_y.bitwidth // 8, like_b.bitwidth // 8
            y_rows = [to.plus(y, to.times(to.integer(rows, i), y_stride)) for i in range(num_rows)]
            s_rows = [to.plus(s, to.times(s_stride, i)) for i in range(num_rows)]
            tile = [(i, v) for i in range(num_rows) for v in range(num_vectors)]
            sums = {place: to.zero() for place in tile}
            with to.steps(BITS_64(0), rank, 1) as (r, ______):
                row = to.plus(b, to.times(r, b_stride))
                asked = num_vectors * lanes * size_b if num_rows > 1 or _ONE_ROW_ASKS else 0
                for offset in range(0, asked, 64):
                    to.prefetch(to.plus(row, ahead, BITS_64(offset)))
                factors = [
                    to.load(to.plus(row, BITS_64(v * lanes * size_b)), like_b)
                    for v in range(num_vectors)
                ]
                for i, s_row in enumerate(s_rows):
                    one = numbers.load(to.plus(s_row, to.times(r, 4)), types.float32)
                    weight = to.all(one)
                    for v, factor in enumerate(factors):
                        total = to.times_plus(weight, factor, builder.load(sums[i, v]))
                        builder.store(total, sums[i, v])
            all_scaling = to.all(scaling)
            for i, v in tile:
                place = to.plus(y_rows[i], BITS_64(v * lanes * size_y))
                total = to.times_plus(all_scaling, builder.load(sums[i, v]), to.load(place, like_y))
                to.store(total, place, like_y)

        return types.void(*[types.int64] * 9, types.float32, like_y, like_b), generate

    return add_tile  # type: ignore[no-any-return]


_dots = _new_dots(_ROWS, _FACTORS)
_dots_of_one_factor = _new_dots(_ROWS, 1)
_dot = _new_dots(1, 1, _CHAINS)
_add_tile = _new_add_tile(_ROWS, _VECTORS, LANES)
_add_panel_to_one_row = _new_add_tile(1, PANEL // LANES, LANES)
_add_vector_to_one_row = _new_add_tile(1, 1, LANES)
_add_number_to_one_row = _new_add_tile(1, 1, 1)
_TILE_COLUMNS = _VECTORS * LANES


@inlined
def _shrunk(job: Any, i: Any, r: Any) -> Any:
    """Address of a number between A and B of the row at place i."""
    return job.shrunk + (i * job.shrunk_stride + r) * 4


@compiled
def _shrink(
    job: Any, like_x: Any, a: Any, like: Any, first: Any, last: Any, begin: Any, end: Any
) -> None:
    """shrunk[i, r] = x[rows[i]] . A[r] for places from first to last, rows from begin to end."""
    x, x_stride, length, out_stride = job.x, job.x_stride, job.in_features, job.shrunk_stride * 4
    row_bytes = length * size_of(like)
    i = first
    while i < last:
        rows, r = job.rows + 8 * i, begin
        if i + _ROWS <= last:
            ahead = _FACTORS * row_bytes
            while r + _FACTORS <= end:
                _dots(
                    x, x_stride, rows, a + r * row_bytes, length, _shrunk(job, i, r), out_stride,
                    ahead, like_x, like,
                )  # fmt: skip
                r += _FACTORS
            while r < end:
                _dots_of_one_factor(
                    x, x_stride, rows, a + r * row_bytes, length, _shrunk(job, i, r), out_stride,
                    row_bytes, like_x, like,
                )  # fmt: skip
                r += 1
            i += _ROWS
        else:
            while r < end:
                _dot(
                    x, x_stride, rows, a + r * row_bytes, length, _shrunk(job, i, r), out_stride,
                    _AHEAD, like_x, like,
                )  # fmt: skip
                r += 1
            i += 1


@compiled
def _select(job: Any, a: Any, like: Any, first: Any, last: Any, rank: Any) -> None:
    """shrunk[i, r] = A[r, token of rows[i]]; an embedding's A is laid out by tokens."""
    for i in range(first, last):
        token = min(max(read_int(job.x, read_int(job.rows, i)), 0), job.in_features - 1)
        for r in range(rank):
            write_number(
                _shrunk(job, i, r), read_number(a + (token * rank + r) * size_of(like), like)
            )


@compiled
def _expand_panel(
    job: Any, like_y: Any, b: Any, like: Any, first: Any, last: Any, at: Any, rank: Any,
    scaling: Any, column: Any, width: Any,
) -> None:  # fmt: skip
    """y[rows[i], column : column + width] += scaling * shrunk[i, at : at + rank] panel."""
    y_stride, s_stride, b_stride = job.y_stride, job.shrunk_stride * 4, width * size_of(like)
    panel_bytes = rank * b_stride
    i = first
    while i < last:
        num_rows = _ROWS if i + _ROWS <= last else 1
        c = 0
        while c < width:
            y, at_b = job.y + (column + c) * size_of(like_y), b + c * size_of(like)
            rows, s = job.rows + 8 * i, _shrunk(job, i, at)
            if num_rows == 1 and c + PANEL <= width:
                num_columns = PANEL
                _add_panel_to_one_row(
                    y, y_stride, rows, s, s_stride, at_b, b_stride, rank, panel_bytes, scaling,
                    like_y, like,
                )  # fmt: skip
            elif num_rows == _ROWS and c + _TILE_COLUMNS <= width:
                num_columns = _TILE_COLUMNS
                _add_tile(
                    y, y_stride, rows, s, s_stride, at_b, b_stride, rank, panel_bytes, scaling,
                    like_y, like,
                )  # fmt: skip
            elif c + LANES <= width:
                num_columns = LANES
                for row in range(num_rows):
                    _add_vector_to_one_row(
                        y, y_stride, rows + 8 * row, s + s_stride * row, s_stride, at_b, b_stride,
                        rank, panel_bytes, scaling, like_y, like,
                    )  # fmt: skip
            else:
                num_columns = 1
                for row in range(num_rows):
                    _add_number_to_one_row(
                        y, y_stride, rows + 8 * row, s + s_stride * row, s_stride, at_b, b_stride,
                        rank, panel_bytes, scaling, like_y, like,
                    )  # fmt: skip
            c += num_columns
        i += num_rows


@inlined
def _rank(job: Any, g: Any, part: Any) -> Any:
    return read_int(job.ranks, g * job.ranks_stride + part)


@inlined
def _total_rank(job: Any, g: Any) -> Any:
    total = 0
    for part in range(job.num_parts):
        total += _rank(job, g, part)
    return total


@inlined
def _expand(
    job: Any, like_y: Any, g: Any, like: Any, first: Any, last: Any, begin: Any, end: Any, work: Any
) -> None:
    """Add to rows from first to last the columns from begin / work to end / work of each part."""
    # Bᵀ of the first part comes after all of A.
    b = read_int(job.blocks, g) + _total_rank(job, g) * job.in_features * size_of(like)
    at = 0
    for part in range(job.num_parts):
        rank = _rank(job, g, part)
        if not rank:
            continue
        scaling = read_number(job.scalings + (g * job.ranks_stride + part) * 4, _LIKE_FLOAT32)
        start, length = read_int(job.columns, 2 * part), read_int(job.columns, 2 * part + 1)
        num_panels = (length + PANEL - 1) // PANEL
        for panel in range(num_panels * begin // work, num_panels * end // work):
            c = panel * PANEL
            _expand_panel(
                job, like_y, b + c * rank * size_of(like), like, first, last, at, rank, scaling,
                start + c, min(PANEL, length - c),
            )  # fmt: skip
        b += rank * length * size_of(like)
        at += rank


@inlined
def _range(job: Any, g: Any) -> Any:
    return read_int(job.starts, g), read_int(job.starts, g + 1)


@inlined
def _num_rows(job: Any, g: Any) -> Any:
    first, last = _range(job, g)
    return last - first


@inlined
def _work(job: Any, g: Any) -> Any:
    """What a group costs: to read its factors if its rows are few, else to multiply them."""
    if not read_int(job.blocks, g):
        return 0
    numbers = 0
    for part in range(job.num_parts):
        numbers += _rank(job, g, part) * (job.in_features + read_int(job.columns, 2 * part + 1))
    return numbers * max(_num_rows(job, g), _ROWS)


@inlined
def _do(
    job: Any, like_model: Any, g: Any, like: Any, begin: Any, end: Any, work: Any, half: Any,
    many: Any,
) -> None:  # fmt: skip
    """A thread's share of a group, from begin / work to end / work, as far as a half goes."""
    a, rank = read_int(job.blocks, g), _total_rank(job, g)
    first, last = _range(job, g)
    if last - first >= many:
        num_tiles = (last - first + _ROWS - 1) // _ROWS
        left = first + num_tiles * begin // work * _ROWS
        right = min(first + num_tiles * end // work * _ROWS, last)
        for i in range(left, right, _BLOCK):
            until = min(i + _BLOCK, right)
            if job.is_embedding:
                _select(job, a, like, i, until, rank)
            else:
                _shrink(job, like_model, a, like, i, until, 0, rank)
            _expand(job, like_model, g, like, i, until, 0, 1, 1)
        return
    if half == 0:
        if job.is_embedding:
            if begin == 0:
                _select(job, a, like, first, last, rank)
        else:
            _shrink(job, like_model, a, like, first, last, rank * begin // work, rank * end // work)
    # Nobody else has to be waited for where the whole group is our own.
    if (half == 0) == (end - begin == work):
        _expand(job, like_model, g, like, first, last, begin, end, work)


@compiled
def _run(job: Any, like: Any) -> None:
    """Each thread takes an equal share of all work: whole groups, and a piece of one at each end.

    A group of many rows is cut between rows. Of one with few, every thread that has a piece of it
    takes some rows of A, waits for the others, and takes some columns of y.
    """
    thread, num_threads = this_thread(job)
    many = max(_MANY, num_threads * _ROWS)
    total = 0
    for g in range(job.num_groups):
        total += _work(job, g)
    low, high = total * thread // num_threads, total * (thread + 1) // num_threads
    for half in range(2):
        if half and num_threads > 1:
            call_address(job.barrier)
        at = 0
        for g in range(job.num_groups):
            work = _work(job, g)
            begin, end = max(low - at, 0), min(high - at, work)
            at += work
            is_done = half and (end - begin == work or _num_rows(job, g) >= many)
            if begin >= end or is_done:
                continue
            element = read_int(job.elements, g)
            if element == _FLOAT32:
                _do(job, like, g, _LIKE_FLOAT32, begin, end, work, half, many)
            elif element == _BFLOAT16:
                _do(job, like, g, _LIKE_BFLOAT16, begin, end, work, half, many)
            else:
                _do(job, like, g, _LIKE_FLOAT16, begin, end, work, half, many)


class Loop:
    """The loop for a model, and the threads that it runs on.

    Args:
        element: dtype that the model computes in.
        threads: to run on.

    `address` is the C function's, for threads that run already.
    Cost: 20 s of compiling the first time on a machine, then numba's cache has it.
    """

    def __init__(self, element: Element, threads: Threads) -> None:
        self.element = element
        like = _LIKE[element]

        @cfunc(types.void(types.CPointer(_JOB)), cache=True, error_model="numpy")
        def run(job: Any) -> None:
            _run(carray(job, 1)[0], like)

        self._function = run  # its code is freed with it
        self.address: int = run.address
        declare(self.address, Job)
        self._threads = threads

    def new_job(self) -> Job:
        """Return a job without rows, to be filled in and kept."""
        return Job(
            thread_num=self._threads.thread_num,
            num_threads=self._threads.num_threads,
            barrier=self._threads.barrier,
        )

    def run(self, job: int) -> None:
        """Add every group's delta to its rows of y; the job is named by its address."""
        self._threads.run(self.address, job)
