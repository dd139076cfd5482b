"""Which adapter is in the weights in use, and the way there: a few rows at a time, between steps.

Owns the merged copies and their memory; the base's weights are read only. Decides no policy: it is
told a target. Any mix of merged and unmerged linears is exact (memory/tile_store), so a switch may
stop anywhere. Called by the engine between two steps.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from loraswarm.core.client import MergeState
from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.merge_holds import MergeHolds
from loraswarm.engine.merge_places import (
    MIN_LEARNED_BYTES,
    Place,
    copy_s_per_byte,
    places_of,
    reserve,
    update_bytes,
    wait_for,
)
from loraswarm.engine.model_runner import ModelRunner
from loraswarm.kernels import TileTable
from loraswarm.kernels.reference_merging import MERGE_ROWS
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_store import TileStore
from loraswarm.models.layers.merging import MergedCopy

LEARNING_SHARE = 0.25
MAX_UPDATE = 1.0
"""Of a weight's norm, what an update may have that is merged into it. Tokens without the adapter
get the difference of two products; the larger what cancels, the more of its rounding stays."""
log = logging.getLogger(__name__)


class Merger:
    """Merges one adapter after another into copies of the linears' weights.

        target a     | base | base | base |     the copies are made in order, attention first
                     |  a   |  a   | base |     each is used as soon as it is whole
        target b     |  b   |  a   | base |     one that has another adapter is the base's again
        target None  | base | base | base |     at once; the memory is kept for the next copies

    An adapter is pinned in its pages while it is in a weight or on its way there. Its gains (DoRA,
    IA3), biases and overlays are never merged: they act on its own rows, over merged weights too.
    So every method may be merged beside any other row. K and V of merged and of unmerged weights
    differ by the rounding of the weight, as those of one sequence do whose tokens a switch divides;
    cached prefixes are shared by both.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tiles: TileStore,
        buffer: PageBuffer,
        holds: MergeHolds,
        budget_bytes: int,
    ) -> None:
        """The copies take at most `budget_bytes`; linears beyond that stay unmerged.

        Their memory is taken here: the system may need far longer to find it than merging takes,
        which no switch is to wait for.

        Cost    the base's linears are read once, for their norms, and some are copied.
        """
        self._runner = runner
        self._tiles = tiles
        self._buffer = buffer
        self.holds = holds
        self.budget_bytes = budget_bytes
        self._places = places_of(runner.decoder)
        self._target: AdapterKey | None = None
        self._table: TileTable | None = None
        self._changed: list[Place] = []
        self._todo: list[Place] | None = None
        self._making: tuple[Place, MergedCopy] | None = None
        reserve(self._places, budget_bytes)
        self._s_per_byte = copy_s_per_byte(self._places, buffer.pool, tiles.no_tiles())
        self.num_switches = 0

    @property
    def target(self) -> AdapterKey | None:
        """The adapter that the weights are to have in them."""
        return self._target

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to do for the target."""
        return self._target is None or self._todo == []

    @property
    def has_room(self) -> bool:
        """Whether the budget allows a copy of any linear that the target changes; of any at all,
        while that is not known."""
        places = self._changed or self._places
        return any(place.num_bytes <= self.budget_bytes for place in places)

    @property
    def bytes(self) -> int:
        """Of the copies in use and of the one that is being made."""
        making = self._making[0] if self._making is not None else None
        places = (place for place in self._places if place.copy is not None or place is making)
        return sum(place.num_bytes for place in places)

    @property
    def reserved_bytes(self) -> int:
        """Memory that copies have, in use or kept for the next."""
        making = self._making[0] if self._making is not None else None
        places = (place for place in self._places if place.has_memory or place is making)
        return sum(place.num_bytes for place in places)

    @property
    def num_merged(self) -> int:
        """Linears with any adapter in the weight in use."""
        return sum(place.key is not None for place in self._places)

    @property
    def share_merged(self) -> float:
        """Of the bytes of the linears that the target changes, those in use with it; 0 without a
        target, or while its tiles are not known."""
        if not self._changed:
            return 0.0
        merged = sum(place.num_bytes for place in self._changed if place.key == self._target)
        return merged / sum(place.num_bytes for place in self._changed)

    @property
    def bytes_left(self) -> int:
        """Bytes of weights that are still to be merged for the target; all that may be merged,
        while its tiles are not known."""
        if self._target is None:
            return 0
        if self._todo is None:
            return min(self.budget_bytes, sum(place.num_bytes for place in self._places))
        left = sum(place.num_bytes for place in self._todo)
        if self._making is not None:
            copy = self._making[1]
            left -= copy.row_bytes * (copy.num_rows - copy.num_left)
        return left

    @property
    def s_per_byte(self) -> float:
        """Seconds that merging a byte of weights takes, as it was learned."""
        return self._s_per_byte

    @property
    def merge_s(self) -> float:
        """Seconds that merging all that the budget allows takes, as far as is known."""
        num_bytes = sum(place.num_bytes for place in self._places)
        return self._s_per_byte * min(self.budget_bytes, num_bytes)

    @property
    def state(self) -> MergeState:
        """All of this at one moment."""
        return MergeState(
            target=None if self._target is None else self._target[0],
            share=self.share_merged,
            num_merged_linears=self.num_merged,
            merged_bytes=self.bytes,
            reserved_bytes=self.reserved_bytes,
            total_switches=self.num_switches,
        )

    def why_not(self, key: AdapterKey) -> str | None:
        """Why merging this adapter would save nothing, or cannot be; None if it would."""
        info = self.holds.info_of(key)
        if info is None:
            return "it is not served in this generation, or has not been read"
        if update_bytes(info, self._runner.decoder.shape, element_bytes=1) == 0:
            return "it changes no linear by a low-rank update"
        return None

    def set_target(self, key: AdapterKey | None) -> None:
        """Have this adapter in the weights from now on; None: the base's alone, at once.

        Nothing happens if it is the target already. `advance` does the work; what is merged of
        another adapter stays until its place is needed. What is served no more counts as None.
        """
        if key is not None and not self.holds.is_current(key):
            key = None
        if key == self._target:
            return
        self.num_switches += 1
        log.info("merge target=%s before=%s", _name(key), _name(self._target))
        self._target = key
        self._drop_plan()
        if key is None:
            self._restore(lambda place: True)
        self._release_idle()

    def advance(self, budget_s: float) -> None:
        """Go on towards the target for about so many seconds, at least a few rows.

        What is served no more leaves the weights at once, whatever the budget.
        """
        end_s = time.perf_counter() + budget_s
        self._leave_stale()
        key = self._target
        if key is None or self.is_settled:
            return
        if not self.holds.try_hold(key):
            return
        if self._todo is None:
            self._make_plan(key)
        while self._todo and self._extend(key, end_s):
            pass
        self._runner.is_switching = bool(self._todo)
        if not self._todo:
            self._release_idle()
            log.info("merged adapter=%s linears=%d bytes=%d", key[0], self.num_merged, self.bytes)

    def give_way(self) -> bool:
        """Use the base's weights and take back every pin, since requests need the pages; whether
        there was any. The target stays, and is merged again when there is room."""
        if not self.holds.keys:
            return False
        self._drop_plan()
        self._restore(lambda place: True)
        self._release_idle()
        for key in self.holds.keys:
            self.holds.release(key)
        log.info("unmerged target=%s: requests need its pages", _name(self._target))
        return True

    def close(self) -> None:
        """The base's weights are in use again, and the copies' memory is given back."""
        self._target = None
        self._drop_plan()
        self._restore(lambda place: True)
        for place in self._places:
            place.spare = None

    def _leave_stale(self) -> None:
        """Restore what has an adapter in it that is served no more, and let that go."""
        wanted = (*self.holds.keys, self._target)
        stale = {key for key in wanted if key is not None and not self.holds.is_current(key)}
        if not stale:
            return
        if self._target in stale:
            self._target = None
            self._drop_plan()
        self._restore(lambda place: place.key in stale)
        self._release_idle()

    def _make_plan(self, key: AdapterKey) -> None:
        """Which linears the target is merged into: those it changes, as far as the budget goes.

        Memory that others keep is given back if it is needed for these.
        """
        self._table = self._tiles.own_table(key)
        self._changed = [place for place in self._places if self._changes(place)]
        planned, num_bytes = [], 0
        for place in self._changed:
            if num_bytes + place.num_bytes <= self.budget_bytes:
                planned.append(place)
                num_bytes += place.num_bytes
        self._restore(lambda place: place not in planned)
        kept = [place for place in self._places if place.has_memory or place in planned]
        if sum(place.num_bytes for place in kept) > self.budget_bytes:
            for place in self._places:
                place.spare = place.spare if place in planned else None
        self._todo = [place for place in planned if place.key != key]

    def _changes(self, place: Place) -> bool:
        linear = place.linear
        table = self._table
        return table is not None and table.part_tiles(linear.first_site, linear.num_parts) > 0

    def _extend(self, key: AdapterKey, end_s: float) -> bool:
        """Merge some rows of the next linear; whether there is time for more."""
        assert self._todo
        assert self._table is not None
        begin_s = time.perf_counter()
        if self._making is None:
            place = self._todo[0]
            if self._is_too_large(place, key):
                self._todo.remove(place)
                self._restore(lambda other: other is place)
                return bool(self._todo) and time.perf_counter() < end_s
            self._making = place, self._begin(place)
        place, copy = self._making
        num_rows = copy.num_left
        if math.isfinite(end_s):
            num_rows = int((end_s - begin_s) / (self._s_per_byte * copy.row_bytes))
        num_bytes = copy.extend(num_rows, self._buffer.pool, self._table)
        wait_for(self._buffer.pool)
        now_s = time.perf_counter()
        if num_bytes >= MIN_LEARNED_BYTES:
            learned = (now_s - begin_s) / num_bytes
            self._s_per_byte += LEARNING_SHARE * (learned - self._s_per_byte)
        if copy.num_left == 0:
            self._end(place, copy, key)
        least_s = MERGE_ROWS * copy.row_bytes * self._s_per_byte
        return now_s + least_s <= end_s

    def _is_too_large(self, place: Place, key: AdapterKey) -> bool:
        """Whether the linear stays unmerged, since the update is larger than the weight."""
        assert self._table is not None
        pool, limit = self._buffer.pool, MAX_UPDATE * place.norm
        if place.linear.update_bound(pool, self._table) <= limit:
            return False
        norm = place.linear.update_norm(pool, self._table)
        if norm <= limit:
            return False
        path = ", ".join(path for path, _ in place.linear.parts())
        log.info(
            "not merged adapter=%s: norm %.3g is more than that of %s, %.3g",
            *(key[0], norm, path, place.norm),
        )
        return True

    def _begin(self, place: Place) -> MergedCopy:
        """A copy in place of what is merged there, which is in use no more."""
        self._use_base(place)
        spare, place.spare = place.spare, None
        return place.linear.start_merging(spare)

    def _end(self, place: Place, copy: MergedCopy, key: AdapterKey) -> None:
        """Use a copy that is whole."""
        assert self._todo
        self._todo.remove(place)
        self._making = None
        if not copy.is_finite:
            path = ", ".join(path for path, _ in place.linear.parts())
            log.warning("not merged adapter=%s: float16 cannot hold it in %s", key[0], path)
            place.keep(copy.weight)
            return
        place.copy, place.key = copy.weight, key
        self._runner.use(place.linear, copy.weight, key)

    def _use_base(self, place: Place) -> None:
        if place.copy is not None:
            self._runner.use(place.linear, None, None)
            place.keep(place.copy)
            place.copy = place.key = None

    def _restore(self, is_chosen: Callable[[Place], bool]) -> None:
        """Use the base's weights in these places."""
        for place in self._places:
            if is_chosen(place):
                self._use_base(place)

    def _drop_plan(self) -> None:
        """Forget what was being made."""
        if self._making is not None:
            self._making[0].keep(self._making[1].weight)
        self._todo = self._table = self._making = None
        self._changed = []
        self._runner.is_switching = False

    def _release_idle(self) -> None:
        """Let go of adapters that are neither merged nor the target."""
        used = {place.key for place in self._places} | {self._target}
        for key in self.holds.keys:
            if key not in used:
                self.holds.release(key)


def _name(key: AdapterKey | None) -> str:
    return "none" if key is None else key[0]
