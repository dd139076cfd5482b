"""Some panels of a weight with an adapter's tiles added: an item reads them once and writes others.

Each panel is read in its own order (kernels/cpu/dot): 64 elements are a pair of columns of 32 rows,
so a tile's row of Bt is kept twice over, and a pair of its row of A is repeated 32 times.

    scratch   | Bt: [ranks, 32 rows, 2] | A: [ranks, pairs of a chunk, 2] |

An item is run by kernels/cpu/operations; kernels/cpu/merging records it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from loraswarm.kernels.cpu.dot import PANEL_COLUMNS
from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import float_at, int32_at, int64_at, memory_at, moved
from loraswarm.kernels.cpu.terms import whole_lines
from loraswarm.kernels.cpu.tiles import (
    A_OFFSET,
    A_STRIDE,
    BT_OFFSET,
    BT_STRIDE,
    RANGES,
    RANKS,
    SCALE,
    U_OFFSET,
    V_OFFSET,
)
from loraswarm.kernels.cpu.vectors import (
    Vector,
    broadcast,
    load,
    load_up_to,
    multiply,
    multiply_add,
    store,
    zeros,
)

MAX_RANKS = 512
"""Of all parts of a linear together: what the scratch memory of a thread holds."""
PAIR_ELEMENTS = 2 * PANEL_COLUMNS
LANES = 16
STAGE_AT = MAX_RANKS * PAIR_ELEMENTS
A_AT = STAGE_AT + PAIR_ELEMENTS
A_FLOATS = 24_576
MAX_CHUNK_PAIRS = 64
ALIGNED_PAIRS = LANES // 2

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def _broadcast_pair(context: Any, like: Vector, memory: Any, index: Any) -> Any:
    """Two adjacent floats, again and again, in as many lanes as `like` has."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        half = like.lanes // 2
        undefined = ir.Constant(ir.VectorType(_I64, half), ir.Undefined)
        place = builder.bitcast(builder.gep(values[1], [values[2]]), _I64.as_pointer())
        first = builder.insert_element(undefined, builder.load(place, align=4), _I32(0))
        zero = ir.Constant(ir.VectorType(_I32, half), [_I32(0)] * half)
        pairs = builder.shuffle_vector(first, undefined, zero)
        return builder.bitcast(pairs, values[0].type)

    return like(like, memory, types.intp), generate


@called
def merge_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """Some panels; the arguments are those that kernels/cpu/merging makes."""
    scratch = whole_lines(scratch)
    first = arguments[3] + item * arguments[5]
    for panel in range(first, min(first + arguments[5], arguments[4])):
        _merge_panel(arguments, panel, scratch, like)


