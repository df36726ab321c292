"""Instructions for compiled functions on addresses, for which numba has no words of its own.

Functions work on addresses, since numba's arrays count references and check indices, which costs
more than the sums of a short row. Vectors, 16-bit floats and asking for memory ahead are LLVM's.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels.
"""

import ctypes
import math
from contextlib import AbstractContextManager
from typing import Any

from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FEATURES = frozenset((config.CPU_FEATURES or binding.get_host_cpu_features().flatten()).split(","))
HAS_AVX2 = {"+avx2", "+fma"} <= FEATURES
HAS_AVX512 = "+avx512f" in FEATURES
LANES = 16 if HAS_AVX512 else 8  # float32 of a vector
CACHE_LINE = 64  # bytes

compiled = njit(nogil=True, error_model="numpy")
inlined = njit(nogil=True, error_model="numpy", forceinline=True)

FLOAT, HALF = ir.FloatType(), ir.HalfType()
BITS_64, BITS_32, BITS_16, BITS_8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))


_LOG2_E = 1 / math.log(2)
# ln(2) in two parts, the first of few enough bits that its products with small numbers are exact.
_LN_2 = (0.693359375, math.log(2) - 0.693359375)
_DEGREE = 7


def int64_fields(*names: str) -> list[tuple[str, Any]]:
    """Return a ctypes structure's fields, all int64."""
    return [(name, ctypes.c_int64) for name in names]


def record_of(job: type[ctypes.Structure]) -> Any:
    """Return the same structure, all int64, as compiled functions read it."""
    return types.Record.make_c_struct([(field[0], types.int64) for field in job._fields_])


def _wide(kind: Any, lanes: int) -> Any:
    return kind if lanes == 1 else ir.VectorType(kind, lanes)


def _int_constant(number: int, lanes: int) -> Any:
    return ir.Constant(_wide(BITS_32, lanes), number if lanes == 1 else [number] * lanes)


