"""Rotates the heads of q and k by their positions and stores k and v in their pages.

Heads may be normalised first. Every product and sum is rounded to the element type, as if each were
a tensor operation of its own. An item of the operation is some tokens. Called by
kernels/cpu/operations and, to record an operation, by kernels/cpu/paged.

    a token of qkv    | q head 0 | ... | q head H-1 | k head 0 | ... | v head 0 | ... |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loraswarm.kernels.cpu.jit import called, inlined
from loraswarm.kernels.cpu.memory import memory_at, moved
from loraswarm.kernels.cpu.vectors import (
    add,
    broadcast,
    float_of_bits,
    load,
    load_part,
    multiply,
    multiply_add,
    rounded,
    store,
    total,
    zeros,
)
from loraswarm.kernels.cpu.writing import (
    HEAD_SIZE,
    HEAD_STRIDE,
    NUM_KV_HEADS,
    NUM_TOKENS,
    PLACE_WORDS,
    TOKENS_PER_ITEM,
    VALUE_OFFSET,
    copy_bits,
    page_row,
)

LANES = 16
QKV, NUM_HEADS, COS, SIN, Q_WEIGHT, K_WEIGHT, EPS = range(PLACE_WORDS, PLACE_WORDS + 7)


class Turn(NamedTuple):
    """What one token's heads are multiplied by: `cos`, signed `sin` and `weight` [E].

    Without `is_normed` the weight is not read and heads are not normalised.
    """

    cos: Any
    sin: Any
    weight: Any
    is_normed: bool
    eps: float


@called
def rotate_write_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """q, k and v of some tokens."""
    size = arguments[HEAD_SIZE]
    first = item * arguments[TOKENS_PER_ITEM]
    num_heads, num_kv_heads = arguments[NUM_HEADS], arguments[NUM_KV_HEADS]
    token_size = (num_heads + 2 * num_kv_heads) * size
    eps, is_normed = float_of_bits(arguments[EPS]), arguments[Q_WEIGHT] != 0
    for token in range(first, min(first + arguments[TOKENS_PER_ITEM], arguments[NUM_TOKENS])):
        qkv = moved(memory_at(like, arguments[QKV]), token * token_size)
        cos = moved(memory_at(like, arguments[COS]), token * size)
        sin = moved(memory_at(like, arguments[SIN]), token * size)
        q_turn = Turn(cos, sin, memory_at(like, arguments[Q_WEIGHT]), is_normed, eps)
        for head in range(num_heads):
            q = moved(qkv, head * size)
            _turn_head(q, q, size, q_turn)
        page = page_row(arguments, token, like)
        k_turn = Turn(cos, sin, memory_at(like, arguments[K_WEIGHT]), is_normed, eps)
        for head in range(num_kv_heads):
            key = moved(page, head * arguments[HEAD_STRIDE])
            _turn_head(moved(qkv, (num_heads + head) * size), key, size, k_turn)
            v_from = (num_heads + num_kv_heads + head) * size
            copy_bits(qkv, v_from, key, arguments[VALUE_OFFSET], size)


@called
def _turn_head(source: Any, target: Any, size: int, turn: Turn) -> None:
    """Normalise if asked to, and rotate; `target` may be `source`."""
    scale = np.float32(1)
    if turn.is_normed:
        scale = _normalizer(source, size, turn.eps)
    half = size // 2
    whole = half // LANES * LANES
    for i in range(0, whole, LANES):
        _turn_columns(zeros(LANES), source, target, i, half, scale, turn)
    for i in range(whole, half):
        _turn_columns(zeros(1), source, target, i, half, scale, turn)


@called
def _normalizer(source: Any, size: int, eps: float) -> Any:
    """What makes the mean square of a head 1; as kernels/cpu/norm computes it, to the bit."""
    squares = zeros(LANES)
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        value = load(squares, source, i)
        squares = multiply_add(value, value, squares)
    if whole < size:
        value = load_part(squares, source, whole, size - whole)
        squares = multiply_add(value, value, squares)
    return np.float32(1) / np.sqrt(total(squares) / np.float32(size) + eps)


@inlined
def _turn_columns(
    zero: Any, source: Any, target: Any, i: int, half: int, scale: Any, turn: Turn
) -> None:
    """Some columns of the first half, and those of the second that turn with them."""
    low, high = load(zero, source, i), load(zero, source, half + i)
    if turn.is_normed:
        factor = broadcast(zero, scale)
        low = rounded(multiply(low, factor), source)
        high = rounded(multiply(high, factor), source)
        low = rounded(multiply(low, load(zero, turn.weight, i)), source)
        high = rounded(multiply(high, load(zero, turn.weight, half + i)), source)
    new_low = add(
        rounded(multiply(low, load(zero, turn.cos, i)), source),
        rounded(multiply(high, load(zero, turn.sin, i)), source),
    )
    new_high = add(
        rounded(multiply(high, load(zero, turn.cos, half + i)), source),
        rounded(multiply(low, load(zero, turn.sin, half + i)), source),
    )
    store(new_low, target, i)
    store(new_high, target, half + i)
