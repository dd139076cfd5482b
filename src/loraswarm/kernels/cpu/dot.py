"""The innermost product of bfloat16 matrices: up to 12 rows of x with 32 columns of a weight.

Uses the CPU's instruction for sums of two bfloat16 products (AVX512-BF16); `HAS_DOT` says whether
it is there. Weights come in panels, in the order in which they are used:

    panel p, pair k   | column 0: w[2k] w[2k+1] | column 1: w[2k] w[2k+1] | ... | column 31 |

Called by kernels/cpu/linear only.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.memory import FIRST_CACHE, SECOND_CACHE, generate_prefetch

PANEL_COLUMNS = 32
MAX_ROWS = 12
"""24 sums and 2 vectors of weights, of 32 registers."""
_LANES = 16
_VECTORS = PANEL_COLUMNS // _LANES
_AHEAD_VECTORS = 32  # 2 KiB
FEW_ROWS = 5
"""Up to so many rows wait for memory alone, and fetch further ahead."""
_FAR_AHEAD_VECTORS = 128  # 8 KiB
CHUNK_PAIRS = 32

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_PAIRS = ir.VectorType(_I32, _LANES)


def _has_dot() -> bool:
    """Whether Numba compiles for a CPU with the instruction."""
    config = numba.config
    if config.CPU_FEATURES is not None:
        return "+avx512bf16" in config.CPU_FEATURES
    if config.CPU_NAME is not None or not config.ENABLE_AVX:
        return False
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))


HAS_DOT = _has_dot()


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BFLOATS = ir.VectorType(_BFloat(), 2 * _LANES)


@intrinsic
def _dot_panel(
    context: Any,
    x: Any,
    x_stride: Any,
    num_rows: Any,
    panel: Any,
    num_pairs: Any,
    fetched: Any,
    num_lines: Any,
    sums: Any,
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_stride, num_rows, *others = values
        end = builder.append_basic_block("end")
        switch = builder.switch(num_rows, end)
        for rows in range(1, MAX_ROWS + 1):
            block = builder.append_basic_block(f"rows_{rows}")
            switch.add_case(num_rows.type(rows), block)
            with builder.goto_block(block):
                _generate_rows(builder, rows, (x, x_stride, *others))
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    number = types.intp
    return types.void(x, number, number, panel, number, panel, number, sums), generate


def _generate_rows(builder: Any, num_rows: int, operands: Any) -> None:
    """The product for one number of rows: its sums stay in registers."""
    x, x_stride, panel, num_pairs, fetched, num_lines, sums = operands
    zero = ir.Constant(_FLOATS, [ir.Constant(ir.FloatType(), 0.0)] * _LANES)
    places = [
        [cgutils.alloca_once_value(builder, zero) for _ in range(_VECTORS)] for _ in range(num_rows)
    ]
    rows = [
        builder.bitcast(builder.gep(x, [builder.mul(x_stride, _I64(row))]), _I32.as_pointer())
        for row in range(num_rows)
    ]
    weights = builder.bitcast(panel, _BFLOATS.as_pointer())
    chunk_pairs = _I64(CHUNK_PAIRS)
    num_chunks = builder.udiv(builder.add(num_pairs, _I64(CHUNK_PAIRS - 1)), chunk_pairs)
    with cgutils.for_range(builder, num_chunks) as chunk:
        first_pair = builder.mul(chunk.index, chunk_pairs)
        left = builder.sub(num_pairs, first_pair)
        is_last = builder.icmp_unsigned("<", left, chunk_pairs)
        count = builder.select(is_last, left, chunk_pairs)
        with cgutils.for_range(builder, count) as loop:
            pair_index = builder.add(first_pair, loop.index)
            _generate_step(builder, (weights, rows, places), pair_index)
        first_line = builder.mul(chunk.index, num_lines)
        with cgutils.for_range(builder, num_lines) as loop:
            line = builder.mul(builder.add(first_line, loop.index), _I64(2 * _LANES))
            generate_prefetch(builder, builder.gep(fetched, [line]), SECOND_CACHE)
    target = builder.bitcast(sums, _FLOATS.as_pointer())
    for index, place in enumerate(place for row in places for place in row):
        builder.store(builder.load(place), builder.gep(target, [_I64(index)]), align=4)


def _generate_step(builder: Any, operands: Any, index: Any) -> None:
    """One pair of every row with one of every column. Addresses of all rows and little else fit
    the registers, so what is far ahead is fetched elsewhere."""
    weights, rows, places = operands
    ahead = _FAR_AHEAD_VECTORS if len(rows) <= FEW_ROWS else _AHEAD_VECTORS
    first = builder.mul(index, _I64(_VECTORS))
    columns = []
    for i in range(_VECTORS):
        place = builder.gep(weights, [builder.add(first, _I64(i))])
        columns.append(builder.load(place, align=2))
        generate_prefetch(builder, builder.gep(place, [_I64(ahead)]), FIRST_CACHE)
    for row, sums in zip(rows, places, strict=True):
        pair = _broadcast_pair(builder, builder.gep(row, [index]))
        for place, column in zip(sums, columns, strict=True):
            builder.store(_multiply_pairs(builder, builder.load(place), column, pair), place)


def _broadcast_pair(builder: Any, place: Any) -> Any:
    undefined = ir.Constant(_PAIRS, ir.Undefined)
    first = builder.insert_element(undefined, builder.load(place, align=2), _I32(0))
    pairs = builder.shuffle_vector(first, undefined, ir.Constant(_PAIRS, [_I32(0)] * _LANES))
    return builder.bitcast(pairs, _BFLOATS)


def _multiply_pairs(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    function_type = ir.FunctionType(_FLOATS, [_FLOATS, _BFLOATS, _BFLOATS])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return builder.call(
        cgutils.get_or_insert_function(builder.module, function_type, name), [sums, a, b]
    )


@called
def _dot(
    x: Any,
    x_stride: int,
    num_rows: int,
    panel: Any,
    num_pairs: int,
    fetched: Any,
    num_lines: int,
    sums: Any,
) -> None:
    _dot_panel(x, x_stride, num_rows, panel, num_pairs, fetched, num_lines, sums)


@called
def _nothing(
    x: Any,
    x_stride: int,
    num_rows: int,
    panel: Any,
    num_pairs: int,
    fetched: Any,
    num_lines: int,
    sums: Any,
) -> None:
    """Stands in where the CPU lacks the instruction, and is never run: nothing is packed there."""


dot_panel = _dot if HAS_DOT else _nothing
"""sums[r, c] = sum over k of x[r, k] * w[c, k] for 1 to 12 rows r and the 32 columns of a panel.

`x` and `panel` point to bfloat16 bits, `sums` [rows, 32] to float32; rows of x are `x_stride`
elements apart and have `2 * num_pairs` elements. Meanwhile cache lines from `fetched` on are
brought near, `num_lines` after each CHUNK_PAIRS pairs: what will be needed next."""