@called
def _merge_panel(arguments: Any, panel: int, scratch: Any, like: Any) -> None:
    num_pairs = arguments[2]
    start = panel * num_pairs * PAIR_ELEMENTS
    source = moved(memory_at(like, arguments[0]), start)
    target = moved(memory_at(like, arguments[1]), start)
    num_ranks = _take_bt(arguments, panel * PANEL_COLUMNS, scratch, like)
    a = moved(scratch, A_AT)
    chunk_pairs = min(MAX_CHUNK_PAIRS, A_FLOATS // (2 * max(num_ranks, 1)))
    chunk_pairs -= chunk_pairs % ALIGNED_PAIRS
    for pair in range(0, num_pairs, chunk_pairs):
        count = min(chunk_pairs, num_pairs - pair)
        _take_a(arguments, panel * PANEL_COLUMNS, pair, count, chunk_pairs, a, like)
        old, new = moved(source, pair * PAIR_ELEMENTS), moved(target, pair * PAIR_ELEMENTS)
        _add_ranks(old, new, scratch, a, num_ranks, chunk_pairs, count)


@called
def _add_ranks(
    source: Any, target: Any, bt: Any, a: Any, num_ranks: int, a_pairs: int, count: int
) -> None:
    """target = source + Btᵀ A for `count` pairs of columns, four at a time; rounds once."""
    wide = zeros(PAIR_ELEMENTS)
    pair = 0
    while pair + 4 <= count:
        element = pair * PAIR_ELEMENTS
        s0 = load(wide, source, element)
        s1 = load(wide, source, element + PAIR_ELEMENTS)
        s2 = load(wide, source, element + 2 * PAIR_ELEMENTS)
        s3 = load(wide, source, element + 3 * PAIR_ELEMENTS)
        for rank in range(num_ranks):
            factors = load(wide, bt, rank * PAIR_ELEMENTS)
            at = 2 * (rank * a_pairs + pair)
            s0 = multiply_add(factors, _broadcast_pair(wide, a, at), s0)
            s1 = multiply_add(factors, _broadcast_pair(wide, a, at + 2), s1)
            s2 = multiply_add(factors, _broadcast_pair(wide, a, at + 4), s2)
            s3 = multiply_add(factors, _broadcast_pair(wide, a, at + 6), s3)
        store(s0, target, element)
        store(s1, target, element + PAIR_ELEMENTS)
        store(s2, target, element + 2 * PAIR_ELEMENTS)
        store(s3, target, element + 3 * PAIR_ELEMENTS)
        pair += 4
    while pair < count:
        element = pair * PAIR_ELEMENTS
        sums = load(wide, source, element)
        for rank in range(num_ranks):
            factors = load(wide, bt, rank * PAIR_ELEMENTS)
            at = 2 * (rank * a_pairs + pair)
            sums = multiply_add(factors, _broadcast_pair(wide, a, at), sums)
        store(sums, target, element)
        pair += 1


@called
def _take_bt(arguments: Any, first_row: int, target: Any, like: Any) -> int:
    """scale * u * Bt * v of every tile that has rows of the panel, each element twice, zeros where
    the panel has rows of another part. Returns the number of ranks."""
    words, first_site, num_parts = int64_at(arguments[7]), arguments[8], arguments[9]
    ranges, widths = int32_at(words[RANGES]), int64_at(arguments[10])
    num_ranks, low = 0, 0
    for site in range(first_site, first_site + num_parts):
        high = low + widths[site]
        begin, end = max(first_row, low), min(first_row + PANEL_COLUMNS, high)
        if begin < end:
            for tile in range(ranges[2 * site], ranges[2 * site + 1]):
                for row in range(int32_at(words[RANKS])[tile]):
                    rank = moved(target, num_ranks * PAIR_ELEMENTS)
                    stage = moved(target, STAGE_AT)
                    _scale_row(arguments, tile, row, begin - low, end - begin, stage, like)
                    _double(stage, begin - first_row, end - begin, rank)
                    num_ranks += 1
        low = high
    return num_ranks


@called
def _scale_row(
    arguments: Any, tile: int, row: int, first: int, count: int, stage: Any, like: Any
) -> None:
    """`count` columns of one row of Bt from `first` on, times its factors."""
    words, floats = int64_at(arguments[7]), float_at(arguments[6])
    factor = float_at(words[SCALE])[tile]
    u_offset, v_offset = int64_at(words[U_OFFSET])[tile], int64_at(words[V_OFFSET])[tile]
    if u_offset >= 0:
        factor *= floats[u_offset + row]
    offset = int64_at(words[BT_OFFSET])[tile] + row * int64_at(words[BT_STRIDE])[tile]
    source = moved(memory_at(like, arguments[6]), offset + first)
    zero = zeros(LANES)
    for column in range(0, count, LANES):
        values = load_up_to(zero, source, column, count - column)
        values = multiply(values, broadcast(zero, factor))
        if v_offset >= 0:
            v = load_up_to(zero, floats, v_offset + first + column, count - column)
            values = multiply(values, v)
        store(values, stage, column)


@called
def _double(stage: Any, shift: int, count: int, target: Any) -> None:
    for row in range(PANEL_COLUMNS):
        value = stage[row] - stage[row]
        if shift <= row < shift + count:
            value = stage[row - shift]
        target[2 * row] = value
        target[2 * row + 1] = value


@called
def _take_a(
    arguments: Any, first_row: int, pair: int, count: int, a_pairs: int, target: Any, like: Any
) -> None:
    """Some columns of A of the tiles that `_take_bt` takes, in its order, as float32."""
    words, first_site, num_parts = int64_at(arguments[7]), arguments[8], arguments[9]
    ranges, widths = int32_at(words[RANGES]), int64_at(arguments[10])
    pool, zero = memory_at(like, arguments[6]), zeros(LANES)
    num_ranks, low = 0, 0
    for site in range(first_site, first_site + num_parts):
        high = low + widths[site]
        if max(first_row, low) < min(first_row + PANEL_COLUMNS, high):
            for tile in range(ranges[2 * site], ranges[2 * site + 1]):
                offset = int64_at(words[A_OFFSET])[tile] + 2 * pair
                stride = int64_at(words[A_STRIDE])[tile]
                for row in range(int32_at(words[RANKS])[tile]):
                    source = moved(pool, offset + row * stride)
                    rank = moved(target, 2 * a_pairs * num_ranks)
                    for column in range(0, 2 * count, LANES):
                        store(load_up_to(zero, source, column, 2 * count - column), rank, column)
                    num_ranks += 1
        low = high
