"""How many replicas each adapter should be on: in proportion to its load, by largest remainder.

Knows loads alone. Asked by the planner.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loraswarm.cluster.placement.forecast import Floats

Ints = NDArray[np.int64]


def apportion(loads: Floats, num_total: int, most: int) -> Ints:
    """Copies of each adapter: `num_total` in all, if bounds allow.

    Semantics    one with load has at least 1 and at most `most`, one without has none. Between the
                 bounds the quotas are in proportion to load; each gets the whole part of its quota,
                 and what is left over goes one each to the largest remainders, ties to the first.
    Cost         a sort, and a pass over all for each time that bounds take somebody out.
    Source       Hamilton's method. Divided into equal parts, n loads fill j replicas evenly with at
                 most n + j - 1 parts; dLoRA places as many.
    """
    copies = np.zeros(len(loads), dtype=np.int64)
    is_open = loads > 0
    copies[is_open] = 1
    while is_open.any():
        num_left = num_total - int(copies[~is_open].sum())
        quotas = loads * (max(num_left, 0) / loads[is_open].sum())
        is_low, is_high = is_open & (quotas < 1), is_open & (quotas > most)
        lacking, excess = (1 - quotas[is_low]).sum(), (quotas[is_high] - most).sum()
        if lacking == excess == 0:
            return _fill(copies, np.where(is_open, quotas, 0.0), num_left, most)
        # Only the side that weighs more is final: what it gives or takes may bring the other in.
        if lacking >= excess:
            is_open &= ~is_low
        if excess >= lacking:
            copies[is_high] = most
            is_open &= ~is_high
    return copies


def _fill(copies: Ints, quotas: Floats, num_left: int, most: int) -> Ints:
    """Whole parts of the quotas that are not 0, and the rest to the largest remainders."""
    is_open = quotas > 0
    whole = np.floor(quotas + 1e-9).astype(np.int64)
    copies = np.where(is_open, whole, copies)
    remainders = np.where(is_open & (whole < most), quotas - whole, -1.0)
    num_over = num_left - int(whole[is_open].sum())
    largest = np.argsort(-remainders, kind="stable")[: max(num_over, 0)]
    copies[largest[remainders[largest] >= 0]] += 1
    return copies
