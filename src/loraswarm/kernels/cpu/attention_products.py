"""The innermost products of attention: blocks of 32 keys in panels, 1 to 12 rows of queries.

Panels hold 32-bit words, a word of key c in column c: two bfloat16 where the CPU multiplies pairs
of them (kernels/cpu/dot), else one float32. Knows nothing about pages, softmax or threads. Called
by kernels/cpu/attention_rows.

    panel, word w    | key 0: word w | key 1: word w | ... | key 31: word w |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from loraswarm.kernels.cpu.dot import HAS_DOT, MAX_ROWS, PANEL_COLUMNS
from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import moved
from loraswarm.kernels.cpu.vectors import Vector

LANES = 16
_VECTORS = PANEL_COLUMNS // LANES

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(_I32, LANES)
_BYTE = ir.IntType(8).as_pointer()


@intrinsic
def address_of(context: Any, memory: Any) -> Any:
    """Where a bare pointer points."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.ptrtoint(values[0], _I64)

    return types.int64(memory), generate


@intrinsic
def element_bytes(context: Any, memory: Any) -> Any:
    """Bytes of an element, a constant."""
    num_bytes = memory.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return context.get_constant(types.intp, num_bytes)

    return types.intp(memory), generate


@intrinsic
def greatest(context: Any, value: Vector) -> Any:
    """The largest of all lanes, or NaN or any of them if one is NaN."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        vector = values[0]
        while vector.type.count > 1:
            half = vector.type.count // 2
            first, second = (
                _shuffled(builder, vector, vector, range(begin, begin + half))
                for begin in (0, half)
            )
            vector = builder.select(builder.fcmp_ordered(">", second, first), second, first)
        return builder.extract_element(vector, _I32(0))

    return types.float32(value), generate


@intrinsic
def multiplies_pairs(context: Any, like: Any) -> Any:
    """Whether scores of this element type come from pairs of bfloat16, a constant."""
    is_paired = HAS_DOT and like.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return context.get_constant(types.boolean, is_paired)

    return types.boolean(like), generate


@intrinsic
def _transpose_words(context: Any, source: Any, offsets: Any, index: Any, panel: Any) -> Any:
    """panel[w, c] = word w after element `offsets[c] + index`, for 16 words and 16 keys."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        source_at, offsets, index, panel = values
        vectors = []
        for key in range(LANES):
            start = builder.add(builder.load(builder.gep(offsets, [_I64(key)])), index)
            place = builder.bitcast(builder.gep(source_at, [start]), _FLOATS.as_pointer())
            vectors.append(builder.load(place, align=source.dtype.bitwidth // 8))
        for word, vector in enumerate(_transposed(builder, vectors)):
            place = builder.gep(panel, [_I64(word * PANEL_COLUMNS)])
            builder.store(vector, builder.bitcast(place, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(source, offsets, types.intp, panel), generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Columns of 16 x 16 words: pairs within quarters of a vector first, then whole quarters."""
    quarters = range(0, LANES, 4)
    low_words = [part for q in quarters for part in (q, 16 + q, q + 1, 17 + q)]
    high_words = [part + 2 for part in low_words]
    low_halves = [part for q in quarters for part in (q, q + 1, 16 + q, 17 + q)]
    high_halves = [part + 2 for part in low_halves]
    groups = []
    for first in range(0, LANES, 4):
        a, b, c, d = rows[first : first + 4]
        ab, cd = (_shuffled(builder, *two, low_words) for two in ((a, b), (c, d)))
        ab_high, cd_high = (_shuffled(builder, *two, high_words) for two in ((a, b), (c, d)))
        groups.append(
            [
                _shuffled(builder, ab, cd, low_halves),
                _shuffled(builder, ab, cd, high_halves),
                _shuffled(builder, ab_high, cd_high, low_halves),
                _shuffled(builder, ab_high, cd_high, high_halves),
            ]
        )
    columns: list[Any] = [None] * LANES
    even = [*range(4), *range(8, 12), *range(16, 20), *range(24, 28)]
    odd = [part + 4 for part in even]
    for column in range(4):
        a, b, c, d = (group[column] for group in groups)
        for half, places in enumerate(
            ([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)])
        ):
            ab, cd = _shuffled(builder, a, b, places), _shuffled(builder, c, d, places)
            columns[8 * half + column] = _shuffled(builder, ab, cd, even)
            columns[8 * half + 4 + column] = _shuffled(builder, ab, cd, odd)
    return columns


def _shuffled(builder: Any, a: Any, b: Any, lanes: Iterable[int]) -> Any:
    numbers = [_I32(lane) for lane in lanes]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(numbers)), numbers))


def _for_each_count(builder: Any, count: Any, generate: Callable[[int], None]) -> None:
    """Code of its own for each number of rows, 1 to 12."""
    end = builder.append_basic_block("end")
    switch = builder.switch(count, end)
    for rows in range(1, MAX_ROWS + 1):
        block = builder.append_basic_block(f"rows_{rows}")
        switch.add_case(count.type(rows), block)
        with builder.goto_block(block):
            generate(rows)
            builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def _multiply_panel(
    context: Any, x: Any, x_stride: Any, num_rows: Any, panel: Any, num_steps: Any, sums: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_stride, num_rows, panel, num_steps, sums = values

        def columns(step: Any) -> list[Any]:
            row = builder.gep(panel, [builder.mul(step, _I64(PANEL_COLUMNS))])
            return _load_floats(builder, row)

        _for_each_count(
            builder,
            num_rows,
            lambda rows: _multiply_rows(
                builder, _Rows(x, x_stride, sums, _I64(PANEL_COLUMNS), rows), num_steps, columns
            ),
        )
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, panel, types.intp, sums), generate


@intrinsic
def _add_rows(
    context: Any,
    x: Any,
    num_rows: Any,
    source: Any,
    offsets: Any,
    num_steps: Any,
    sums: Any,
    sums_stride: Any,
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, num_rows, memory, offsets, num_steps, sums, sums_stride = values

        def columns(step: Any) -> list[Any]:
            offset = builder.load(builder.gep(offsets, [step]))
            return _widened(builder, builder.gep(memory, [offset]), source.dtype)

        _for_each_count(
            builder,
            num_rows,
            lambda rows: _multiply_rows(
                builder, _Rows(x, _I64(PANEL_COLUMNS), sums, sums_stride, rows), num_steps, columns
            ),
        )
        return context.get_dummy_value()

    return types.void(x, types.intp, source, offsets, types.intp, sums, types.intp), generate


class _Rows(NamedTuple):
    """Factors, and the sums of 32 columns that they go into; strides in elements."""

    x: Any
    x_stride: Any
    sums: Any
    sums_stride: Any
    num_rows: int


def _multiply_rows(
    builder: Any, rows: _Rows, num_steps: Any, columns: Callable[[Any], list[Any]]
) -> None:
    """sums[r] += sum over steps k of x[r, k] * columns(k); the sums stay in registers."""
    targets = [
        builder.bitcast(
            builder.gep(rows.sums, [builder.mul(rows.sums_stride, _I64(row))]),
            _FLOATS.as_pointer(),
        )
        for row in range(rows.num_rows)
    ]
    places = [
        [
            cgutils.alloca_once_value(
                builder, builder.load(builder.gep(target, [_I64(i)]), align=4)
            )
            for i in range(_VECTORS)
        ]
        for target in targets
    ]
    factors = [
        builder.gep(rows.x, [builder.mul(rows.x_stride, _I64(row))]) for row in range(rows.num_rows)
    ]
    with cgutils.for_range(builder, num_steps) as loop:
        vectors = columns(loop.index)
        for row in range(rows.num_rows):
            factor = _broadcast(builder, builder.load(builder.gep(factors[row], [loop.index])))
            for place, vector in zip(places[row], vectors, strict=True):
                total = _multiply_add(builder, factor, vector, builder.load(place))
                builder.store(total, place)
    for target, row_places in zip(targets, places, strict=True):
        for i, place in enumerate(row_places):
            builder.store(builder.load(place), builder.gep(target, [_I64(i)]), align=4)


def _load_floats(builder: Any, place: Any) -> list[Any]:
    """32 float32."""
    vectors = builder.bitcast(place, _FLOATS.as_pointer())
    return [builder.load(builder.gep(vectors, [_I64(i)]), align=4) for i in range(_VECTORS)]


def _widened(builder: Any, place: Any, element: Any) -> list[Any]:
    """32 elements as two vectors of float32; of bfloat16 those in even columns, then the others."""
    if element == types.float32:
        return _load_floats(builder, place)
    if element == types.int16:
        halves = builder.bitcast(place, ir.VectorType(ir.HalfType(), LANES).as_pointer())
        return [
            builder.fpext(builder.load(builder.gep(halves, [_I64(i)]), align=2), _FLOATS)
            for i in range(_VECTORS)
        ]
    words = builder.load(builder.bitcast(place, _WORDS.as_pointer()), align=2)
    even = builder.shl(words, ir.Constant(_WORDS, [_I32(16)] * LANES))
    odd = builder.and_(words, ir.Constant(_WORDS, [_I32(0xFFFF0000)] * LANES))
    return [builder.bitcast(part, _FLOATS) for part in (even, odd)]


@intrinsic(prefer_literal=True)
def in_order(context: Any, first: Vector, second: Vector, half: Any, like: Any) -> Any:
    """The first or second 16 of 32 columns, which `add_rows` left in two vectors."""
    which = half.literal_value

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if like.dtype != types.uint16:
            return values[which]
        begin = which * LANES // 2
        lanes = [part for lane in range(begin, begin + LANES // 2) for part in (lane, lane + LANES)]
        return _shuffled(builder, values[0], values[1], lanes)

    return first(first, second, half, like), generate


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return _shuffled(builder, first, undefined, [0] * LANES)


def _multiply_add(builder: Any, a: Any, b: Any, addend: Any) -> Any:
    function_type = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    name = f"llvm.fmuladd.v{LANES}f32"
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, [a, b, addend])


@called
def transpose_words(source: Any, offsets: Any, num_words: int, step: int, panel: Any) -> None:
    """The panel of 32 keys of at least 16 words, `step` elements each; key c at `offsets[c]`."""
    word = 0
    while word < num_words:
        word = min(word, num_words - LANES)
        target = moved(panel, word * PANEL_COLUMNS)
        _transpose_words(source, offsets, word * step, target)
        _transpose_words(source, moved(offsets, LANES), word * step, moved(target, LANES))
        word += LANES


@called
def multiply_panel(
    x: Any, x_stride: int, num_rows: int, panel: Any, num_steps: int, sums: Any
) -> None:
    """sums[r, c] += sum over k of x[r, k] * panel[k, c] for 1 to 12 rows r and 32 columns c.

    All float32; rows of x are `x_stride` elements apart.
    """
    _multiply_panel(x, x_stride, num_rows, panel, num_steps, sums)


@called
def add_rows(
    x: Any, num_rows: int, source: Any, offsets: Any, num_steps: int, sums: Any, sums_stride: int
) -> None:
    """sums[r] += sum over k of x[r, k] * (32 elements from `source[offsets[k]]`), for 1 to 12 rows.

    x [rows, 32] and sums, rows `sums_stride` apart, are float32; the columns of sums come in the
    order that `in_order` puts right.
    """
    _add_rows(x, num_rows, source, offsets, num_steps, sums, sums_stride)
