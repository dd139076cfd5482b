"""Float vectors of a fixed number of lanes for Numba: a kernel says itself how it is vectorised.

Elements of bfloat16, float16 and float32 arrays are widened to float32 in registers and rounded
back (to nearest, ties to even) when stored. NumPy has no bfloat16: its bits travel as uint16, those
of float16 as int16. Loads and stores take bare pointers and an element's index; nothing checks
bounds. Used only by the kernels of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from loraswarm.kernels.cpu.jit import inlined

_F16, _F32 = ir.HalfType(), ir.FloatType()
_I16, _I32 = ir.IntType(16), ir.IntType(32)
_ONE_BITS = 0x3F800000
_INFINITY_BITS = 0x7F800000
WHOLE_NUMBERS = np.float32(1.5 * 2**23)  # adding it rounds a number below 2**22 to a whole one
LOWEST_EXPONENT = np.float32(-126.0)
LN_2_HIGH = np.float32(0.693359375)  # few bits: its product with a whole number is exact
LN_2_LOW = np.float32(-2.12194440054690583e-4)
LOG2_E = np.float32(1.4426950408889634)


class Vector(types.Type):  # type: ignore[misc]
    """`lanes` float32 values; LLVM maps them to as many registers as the machine needs."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"vector{lanes}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """A Numba vector is an LLVM vector."""

    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(_F32, vector.lanes))


@intrinsic(prefer_literal=True)
def zeros(context: Any, lanes: Any) -> Any:
    """A vector of zeros; `lanes` is a constant."""
    vector = Vector(lanes.literal_value)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _constant(_F32, 0.0, vector.lanes)

    return vector(lanes), generate