class Builder:
    """LLVM instructions for numbers at addresses; all addresses are int64.

    Args:
        builder: llvmlite's.
        lanes: float32 of a vector; 1 for plain numbers.
    """

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder = builder
        self.lanes = lanes

    def plus(self, address: Any, *terms: Any) -> Any:
        """Return a sum of int64."""
        for term in terms:
            address = self.builder.add(address, term)
        return address

    def times(self, a: Any, b: Any) -> Any:
        """Return a product of int64; b may be Python's."""
        return self.builder.mul(a, b if isinstance(b, ir.Value) else BITS_64(b))

    def integer(self, address: Any, index: int) -> Any:
        """Return the int64 at `index` after an address."""
        pointer = self.builder.inttoptr(address, BITS_64.as_pointer())
        return self.builder.load(self.builder.gep(pointer, [BITS_32(index)]))

    def load(self, address: Any, like: Any) -> Any:
        """Return the numbers at an address, as float32."""
        stored = FLOAT if like == types.float32 else BITS_16
        pointer = self.builder.inttoptr(address, _wide(stored, self.lanes).as_pointer())
        found = self.builder.load(pointer, align=like.bitwidth // 8)
        if like == types.uint16:
            bits = self.builder.zext(found, _wide(BITS_32, self.lanes))
            shifted = self.builder.shl(bits, _int_constant(16, self.lanes))
            return self.builder.bitcast(shifted, _wide(FLOAT, self.lanes))
        if like == types.int16:
            halves = self.builder.bitcast(found, _wide(HALF, self.lanes))
            return self.builder.fpext(halves, _wide(FLOAT, self.lanes))
        return found

    def store(self, number: Any, address: Any, like: Any) -> None:
        """Write float32 numbers, rounded to the nearest, ties to even."""
        b, lanes = self.builder, self.lanes
        if like == types.uint16:
            bits = b.bitcast(number, _wide(BITS_32, lanes))
            last = b.and_(b.lshr(bits, _int_constant(16, lanes)), _int_constant(1, lanes))
            nearest = b.add(bits, b.add(last, _int_constant(0x7FFF, lanes)))
            is_nan = b.fcmp_unordered("uno", number, number)
            kept = b.lshr(b.select(is_nan, bits, nearest), _int_constant(16, lanes))
            number = b.trunc(kept, _wide(BITS_16, lanes))
        elif like == types.int16:
            number = b.bitcast(b.fptrunc(number, _wide(HALF, lanes)), _wide(BITS_16, lanes))
        pointer = b.inttoptr(address, number.type.as_pointer())
        b.store(number, pointer, align=like.bitwidth // 8)

    def all(self, number: Any) -> Any:
        """Return a vector of one number."""
        if self.lanes == 1:
            return number
        kind = _wide(FLOAT, self.lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, BITS_32(0))
        return self.builder.shuffle_vector(one, one, _int_constant(0, self.lanes))

    def zero(self) -> Any:
        """Return a variable, 0 at first."""
        kind = _wide(FLOAT, self.lanes)
        return cgutils.alloca_once_value(self.builder, ir.Constant(kind, None))

    def constant(self, number: float) -> Any:
        """Return a vector of a number that is known when the function is compiled."""
        return ir.Constant(
            _wide(FLOAT, self.lanes), number if self.lanes == 1 else [number] * self.lanes
        )

    def times_plus(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c, in one rounding where the processor can."""
        kind = _wide(FLOAT, self.lanes)
        name = "llvm.fmuladd." + ("f32" if self.lanes == 1 else f"v{self.lanes}f32")
        return self.call(name, kind, a, b, c)

    def sum(self, numbers: Any) -> Any:
        """Return the sum of a vector's numbers, in any order."""
        if self.lanes == 1:
            return numbers
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        return self.call(name, FLOAT, FLOAT(0), numbers, fastmath=("reassoc",))

    def larger(self, a: Any, b: Any) -> Any:
        """Return the larger numbers of two; b where a is none."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def largest(self, numbers: Any) -> Any:
        """Return the largest of a vector's numbers."""
        if self.lanes == 1:
            return numbers
        return self.call(f"llvm.vector.reduce.fmax.v{self.lanes}f32", FLOAT, numbers)

    def is_below(self, index: Any, length: Any) -> Any:
        """Tell of each number of a vector, the first of which has an index, if it has a lower one.

        Args: index, length: int64, less than 2³¹ apart.
        """
        kind = _wide(BITS_32, self.lanes)
        left = self.builder.trunc(self.builder.sub(length, index), BITS_32)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), left, BITS_32(0))
        all_left = self.builder.shuffle_vector(one, one, _int_constant(0, self.lanes))
        lanes = ir.Constant(kind, list(range(self.lanes)))
        return self.builder.icmp_signed("<", lanes, all_left)

    def exp(self, x: Any) -> Any:
        """Return e to the power of numbers that are 0 at most, within 2 units of the last place.

        2 to the power of a whole number, times a polynomial of degree 7 for the rest, which is
        between -ln(2) / 2 and ln(2) / 2. What is below e⁻⁸⁷ is 0.
        """
        b, lanes = self.builder, self.lanes
        kind, ints = _wide(FLOAT, lanes), _wide(BITS_32, lanes)
        lowest = self.constant(-87.0)
        is_zero = b.fcmp_ordered("<", x, lowest)
        x = b.select(is_zero, lowest, x)
        rint = "llvm.rint." + ("f32" if lanes == 1 else f"v{lanes}f32")
        whole = self.call(rint, kind, b.fmul(x, self.constant(_LOG2_E)))
        for part in _LN_2:
            x = self.times_plus(whole, self.constant(-part), x)
        power = self.constant(1 / math.factorial(_DEGREE))
        for degree in range(_DEGREE - 1, -1, -1):
            power = self.times_plus(power, x, self.constant(1 / math.factorial(degree)))
        exponent = b.add(b.fptosi(whole, ints), _int_constant(127, lanes))
        product = b.fmul(power, b.bitcast(b.shl(exponent, _int_constant(23, lanes)), kind))
        return b.select(is_zero, self.constant(0.0), product)

    def prefetch(self, address: Any) -> None:
        """Ask for a cache line that will be read soon."""
        pointer = self.builder.inttoptr(address, BITS_8.as_pointer())
        flags = (BITS_32(0), BITS_32(3), BITS_32(1))  # to read, into all caches, data
        self.call("llvm.prefetch.p0i8", ir.VoidType(), pointer, *flags)

    def call(self, name: str, result: Any, *arguments: Any, fastmath: tuple[str, ...] = ()) -> Any:
        """Call one of LLVM's own functions."""
        module = self.builder.module
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return self.builder.call(function, arguments, fastmath=fastmath)

    def steps(self, start: Any, stop: Any, step: int) -> AbstractContextManager[Any]:
        """Loop over the whole steps from start to stop."""
        one_less = self.builder.sub(stop, BITS_64(step - 1))
        return cgutils.for_range_slice(  # type: ignore[no-any-return]
            self.builder, start, one_less, BITS_64(step), BITS_64
        )


@intrinsic
def size_of(_: Any, like: Any) -> Any:
    """Bytes of an element."""

    def generate(context: Any, __: Any, ___: Any, ____: Any) -> Any:
        return context.get_constant(types.int64, like.bitwidth // 8)

    return types.int64(like), generate


@intrinsic
def read_int(_: Any, address: Any, index: Any) -> Any:
    """The int64 at `index` after `address`."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        return Builder(builder, 1).integer(
            builder.add(values[0], builder.mul(values[1], BITS_64(8))), 0
        )

    return types.int64(types.int64, types.int64), generate


@intrinsic
def read_int32(_: Any, address: Any, index: Any) -> Any:
    """The int32 at `index` after `address`."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        place = builder.add(values[0], builder.mul(values[1], BITS_64(4)))
        return builder.sext(builder.load(builder.inttoptr(place, BITS_32.as_pointer())), BITS_64)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def write_int(_: Any, address: Any, number: Any) -> Any:
    """Write an int64."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        builder.store(values[1], builder.inttoptr(values[0], BITS_64.as_pointer()))

    return types.void(types.int64, types.int64), generate


@intrinsic
def read_number(_: Any, address: Any, like: Any) -> Any:
    """The number at an address, as float32."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        return Builder(builder, 1).load(values[0], like)

    return types.float32(types.int64, like), generate


@intrinsic
def write_number(_: Any, address: Any, number: Any) -> Any:
    """Write a float32."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        Builder(builder, 1).store(values[1], values[0], types.float32)

    return types.void(types.int64, types.float32), generate


@intrinsic
def call_address(_: Any, function: Any) -> Any:
    """Call a C function without arguments, by its address."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        kind = ir.FunctionType(BITS_32, [])
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), [])

    return types.int32(types.int64), generate


@intrinsic
def call_with(_: Any, function: Any, argument: Any) -> Any:
    """Call a C function of one address, by its own."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [BITS_64])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), [values[1]])

    return types.void(types.int64, types.int64), generate


@intrinsic
def take(_: Any, address: Any) -> Any:
    """Count one more at an address, whoever else does; return the number before."""

    def generate(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], BITS_64.as_pointer())
        return builder.atomic_rmw("add", pointer, BITS_64(1), "monotonic")

    return types.int64(types.int64), generate


@inlined
def this_thread(job: Any) -> Any:
    """Return the running thread's number and how many run, by the addresses in a job."""
    if job.thread_num:
        return call_address(job.thread_num), call_address(job.num_threads)
    return 0, 1
