"""Tile tables on the device: a plan is one packed tensor that the LoRA kernels read.

A table is host data. Its plan is made when a kernel first meets it: checked in numpy, cut to items
and uploaded by one copy that nobody waits for. An arena is a plan at fixed addresses, into which
other tables are loaded between replays of a CUDA graph. Called by lora and by whoever captures.
Legend: M sites.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS, TileTable
from loraswarm.kernels.triton.extents import MESSAGES, SiteExtents, Widths, check_table
from loraswarm.kernels.triton.items import DECODE, Items
from loraswarm.kernels.triton.words import HostTable, PlanWords, Sizes

MAX_KEPT = 4
FLOAT_BYTES = 4
ARRAYS = tuple(
    [name for name in TileTable.__dataclass_fields__ if name not in ("max_tiles", "has_gains")]
)


class Traits(NamedTuple):
    """What of a table chooses between variants of a kernel; `alignment` counts elements."""

    alignment: int
    has_v: bool


class DevicePlan:
    """One table on one device.

    `counters` [shrink items] int32 are zero between launches. `table` is the host's side.
    """

    def __init__(self, table: HostTable, words: PlanWords, widths: Widths) -> None:
        self.table = table
        self.words = words
        self.counters = torch.zeros(
            max(words.sizes.num_shrink_items, 1), dtype=torch.int32, device=words.packed.device
        )
        self._widths = widths
        self._counts: dict[Hashable, int | None] = {}
        self._faults: dict[Hashable, list[int]] = {}

    def shrink_items(
        self, first_site: int, num_parts: int, in_features: int, num_columns: int, pool: Tensor
    ) -> int | None:
        """The number of items of one fused linear; None if only the device knows.

        Raises    ValueError if shrink would read outside of the pool, or h has too few columns.
        """
        key = ("shrink", first_site, num_parts, in_features, num_columns, pool.numel())
        if key not in self._counts:
            sites = slice(first_site, first_site + num_parts)
            if self._needed_columns(sites) > num_columns:
                raise ValueError("tiles.max_tiles is less than tiles.ranges needs")
            self._widths.learn_in(first_site, (in_features,) * num_parts)
            self._raise_faults("shrink", sites, pool)
            self._counts[key] = self._launched(self.table.shrink, sites, num_columns)
        return self._counts[key]

    def expand_items(
        self, first_site: int, out_bounds: tuple[int, ...], num_columns: int, pool: Tensor
    ) -> int | None:
        """The number of items of one fused linear; None if only the device knows.

        Raises    ValueError if expand would read outside of the pool, or h has too few columns.
        """
        key = ("expand", first_site, out_bounds, num_columns, pool.numel(), pool.dtype)
        if key not in self._counts:
            if num_columns % MAX_TILE_RANKS:
                raise ValueError("h_QTR has a number of columns that is no multiple of 16")
            sites = slice(first_site, first_site + len(out_bounds) - 1)
            if self._needed_columns(sites) > num_columns:
                raise ValueError("h_QTR has fewer columns than tiles.ranges needs")
            out_sizes = [high - low for low, high in pairwise(out_bounds)]
            self._widths.learn_out(first_site, out_sizes)
            self._raise_faults("expand", sites, pool)
            self._counts[key] = self._launched(self.table.expand, sites, num_columns)
        return self._counts[key]

    def shrink_traits(self, first_site: int, num_parts: int) -> Traits:
        """For one fused linear."""
        extents = self.table.extents
        return Traits(extents.a_alignment(first_site, num_parts), extents.has_v)

    def expand_traits(self, first_site: int, num_parts: int) -> Traits:
        """For one fused linear."""
        extents = self.table.extents
        return Traits(extents.bt_alignment(first_site, num_parts), extents.has_v)

    def _launched(self, items: Items, sites: slice, num_columns: int) -> int | None:
        return int(items.starts[sites.stop] - items.starts[sites.start])

    def _needed_columns(self, sites: slice) -> int:
        return MAX_TILE_RANKS * int(self.table.extents.most_tiles_M[sites].max())

    def _raise_faults(self, kernel: str, sites: slice, pool: Tensor) -> None:
        num_elements, num_floats = _pool_sizes(pool)
        key = kernel, self._widths.version, num_elements, num_floats
        if key not in self._faults:
            extents, widths = self.table.extents, self._widths
            if kernel == "shrink":
                faults_M = extents.shrink_faults(widths.in_M, num_elements)
            else:
                faults_M = extents.expand_faults(widths.out_M, num_elements, num_floats)
            self._faults[key] = faults_M.tolist()
        for fault in self._faults[key][sites]:
            if fault:
                raise ValueError(MESSAGES[fault])


class ReplayedPlan(DevicePlan):
    """The plan of an arena: remembers what launches relied on, so that later tables keep it."""

    def __init__(self, table: HostTable, words: PlanWords, traits: Traits) -> None:
        num_sites = words.sizes.num_sites
        super().__init__(table, words, Widths(num_sites, keeps_widest=True))
        self.traits = traits
        self._most_tiles_M = np.full(num_sites, np.iinfo(np.int64).max)
        self._pools: set[tuple[int, int]] = set()

    def shrink_traits(self, first_site: int, num_parts: int) -> Traits:
        return self.traits

    def expand_traits(self, first_site: int, num_parts: int) -> Traits:
        return self.traits

    def accepts(self, table: HostTable) -> bool:
        """Whether what has been launched with this plan is right for a table that fits in.

        Raises    ValueError if kernels that have been launched would read outside of a pool.
        """
        extents = table.extents
        for num_elements, num_floats in self._pools:
            for faults_M in (
                extents.shrink_faults(self._widths.in_M, num_elements),
                extents.expand_faults(self._widths.out_M, num_elements, num_floats),
            ):
                if faults_M.any():
                    raise ValueError(MESSAGES[int(faults_M[faults_M > 0][0])])
        return (
            extents.alignment() >= self.traits.alignment
            and extents.has_v <= self.traits.has_v
            and bool((extents.most_tiles_M <= self._most_tiles_M).all())
        )

    def replace(self, table: HostTable) -> None:
        """The host's side of what has been copied into the words."""
        self.table = table
        self._counts.clear()
        self._faults.clear()

    def _launched(self, items: Items, sites: slice, num_columns: int) -> None:
        most_tiles = num_columns // MAX_TILE_RANKS
        self._most_tiles_M[sites] = np.minimum(self._most_tiles_M[sites], most_tiles)

    def _raise_faults(self, kernel: str, sites: slice, pool: Tensor) -> None:
        super()._raise_faults(kernel, sites, pool)
        self._pools.add(_pool_sizes(pool))


