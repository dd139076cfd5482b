"""Elements as the terms of dot products: whole vectors that are multiplied and added up in float32.

Where the CPU multiplies pairs of bfloat16 (kernels/cpu/dot), a vector of terms has 32 bfloat16
elements as they lie in memory; everywhere else 16 elements, widened to float32. What is compiled
follows from the type of the memory. Also prefetching. Used only by the kernels of this package.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from loraswarm.kernels.cpu.dot import HAS_DOT
from loraswarm.kernels.cpu.vectors import Vector, load, load_part, multiply_add

LANES = 16
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_PAIRS = ir.VectorType(_I32, LANES)
_ELEMENTS = ir.VectorType(_I16, 2 * LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


class _BFloats(ir.VectorType):  # type: ignore[misc]
    """LLVM's <32 x bfloat>, whose element llvmlite does not name."""

    def __init__(self) -> None:
        super().__init__(_I16, 2 * LANES)

    def _to_string(self) -> str:
        return f"<{2 * LANES} x bfloat>"


class Pairs(types.Type):  # type: ignore[misc]
    """16 pairs of bfloat16 elements."""

    def __init__(self) -> None:
        super().__init__(name="pairs16")


@register_model(Pairs)
class PairsModel(models.PrimitiveModel):  # type: ignore[misc]
    """32 bits for each pair."""

    def __init__(self, manager: Any, pairs: Pairs) -> None:
        super().__init__(manager, pairs, _PAIRS)


_pairs = Pairs()


def _has_pairs(memory: Any) -> bool:
    return HAS_DOT and memory.dtype == types.uint16


@intrinsic
def num_terms(context: Any, memory: Any) -> Any:
    """How many elements a vector of terms from this memory has, a constant."""
    count = 2 * LANES if _has_pairs(memory) else LANES

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return context.get_constant(types.intp, count)

    return types.intp(memory), generate


@intrinsic
def load_terms(context: Any, like: Vector, memory: Any, index: Any) -> Any:
    """Elements of `memory` from `index` on, as many as `num_terms`; `like` has 16 lanes."""
    if not _has_pairs(memory):
        return _as_intrinsic(load, context, like, memory, index)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.gep(values[1], [values[2]])
        return builder.load(builder.bitcast(place, _PAIRS.as_pointer()), align=2)

    return _pairs(like, memory, types.intp), generate


@intrinsic
def load_terms_part(context: Any, like: Vector, memory: Any, index: Any, count: Any) -> Any:
    """As `load_terms`; elements from `count` on are zero and are not read."""
    if not _has_pairs(memory):
        return _as_intrinsic(load_part, context, like, memory, index, count)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.gep(values[1], [values[2]])
        staged = cgutils.alloca_once(builder, _ELEMENTS)
        builder.store(ir.Constant(_ELEMENTS, [_I16(0)] * (2 * LANES)), staged)
        target = builder.bitcast(staged, _I16.as_pointer())
        with cgutils.for_range(builder, values[3]) as loop:
            element = builder.load(builder.gep(place, [loop.index]))
            builder.store(element, builder.gep(target, [loop.index]))
        return builder.load(builder.bitcast(staged, _PAIRS.as_pointer()), align=2)

    return _pairs(like, memory, types.intp, types.intp), generate


@intrinsic
def add_products(context: Any, a: Any, b: Any, sums: Vector) -> Any:
    """sums + a * b of terms: of a pair, both products go to one lane."""
    if not isinstance(a, Pairs):
        return _as_intrinsic(multiply_add, context, a, b, sums)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bfloats = _BFloats()
        function_type = ir.FunctionType(_FLOATS, [_FLOATS, bfloats, bfloats])
        function = cgutils.get_or_insert_function(
            builder.module, function_type, "llvm.x86.avx512bf16.dpbf16ps.512"
        )
        a, b = (builder.bitcast(terms, bfloats) for terms in values[:2])
        return builder.call(function, [values[2], a, b])

    return sums(a, b, sums), generate


@intrinsic
def totals16(context: Any, vectors: Any) -> Any:
    """A vector of the sums of 16 vectors of 16 lanes, each added in the order of `total`."""
    vector = vectors.dtype

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        parts = cgutils.unpack_tuple(builder, values[0])
        half = LANES // 2
        while len(parts) > 1:
            low = [lane for lane in range(2 * LANES) if lane % (2 * half) < half]
            high = [lane + half for lane in low]
            parts = [
                builder.fadd(
                    builder.shuffle_vector(a, b, _indices(low)),
                    builder.shuffle_vector(a, b, _indices(high)),
                )
                for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
            half //= 2
        return parts[0]

    return vector(vectors), generate


@intrinsic
def whole_lines(context: Any, memory: Any) -> Any:
    """The pointer, moved on by less than 64 bytes to where a cache line begins."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = builder.ptrtoint(values[0], _I64)
        address = builder.and_(builder.add(address, _I64(63)), _I64(-64))
        return builder.inttoptr(address, values[0].type)

    return memory(memory), generate


def _as_intrinsic(function: Any, context: Any, *arguments: Any) -> Any:
    """Signature and code of another intrinsic for these types."""
    return function._defn(context, *arguments)


def _indices(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(lanes)), [_I32(lane) for lane in lanes])