@intrinsic
def broadcast(context: Any, like: Vector, value: Any) -> Any:
    """A vector with the lanes of `like`, each equal to the float32 `value`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        undefined = ir.Constant(values[0].type, ir.Undefined)
        first = builder.insert_element(undefined, values[1], _I32(0))
        return builder.shuffle_vector(first, undefined, _constant(_I32, 0, like.lanes))

    return like(like, types.float32), generate


@intrinsic
def memory_of(context: Any, array: Any, index: Any) -> Any:
    """The memory of an array from element `index` on, as a bare pointer.

    Kernels hand this down instead of the array, whose every hand-over counts references.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(array)(context, builder, values[0]).data
        return builder.gep(data, [values[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


@intrinsic
def load(context: Any, like: Vector, memory: Any, index: Any) -> Any:
    """Elements `index : index + lanes` of `memory`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.gep(values[1], [values[2]])
        wide = builder.bitcast(
            pointer, ir.VectorType(pointer.type.pointee, like.lanes).as_pointer()
        )
        return _widen(builder, builder.load(wide, align=_align(memory)), memory.dtype)

    return like(like, memory, types.intp), generate


@intrinsic
def load_part(context: Any, like: Vector, memory: Any, index: Any, count: Any) -> Any:
    """Elements `index : index + count`; the lanes from `count` on are zero and are not read."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.gep(values[1], [values[2]])
        kind = pointer.type.pointee
        staged = cgutils.alloca_once(builder, ir.VectorType(kind, like.lanes))
        builder.store(_constant(kind, 0, like.lanes), staged)
        _copy_elements(builder, pointer, builder.bitcast(staged, kind.as_pointer()), values[3])
        return _widen(builder, builder.load(staged), memory.dtype)

    return like(like, memory, types.intp, types.intp), generate


@intrinsic
def store(context: Any, value: Vector, memory: Any, index: Any) -> Any:
    """Write every lane to elements `index : index + lanes`, rounded to the memory's type."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.gep(values[1], [values[2]])
        narrow = _narrow(builder, values[0], memory.dtype)
        wide = builder.bitcast(pointer, narrow.type.as_pointer())
        builder.store(narrow, wide, align=_align(memory))
        return context.get_dummy_value()

    return types.void(value, memory, types.intp), generate


@intrinsic
def store_part(context: Any, value: Vector, memory: Any, index: Any, count: Any) -> Any:
    """Write the first `count` lanes as `store` does; other elements keep their bits."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.gep(values[1], [values[2]])
        narrow = _narrow(builder, values[0], memory.dtype)
        staged = cgutils.alloca_once(builder, narrow.type)
        builder.store(narrow, staged)
        _copy_elements(builder, builder.bitcast(staged, pointer.type), pointer, values[3])
        return context.get_dummy_value()

    return types.void(value, memory, types.intp, types.intp), generate


@intrinsic
def rounded(context: Any, value: Vector, memory: Any) -> Any:
    """Every lane rounded to the memory's type, and widened again."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        narrow = _narrow(builder, values[0], memory.dtype)
        return _widen(builder, narrow, memory.dtype)

    return value(value, memory), generate


def _elementwise(name: str, num_operands: int, generate: Callable[..., Any]) -> Any:
    """An intrinsic that maps vectors of equal lanes to one: `generate(builder, *operands)`."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return generate(builder, *values)

    def unary(context: Any, a: Vector) -> Any:
        return a(a), lower

    def binary(context: Any, a: Vector, b: Vector) -> Any:
        return a(a, b), lower

    def ternary(context: Any, a: Vector, b: Vector, c: Vector) -> Any:
        return a(a, b, c), lower

    typing = (unary, binary, ternary)[num_operands - 1]
    typing.__name__ = name
    return intrinsic(typing)


def _multiply_add(builder: Any, a: Any, b: Any, addend: Any) -> Any:
    name = f"llvm.fmuladd.v{a.type.count}f32"
    function_type = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, [a, b, addend])


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def _minimum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", b, a), b, a)


def _power_of_two(builder: Any, shifted: Any) -> Any:
    lanes = shifted.type.count
    bits = builder.bitcast(shifted, ir.VectorType(_I32, lanes))
    exponent = builder.shl(bits, _constant(_I32, 23, lanes))
    return builder.bitcast(builder.add(exponent, _constant(_I32, _ONE_BITS, lanes)), shifted.type)


add = _elementwise("add", 2, lambda builder, a, b: builder.fadd(a, b))
subtract = _elementwise("subtract", 2, lambda builder, a, b: builder.fsub(a, b))
multiply = _elementwise("multiply", 2, lambda builder, a, b: builder.fmul(a, b))
divide = _elementwise("divide", 2, lambda builder, a, b: builder.fdiv(a, b))
multiply_add = _elementwise("multiply_add", 3, _multiply_add)
"""a * b + addend."""
maximum = _elementwise("maximum", 2, _maximum)
"""The larger of a and b, lane by lane; a where b is not a number."""
minimum = _elementwise("minimum", 2, _minimum)
"""The smaller of a and b, lane by lane; a where b is not a number."""
power_of_two = _elementwise("power_of_two", 1, _power_of_two)
"""2 ** n of a whole n from -126 to 127, given as 1.5 * 2**23 + n."""


@intrinsic
def where_between(context: Any, low: Any, key: Any, high: Any, inside: Any, outside: Any) -> Any:
    """Lane by lane `inside` where low <= key <= high, `outside` elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        low, key, high, inside, outside = values
        above = builder.fcmp_ordered("<=", low, key)
        below = builder.fcmp_ordered("<=", key, high)
        return builder.select(builder.and_(above, below), inside, outside)

    return inside(low, key, high, inside, outside), generate


def _folded(combine: Callable[..., Any]) -> Any:
    """An intrinsic that combines the halves of a vector until one lane is left, always in the same
    order."""

    def typing(context: Any, value: Vector) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            vector = values[0]
            while vector.type.count > 1:
                half = vector.type.count // 2
                first, second = (
                    builder.shuffle_vector(vector, vector, _indices(range(begin, begin + half)))
                    for begin in (0, half)
                )
                vector = combine(builder, first, second)
            return builder.extract_element(vector, _I32(0))

        return types.float32(value), generate

    return intrinsic(typing)


total = _folded(lambda builder, a, b: builder.fadd(a, b))
"""The sum of all lanes."""
highest = _folded(_maximum)
"""The largest of all lanes, none of which is NaN."""


@intrinsic
def float_of_bits(context: Any, bits: Any) -> Any:
    """The float32 whose bits an int64 holds."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.trunc(values[0], _I32), _F32)

    return types.float32(types.int64), generate


@intrinsic
def num_lanes(context: Any, value: Vector) -> Any:
    """How many lanes a vector has, a constant."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return context.get_constant(types.intp, value.lanes)

    return types.intp(value), generate


@inlined
def load_up_to(like: Any, memory: Any, index: int, count: int) -> Any:
    """`load`, or `load_part` if fewer than all lanes are left."""
    if count >= num_lanes(like):
        return load(like, memory, index)
    return load_part(like, memory, index, count)


@inlined
def store_up_to(value: Any, memory: Any, index: int, count: int) -> None:
    """`store`, or `store_part` if fewer than all lanes are left."""
    if count >= num_lanes(value):
        store(value, memory, index)
    else:
        store_part(value, memory, index, count)


@inlined
def exp2(exponent: Any) -> Any:
    """2 ** exponent for exponents up to 0; 2 ** -126 below that; NaN stays NaN.

    Numerics    relative error below 3e-7: Taylor series of degree 6 on [-0.5, 0.5].
    """
    exponent = maximum(exponent, broadcast(exponent, LOWEST_EXPONENT))
    shifted = add(exponent, broadcast(exponent, WHOLE_NUMBERS))
    fraction = subtract(exponent, subtract(shifted, broadcast(exponent, WHOLE_NUMBERS)))
    result = broadcast(exponent, np.float32(1.5403530393381608e-4))
    result = multiply_add(result, fraction, broadcast(exponent, np.float32(1.3333558146428443e-3)))
    result = multiply_add(result, fraction, broadcast(exponent, np.float32(9.618129107628477e-3)))
    result = multiply_add(result, fraction, broadcast(exponent, np.float32(5.550410866482158e-2)))
    result = multiply_add(result, fraction, broadcast(exponent, np.float32(2.402265069591007e-1)))
    result = multiply_add(result, fraction, broadcast(exponent, np.float32(6.931471805599453e-1)))
    result = multiply_add(result, fraction, broadcast(exponent, np.float32(1.0)))
    return multiply(result, power_of_two(shifted))


@inlined
def exp(exponent: Any) -> Any:
    """e ** exponent; infinite from 128 ln 2 on, e ** -86 below -86; NaN stays NaN.

    Numerics    relative error below 2e-7: 2 ** n times the Taylor series of degree 7 of the rest,
                which is at most ln 2 / 2.
    """
    exponent = maximum(exponent, broadcast(exponent, np.float32(-86.0)))
    exponent = minimum(exponent, broadcast(exponent, np.float32(89.0)))
    shifted = multiply_add(
        exponent, broadcast(exponent, LOG2_E), broadcast(exponent, WHOLE_NUMBERS)
    )
    whole = subtract(shifted, broadcast(exponent, WHOLE_NUMBERS))
    rest = multiply_add(whole, broadcast(exponent, -LN_2_HIGH), exponent)
    rest = multiply_add(whole, broadcast(exponent, -LN_2_LOW), rest)
    square = multiply(rest, rest)
    one = broadcast(exponent, np.float32(1.0))
    low = add(rest, one)
    high = multiply_add(
        rest, broadcast(exponent, np.float32(1 / 6)), broadcast(exponent, np.float32(1 / 2))
    )
    low = multiply_add(high, square, low)
    high = multiply_add(
        rest, broadcast(exponent, np.float32(1 / 120)), broadcast(exponent, np.float32(1 / 24))
    )
    highest = multiply_add(
        rest, broadcast(exponent, np.float32(1 / 5040)), broadcast(exponent, np.float32(1 / 720))
    )
    high = multiply_add(highest, square, high)
    result = multiply_add(high, multiply(square, square), low)
    doubled = add(result, result)
    return multiply(doubled, power_of_two(subtract(shifted, one)))


def _align(memory: Any) -> int:
    """Rows start at any element, so only an element's own alignment holds."""
    return int(memory.dtype.bitwidth) // 8


def _copy_elements(builder: Any, source: Any, target: Any, count: Any) -> None:
    with cgutils.for_range(builder, count) as loop:
        element = builder.load(builder.gep(source, [loop.index]))
        builder.store(element, builder.gep(target, [loop.index]))


def _widen(builder: Any, stored: Any, element: Any) -> Any:
    """float32 lanes of elements as they lie in memory of type `element`."""
    lanes = stored.type.count
    if element == types.float32:
        return stored
    if element == types.int16:
        half = builder.bitcast(stored, ir.VectorType(_F16, lanes))
        return builder.fpext(half, ir.VectorType(_F32, lanes))
    bits = builder.zext(stored, ir.VectorType(_I32, lanes))
    bits = builder.shl(bits, _constant(_I32, 16, lanes))
    return builder.bitcast(bits, ir.VectorType(_F32, lanes))


def _narrow(builder: Any, value: Any, element: Any) -> Any:
    """Round float32 lanes to elements of type `element`; NaN stays NaN."""
    lanes = value.type.count
    if element == types.float32:
        return value
    if element == types.int16:
        half = builder.fptrunc(value, ir.VectorType(_F16, lanes))
        return builder.bitcast(half, ir.VectorType(_I16, lanes))
    bits = builder.bitcast(value, ir.VectorType(_I32, lanes))
    high = builder.lshr(bits, _constant(_I32, 16, lanes))
    odd = builder.and_(high, _constant(_I32, 1, lanes))
    nearest = builder.add(builder.add(bits, _constant(_I32, 0x7FFF, lanes)), odd)
    rounded = builder.lshr(nearest, _constant(_I32, 16, lanes))
    magnitude = builder.and_(bits, _constant(_I32, 0x7FFFFFFF, lanes))
    is_nan = builder.icmp_unsigned(">", magnitude, _constant(_I32, _INFINITY_BITS, lanes))
    quiet = builder.or_(high, _constant(_I32, 0x40, lanes))
    return builder.trunc(builder.select(is_nan, quiet, rounded), ir.VectorType(_I16, lanes))


def _constant(kind: ir.Type, value: float, lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, lanes), [ir.Constant(kind, value)] * lanes)


def _indices(lanes: range) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(lanes)), [_I32(lane) for lane in lanes])
