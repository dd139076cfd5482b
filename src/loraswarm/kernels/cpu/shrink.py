"""The shrink operation: each row of A is read once for some tokens of its segment.

Four rows and four tokens share each load. An item is run by kernels/cpu/operations, and recorded by
kernels/cpu/lora.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.cpu.jit import called, inlined
from loraswarm.kernels.cpu.memory import (
    float_at,
    int32_at,
    int64_at,
    memory_at,
    moved,
    prefetch_far,
)
from loraswarm.kernels.cpu.terms import (
    LANES,
    add_products,
    load_terms,
    load_terms_part,
    num_terms,
    totals16,
    whole_lines,
)
from loraswarm.kernels.cpu.tiles import (
    A_OFFSET,
    A_STRIDE,
    RANKS,
    ceil_divide,
    find_item,
    rows_per_piece,
)
from loraswarm.kernels.cpu.vectors import load, store, total, zeros

GROUP = 4
AHEAD_ELEMENTS = 512
CHUNK_ELEMENTS = 2048
NUM_ARGUMENTS = 10


class Block(NamedTuple):
    """Bare pointers to rows of one A, to rows of x for some tokens, and to where h goes.

    Rows of x follow each other after `width` elements, those of A and h after their strides.
    """

    x: Any
    a: Any
    a_stride: int
    h: Any
    h_stride: int
    width: int
    num_rows: int
    num_tokens: int


@called
def shrink_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """Some rows of one A for some tokens; the arguments are those that kernels/cpu/lora makes."""
    width, num_tokens, num_columns = arguments[1], arguments[2], arguments[4]
    words, first_item = int64_at(arguments[6]), int64_at(arguments[7])
    found = find_item(item, words, first_item, arguments[8], arguments[9])
    ranks = int32_at(words[RANKS])
    piece_rows = rows_per_piece(width)
    tile, row = found.first_tile, found.piece * piece_rows
    tile_rows = ceil_divide(ranks[tile], piece_rows) * piece_rows
    while row >= tile_rows:
        row -= tile_rows
        tile += 1
        tile_rows = ceil_divide(ranks[tile], piece_rows) * piece_rows
    stride = int64_at(words[A_STRIDE])[tile]
    column = (tile - found.first_tile) * MAX_TILE_RANKS + row
    h_row = found.part * num_tokens + found.first_token
    block = Block(
        moved(memory_at(like, arguments[0]), found.first_token * width),
        moved(memory_at(like, arguments[5]), int64_at(words[A_OFFSET])[tile] + row * stride),
        stride,
        moved(float_at(arguments[3]), h_row * num_columns + column),
        num_columns,
        width,
        min(ranks[tile] - row, piece_rows),
        found.num_tokens,
    )
    _shrink_rows(block, whole_lines(scratch))


@called
def _shrink_rows(block: Block, scratch: Any) -> None:
    """h = x @ A.T, four rows and four tokens at a time.

    What is missing to four repeats the last row or token and is not stored; a token's sum does not
    depend on its neighbours.
    """
    zero = zeros(LANES)
    for row in range(0, block.num_rows, GROUP):
        a_starts = _starts4(row, block.num_rows, block.a_stride)
        jump = 0
        if row + GROUP < block.num_rows:
            jump = GROUP * block.a_stride - block.width
        if block.num_tokens == 1:
            sums = _dot_rows(zero, block, a_starts, jump)
            _store_total(block, row, 0, sums[0])
            _store_total(block, row + 1, 0, sums[1])
            _store_total(block, row + 2, 0, sums[2])
            _store_total(block, row + 3, 0, sums[3])
        else:
            for begin in range(0, block.width, CHUNK_ELEMENTS):
                _shrink_chunk(block, row, begin, scratch)


@called
def _shrink_chunk(block: Block, row: int, begin: int, scratch: Any) -> None:
    """Four rows times all tokens, from element `begin` of both on: what a chunk has of A stays in
    the first cache. From one chunk to the next `scratch` keeps every lane of the sums."""
    zero = zeros(LANES)
    none = (zero, zero, zero, zero)
    end = min(begin + CHUNK_ELEMENTS, block.width)
    a_starts = _starts4(row, block.num_rows, block.a_stride)
    for token in range(0, block.num_tokens, 4):
        x_starts = _starts4(token, block.num_tokens, block.width)
        kept = moved(scratch, token * GROUP * LANES)
        sums = (none, none, none, none)
        if begin > 0:
            sums = (
                _load_sums(zero, kept, 0),
                _load_sums(zero, kept, 1),
                _load_sums(zero, kept, 2),
                _load_sums(zero, kept, 3),
            )
        sums = _dot_block(zero, block, a_starts, x_starts, begin, end, sums)
        if end == block.width:
            store(totals16(sums[0] + sums[1] + sums[2] + sums[3]), kept, 0)
            _copy_totals(block, row, token, kept)
        else:
            _store_sums(sums[0], kept, 0)
            _store_sums(sums[1], kept, 1)
            _store_sums(sums[2], kept, 2)
            _store_sums(sums[3], kept, 3)


@inlined
def _load_sums(zero: Any, kept: Any, token: int) -> Any:
    first = token * GROUP * LANES
    return (
        load(zero, kept, first),
        load(zero, kept, first + LANES),
        load(zero, kept, first + 2 * LANES),
        load(zero, kept, first + 3 * LANES),
    )


@inlined
def _store_sums(sums: Any, kept: Any, token: int) -> None:
    first = token * GROUP * LANES
    store(sums[0], kept, first)
    store(sums[1], kept, first + LANES)
    store(sums[2], kept, first + 2 * LANES)
    store(sums[3], kept, first + 3 * LANES)


@inlined
def _starts4(row: int, num_rows: int, stride: int) -> Any:
    """Where rows `row : row + 4` begin; the last row stands in for rows that do not exist."""
    last = num_rows - 1
    return (
        row * stride,
        min(row + 1, last) * stride,
        min(row + 2, last) * stride,
        min(row + 3, last) * stride,
    )


@inlined
def _store_total(block: Block, row: int, token: int, sums: Any) -> None:
    if row < block.num_rows:
        block.h[token * block.h_stride + row] = total(sums)


@called
def _copy_totals(block: Block, row: int, token: int, totals: Any) -> None:
    """`totals` [4 tokens, 4 rows] to h, as far as those exist."""
    for i in range(min(4, block.num_tokens - token)):
        for j in range(min(GROUP, block.num_rows - row)):
            block.h[(token + i) * block.h_stride + row + j] = totals[i * GROUP + j]


@inlined
def _dot_rows(zero: Any, block: Block, a_starts: Any, jump: int) -> Any:
    """Lane by lane the dot products of four rows of A with the block's first token.

    Fetches what comes next: of these rows, and then of those `jump` behind their ends.
    """
    sums = (zero, zero, zero, zero)
    a, x = block.a, block.x
    step = num_terms(a)
    whole, rest = block.width - block.width % step, block.width % step
    for i in range(0, whole, step):
        ahead = i + AHEAD_ELEMENTS
        if ahead >= block.width:
            ahead += jump
        prefetch_far(a, a_starts[0] + ahead)
        prefetch_far(a, a_starts[1] + ahead)
        prefetch_far(a, a_starts[2] + ahead)
        prefetch_far(a, a_starts[3] + ahead)
        sums = _add_products4(_load4(zero, a, a_starts, i), load_terms(zero, x, i), sums)
    if rest > 0:
        a_rest = _load_part4(zero, a, a_starts, whole, rest)
        sums = _add_products4(a_rest, load_terms_part(zero, x, whole, rest), sums)
    return sums


@inlined
def _dot_block(
    zero: Any, block: Block, a_starts: Any, x_starts: Any, begin: int, end: int, sums: Any
) -> Any:
    """Adds 16 vectors of products, by token and then row, of elements `begin : end`: each element
    is loaded once for four."""
    a, x = block.a, block.x
    step = num_terms(a)
    rest = (end - begin) % step
    for i in range(begin, end - rest, step):
        rows = _load4(zero, a, a_starts, i)
        sums = _add_products16(rows, _load4(zero, x, x_starts, i), sums)
    if rest > 0:
        rows = _load_part4(zero, a, a_starts, end - rest, rest)
        sums = _add_products16(rows, _load_part4(zero, x, x_starts, end - rest, rest), sums)
    return sums


@inlined
def _load4(zero: Any, memory: Any, starts: Any, index: int) -> Any:
    return (
        load_terms(zero, memory, starts[0] + index),
        load_terms(zero, memory, starts[1] + index),
        load_terms(zero, memory, starts[2] + index),
        load_terms(zero, memory, starts[3] + index),
    )


@inlined
def _load_part4(zero: Any, memory: Any, starts: Any, index: int, count: int) -> Any:
    return (
        load_terms_part(zero, memory, starts[0] + index, count),
        load_terms_part(zero, memory, starts[1] + index, count),
        load_terms_part(zero, memory, starts[2] + index, count),
        load_terms_part(zero, memory, starts[3] + index, count),
    )


@inlined
def _add_products4(vectors: Any, factor: Any, sums: Any) -> Any:
    return (
        add_products(vectors[0], factor, sums[0]),
        add_products(vectors[1], factor, sums[1]),
        add_products(vectors[2], factor, sums[2]),
        add_products(vectors[3], factor, sums[3]),
    )


@inlined
def _add_products16(vectors: Any, factors: Any, sums: Any) -> Any:
    return (
        _add_products4(vectors, factors[0], sums[0]),
        _add_products4(vectors, factors[1], sums[1]),
        _add_products4(vectors, factors[2], sums[2]),
        _add_products4(vectors, factors[3], sums[3]),
    )
