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
    the second time each, when the copies' memory has been touched. None if nothing is merged whole.
    """
    merger = engine.merger
    if merger is None:
        return None
    found = []
    for name in [*adapters[:MAX_ADAPTERS], *adapters[:MAX_ADAPTERS]]:
        begin_s = clock()
        if _is_merged_whole(merger, name):
            found.append(clock() - begin_s)
    merger.set_target(None)
    found = found[len(found) // 2 :]
    return sum(found) / len(found) if found else None


def _is_merged_whole(merger: Merger, name: str) -> bool:
    key = merger.holds.key_of(name)
    if key is None:
        return False
    merger.set_target(key)
    merger.advance(math.inf)
    return merger.is_settled and merger.share_merged == 1.0
