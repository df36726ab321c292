"""Tiles of products of matrices, summed up in registers."""

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from rora_serve.engine.instructions import BITS_64, LANES, Builder


def new_multiply_tile(max_rows: int, num_vectors: int) -> Callable[..., None]:
    """Return a tile of a product: y[i] = start[i] + x[i] W for a few rows and some vectors of W.

    Args:
        max_rows: of x, at most; each with its number has code of its own.
        num_vectors: columns of W, in vectors.
    """

    @intrinsic
    def multiply_tile(
        _: Any, num_rows: Any, x: Any, x_stride: Any, w: Any, w_stride: Any, length: Any, y: Any,
        y_stride: Any, start: Any, start_stride: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        """See above. All numbers are float32.

        Args:
            num_rows: from 1 to max_rows.
            x, w, y, start: addresses; of the tile's own first columns.
            x_stride, w_stride, y_stride, start_stride: bytes from row to row.
            length: rows of W.
            ahead: bytes from what is read of W to what is asked for.
        """

        def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
            num_rows, x, x_stride, w, w_stride, length = values[:6]
            y, y_stride, start, start_stride, ahead = values[6:]
            vectors, numbers = Builder(builder, LANES), Builder(builder, 1)
            vector_bytes = 4 * LANES

            def multiply(count: int) -> None:
                tile = [(i, v) for i in range(count) for v in range(num_vectors)]

                def place(address: Any, stride: Any, i: int, v: int) -> Any:
                    return vectors.plus(
                        address, vectors.times(stride, i), BITS_64(v * vector_bytes)
                    )

                x_rows = [numbers.plus(x, numbers.times(x_stride, i)) for i in range(count)]
                sums = {at: vectors.zero() for at in tile}
                with vectors.steps(BITS_64(0), length, 1) as (k, ____):
                    row = vectors.plus(w, vectors.times(k, w_stride))
                    for offset in range(0, num_vectors * vector_bytes, 64):
                        vectors.prefetch(vectors.plus(row, ahead, BITS_64(offset)))
                    weights = [
                        vectors.load(vectors.plus(row, BITS_64(v * vector_bytes)), types.float32)
                        for v in range(num_vectors)
                    ]
                    for i, x_row in enumerate(x_rows):
                        at_x = numbers.plus(x_row, numbers.times(k, 4))
                        factor = vectors.all(numbers.load(at_x, types.float32))
                        for v, weight in enumerate(weights):
                            total = vectors.times_plus(factor, weight, builder.load(sums[i, v]))
                            builder.store(total, sums[i, v])
                for at in tile:
                    first = vectors.load(place(start, start_stride, *at), types.float32)
                    total = builder.fadd(first, builder.load(sums[at]))
                    vectors.store(total, place(y, y_stride, *at), types.float32)

            end = builder.append_basic_block()
            switch = builder.switch(num_rows, end)
            for count in range(1, max_rows + 1):
                block = builder.append_basic_block()
                switch.add_case(BITS_64(count), block)
                builder.position_at_end(block)
                multiply(count)
                builder.branch(end)
            builder.position_at_end(end)

        return types.void(*[types.int64] * 11), generate

    return multiply_tile  # type: ignore[no-any-return]
