"""One operation of a product with a packed weight and a shrink, which read the same x.

Items of both alternate: some threads wait for the matrices of adapters while others multiply. An
item is run by kernels/cpu/operations; kernels/cpu/lora records it.

    arguments   | shrink's | number of items of the product | of shrink | the product's |
"""

from __future__ import annotations

from typing import Any

from loraswarm.kernels.cpu.jit import called
from loraswarm.kernels.cpu.linear import linear_item
from loraswarm.kernels.cpu.memory import moved
from loraswarm.kernels.cpu.shrink import NUM_ARGUMENTS, shrink_item

COUNTS_AT = NUM_ARGUMENTS
LINEAR_AT = COUNTS_AT + 2


@called
def linear_shrink_item(arguments: Any, item: int, scratch: Any, like: Any) -> None:
    """An item of either; those of shrink are spread evenly over all."""
    num_shrinks = arguments[COUNTS_AT + 1]
    num_items = arguments[COUNTS_AT] + num_shrinks
    before = item * num_shrinks // num_items
    if (item + 1) * num_shrinks // num_items > before:
        shrink_item(arguments, before, scratch, like)
    else:
        linear_item(moved(arguments, LINEAR_AT), item - before, scratch, like)