class KnownExtents:
    """Those of the tables used last; the segments do not matter."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[TileTable, SiteExtents]] = OrderedDict()

    def of(self, tiles: TileTable, arrays: Mapping[str, np.ndarray]) -> SiteExtents:
        """Raises ValueError if the table is wrong whatever the widths and segments."""
        key = _identities(tiles)
        if key not in self._kept:
            check_table(arrays)
            _keep(self._kept, key, (tiles, SiteExtents(arrays)))
        self._kept.move_to_end(key)
        return self._kept[key][1]


known_extents = KnownExtents()


class PlanArena:
    """A plan whose addresses stay, for the CUDA graphs that share one bound of `max_tiles`.

    The table bound while they are captured says at which sites there are kernels at all, by its
    `max_tiles` and `has_gains`: whoever loads another one must see that they bound it too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.plan: ReplayedPlan | None = None
        self._loaded: TileTable | None = None

    def load(self, tiles: TileTable) -> bool:
        """Put a table in place of the last one, on the current stream, without waiting for it.

        Returns True if graphs captured before must not be replayed with it but captured anew:
        addresses have moved, or the table has more tiles at a site than a graph's h has columns
        for, rows that are less aligned, or the first v. Cut for decode, whatever the segments.

        The table that is there already costs nothing; its tensors must not be written meanwhile.

        Raises    ValueError if the table is wrong; the last one is then still there.
        """
        if self.plan is not None and tiles is self._loaded:
            return False
        arrays = _arrays_of(tiles)
        table = HostTable(arrays, known_extents.of(tiles, arrays), DECODE)
        plan = self.plan
        with torch.inference_mode():
            if plan is not None and plan.words.sizes.hold(table.sizes) and plan.accepts(table):
                is_new = False
            else:
                plan, is_new = self._renewed(table), True
            filled = table.words().sections
            for section, part in zip(plan.words.sections, filled, strict=True):
                section[: part.numel()].copy_(part, non_blocking=True)
        plan.replace(table)
        self.plan, self._loaded = plan, tiles
        return is_new

    def _renewed(self, table: HostTable) -> ReplayedPlan:
        """A plan that nothing has been launched with; sizes and traits only widen."""
        extents, sizes = table.extents, table.sizes.with_room()
        traits = Traits(extents.alignment(), extents.has_v)
        old = self.plan
        if old is None or old.words.sizes.num_sites != sizes.num_sites:
            return ReplayedPlan(table, PlanWords(sizes, self._device), traits)
        traits = Traits(
            min(traits.alignment, old.traits.alignment), traits.has_v or old.traits.has_v
        )
        if old.words.sizes.hold(table.sizes):
            return ReplayedPlan(table, old.words, traits)
        sizes = Sizes(*map(max, sizes, old.words.sizes))
        return ReplayedPlan(table, PlanWords(sizes, self._device), traits)


