"""Every kind of operation that a program may have, and which function runs an item of it.

An operation's function takes its arguments (int64: numbers and addresses), the item's number, the
thread's scratch memory (float32) and a pointer of the element type. Used by kernels/cpu/execute.
"""

from __future__ import annotations

from typing import Any

from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.linear import linear_item

LINEAR = 0


@called
def run_item(kind: int, arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """Run one item of an operation."""
    if kind == LINEAR:
        linear_item(arguments, item, scratch, like)
