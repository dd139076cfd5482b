"""Every kind of operation that a program may have, and which function runs an item of it.

An operation's function takes its arguments (int64: numbers and addresses), the item's number, the
thread's scratch memory (float32) and a pointer of the element type. Used by kernels/cpu/execute.
"""

from __future__ import annotations

from typing import Any

from loraswarm.kernels.cpu.attention import attention_item
from loraswarm.kernels.cpu.expand import expand_item
from loraswarm.kernels.cpu.gating import silu_multiply_item
from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.linear import linear_item
from loraswarm.kernels.cpu.linear_shrink import linear_shrink_item
from loraswarm.kernels.cpu.maxima import maxima_item
from loraswarm.kernels.cpu.merge_panels import merge_item
from loraswarm.kernels.cpu.norm import add_norm_item
from loraswarm.kernels.cpu.rotating import rotate_write_item
from loraswarm.kernels.cpu.shrink import shrink_item
from loraswarm.kernels.cpu.writing import write_kv_item

LINEAR = 0
SHRINK = 1
EXPAND = 2
LINEAR_SHRINK = 3
ADD_NORM = 4
SILU_MULTIPLY = 5
ROTATE_WRITE = 6
ATTENTION = 7
WRITE_KV = 8
MAXIMA = 9
MERGE = 10


@called
def run_item(kind: int, arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """Run one item of an operation."""
    if kind == LINEAR:
        linear_item(arguments, item, scratch, like)
    elif kind == SHRINK:
        shrink_item(arguments, item, scratch, like)
    elif kind == EXPAND:
        expand_item(arguments, item, scratch, like)
    elif kind == LINEAR_SHRINK:
        linear_shrink_item(arguments, item, scratch, like)
    elif kind == ADD_NORM:
        add_norm_item(arguments, item, scratch, like)
    elif kind == SILU_MULTIPLY:
        silu_multiply_item(arguments, item, scratch, like)
    elif kind == ROTATE_WRITE:
        rotate_write_item(arguments, item, scratch, like)
    elif kind == ATTENTION:
        attention_item(arguments, item, scratch, like)
    elif kind == WRITE_KV:
        write_kv_item(arguments, item, scratch, like)
    elif kind == MAXIMA:
        maxima_item(arguments, item, scratch, like)
    elif kind == MERGE:
        merge_item(arguments, item, scratch, like)