class Plans:
    """The plans of the tables used last, by the identity of their tensors and their segments.

    A table's tensors must not be written once a kernel has had them.
    """

    def __init__(self) -> None:
        self._last: tuple[TileTable, torch.device, DevicePlan] | None = None
        self._kept: OrderedDict[Hashable, tuple[TileTable, DevicePlan]] = OrderedDict()
        self._bound: dict[int, tuple[TileTable, PlanArena]] = {}
        self._widths: dict[int, Widths] = {}

    def of(self, tiles: TileTable, device: torch.device) -> DevicePlan:
        """The plan of a table; uploaded on the current stream if it is new.

        Raises    ValueError if the table is wrong whatever the widths.
        """
        if id(tiles) in self._bound:
            bound = self._bound[id(tiles)][1].plan
            assert bound is not None, "nothing was loaded into the arena that a table is bound to"
            return bound
        last = self._last
        if last is not None and last[0] is tiles and last[1] == device:
            return last[2]
        arrays = _arrays_of(tiles)
        key = device, _identities(tiles), arrays["segments"].tobytes()
        if key not in self._kept:
            extents = known_extents.of(tiles, arrays)
            _keep(self._kept, key, (tiles, self._make(arrays, extents, device)))
        self._kept.move_to_end(key)
        plan = self._kept[key][1]
        self._last = tiles, device, plan
        return plan

    def bind(self, tiles: TileTable, arena: PlanArena) -> AbstractContextManager[Any]:
        """From now on the arena's plan is that of this table, until the result is left or closed.

        For capturing graphs: their kernels, called with `tiles`, read what is loaded later.
        """
        self._bound[id(tiles)] = tiles, arena
        stack = ExitStack()
        stack.callback(self._bound.pop, id(tiles), None)
        return stack

    def _make(
        self, arrays: Mapping[str, np.ndarray], extents: SiteExtents, device: torch.device
    ) -> DevicePlan:
        table = HostTable(arrays, extents)
        num_sites = table.sizes.num_sites
        widths = self._widths.setdefault(num_sites, Widths(num_sites))
        with torch.inference_mode():
            host = table.words()
            if device.type == "cpu":
                return DevicePlan(table, host, widths)
            words = PlanWords(table.sizes, device)
            words.packed.copy_(host.packed, non_blocking=True)
            return DevicePlan(table, words, widths)


plans = Plans()


def _keep(kept: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    """Remember it, with what keeps the identities in its key alive."""
    kept[key] = value
    if len(kept) > MAX_KEPT:
        kept.popitem(last=False)


def _pool_sizes(pool: Tensor) -> tuple[int, int]:
    """Elements, and float32 of the same bytes."""
    return pool.numel(), pool.numel() * pool.element_size() // FLOAT_BYTES


def _identities(tiles: TileTable) -> Hashable:
    """Of all tensors but the segments; they change when torch writes outside of inference mode."""
    tensors: list[Tensor] = [getattr(tiles, name) for name in ARRAYS[1:]]
    return tuple([(id(each), 0 if each.is_inference() else each._version) for each in tensors])


def _arrays_of(tiles: TileTable) -> dict[str, np.ndarray]:
    arrays = {}
    for name in ARRAYS:
        tensor: Tensor = getattr(tiles, name)
        if tensor.device.type != "cpu":
            raise ValueError(f"tiles.{name} is on {tensor.device}; a table is host data")
        arrays[name] = tensor.contiguous().numpy()
    return arrays
