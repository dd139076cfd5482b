"""Times what it takes to merge an adapter into copies of a base's weights.

On an engine that does nothing else, whose adapters are at hand. Called by bench/calibrate, in the
engine's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraswarm.engine.engine import Engine
    from loraswarm.engine.merging import Merger

MAX_ADAPTERS = 4


def time_merges(
    engine: Engine, adapters: Sequence[str], clock: Callable[[], float]
) -> float | None:
    """Seconds to merge an adapter into all linears that it changes: the mean over some of them, of
    the second time each, when the copies' memory has been touched. None if none can be merged.
    """
    merger = engine.merger
    if merger is None:
        return None
    found = []
    for name in [*adapters[:MAX_ADAPTERS], *adapters[:MAX_ADAPTERS]]:
        begin_s = clock()
        share = _share_merged(merger, name)
        if share > 0.0:
            found.append((clock() - begin_s) / share)
    merger.set_target(None)
    found = found[len(found) // 2 :]
    return sum(found) / len(found) if found else None


def _share_merged(merger: Merger, name: str) -> float:
    """Merge it, and say how much could be."""
    key = merger.holds.key_of(name)
    if key is None:
        return 0.0
    merger.set_target(key)
    merger.advance(math.inf)
    return merger.share_merged
