"""What all operations on one tile table share: the checks, the items of every site, addresses.

Made once for each table, for all sites whose widths have been seen: a step records two operations
for every linear, and its table changes whenever requests come or go. The tensors are not copied:
what is written to a table's scales or matrices is seen. Called by kernels/cpu/lora.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS, TileTable, reference
from loraswarm.kernels.cpu import tiles as cut

FLOAT_BYTES = 4
UNKNOWN = -1


class Items:
    """The items of shrink or of expand at every site; `first_item` and `columns` are read by
    operations, by their addresses."""

    def __init__(self, widths: Any, items_U: Any, columns_U: Any, faults: Any) -> None:
        num_segments = items_U.size // max(widths.size, 1)
        self.widths = widths
        self.columns_U = columns_U
        self.first_item = np.zeros(items_U.size + 1, np.int64)
        np.cumsum(items_U, out=self.first_item[1:])
        self.address = self.first_item.ctypes.data
        self.columns_address = columns_U.ctypes.data
        self.widths_address = widths.ctypes.data
        self._starts = self.first_item[:: max(num_segments, 1)].tolist()
        self._widths = tuple(widths.tolist())
        self._faults = faults.tolist() if faults.any() else None

    def know(self, first_site: int, widths: tuple[int, ...]) -> bool:
        """Whether these are the widths that the items were counted with."""
        return self._widths[first_site : first_site + len(widths)] == widths

    def count(self, first_site: int, num_parts: int) -> int:
        """The number of items of one fused linear. Raises ValueError for what is wrong there."""
        if self._faults is not None:
            for fault in self._faults[first_site : first_site + num_parts]:
                if fault:
                    raise ValueError(cut.MESSAGES[fault])
        return int(self._starts[first_site + num_parts] - self._starts[first_site])


class Work(NamedTuple):
    """What one table asks for at one fused linear; the tensors must have these sizes.

    `num_columns` of h are made by shrink, at least as many are read by expand. `arguments` are the
    operation's that depend on nothing else; they hold addresses in `items`.
    """

    num_tokens: int
    num_columns: int
    num_items: int
    arguments: tuple[int, ...]
    items: Items


class TablePlan:
    """One table in one pool."""

    def __init__(self, tiles: TileTable, pool: Tensor, widths: tuple[Any, Any] | None) -> None:
        self.tiles = tiles
        self.pool_size = pool.numel()
        self.dtype = pool.dtype
        self._shrinks: dict[tuple[int, int, int], Work] = {}
        self._expands: dict[tuple[int, tuple[int, ...]], Work] = {}
        self._num_floats = pool.numel() * pool.element_size() // FLOAT_BYTES
        self._arrays = {
            name: getattr(tiles, name).contiguous().numpy()
            for name in TileTable.__dataclass_fields__
            if name not in ("max_tiles", "has_gains")
        }
        _check_lengths(self._arrays)
        self._num_segments = self._arrays["ranges"].shape[1]
        self._num_tokens = int(self._arrays["segments"][-1])
        counts = self._arrays["ranges"][:, :, 1] - self._arrays["ranges"][:, :, 0]
        most = counts.max(axis=1, initial=0)
        self._columns = (MAX_TILE_RANKS * most).tolist()
        self._words = self._address_words()
        self._address = self._words.ctypes.data
        num_sites = most.size
        unknown = np.full(num_sites, UNKNOWN, np.int64)
        if widths is None or widths[0].size != num_sites:
            widths = unknown, unknown
        self._a_items = self._count_shrink(widths[0])
        self._bt_items = self._count_expand(widths[1])

    @property
    def widths(self) -> tuple[Any, Any]:
        """In and out features of each site as far as they are known."""
        return self._a_items.widths, self._bt_items.widths

    def shrink_work(self, first_site: int, num_parts: int, in_features: int) -> Work:
        """Raises ValueError if the table leads outside of itself or of the pool there."""
        key = first_site, num_parts, in_features
        work = self._shrinks.get(key)
        if work is None:
            self._check_sites(first_site, num_parts)
            widths = (in_features,) * num_parts
            if not self._a_items.know(first_site, widths):
                known = _replaced(self._a_items.widths, first_site, widths)
                self._a_items = self._count_shrink(known)
            num_columns = MAX_TILE_RANKS * self.tiles.part_tiles(first_site, num_parts)
            self._check_columns(num_columns, first_site, num_parts)
            work = self._work(self._a_items, first_site, num_parts, num_columns)
            self._shrinks[key] = work
        return work

    def expand_work(self, first_site: int, out_bounds: tuple[int, ...]) -> Work:
        """Raises ValueError if the table leads outside of itself or of the pool there."""
        key = first_site, out_bounds
        work = self._expands.get(key)
        if work is None:
            num_parts = len(out_bounds) - 1
            self._check_sites(first_site, num_parts)
            widths = tuple([high - low for low, high in pairwise(out_bounds)])
            if not self._bt_items.know(first_site, widths):
                known = _replaced(self._bt_items.widths, first_site, widths)
                self._bt_items = self._count_expand(known)
            num_columns = max(self._columns[first_site : first_site + num_parts])
            work = self._work(self._bt_items, first_site, num_parts, num_columns)
            self._expands[key] = work
        return work

    def _work(self, items: Items, first_site: int, num_parts: int, num_columns: int) -> Work:
        num_items = items.count(first_site, num_parts)
        arguments = (
            self._address,
            items.address,
            first_site,
            num_parts,
            items.columns_address,
            items.widths_address,
        )
        return Work(self._num_tokens, num_columns, num_items, arguments, items)

    def _check_sites(self, first_site: int, num_parts: int) -> None:
        if num_parts < 1 or not 0 <= first_site <= len(self._columns) - num_parts:
            reference.check_sites(self.tiles, first_site, num_parts)

    def _check_columns(self, num_columns: int, first_site: int, num_parts: int) -> None:
        if max(self._columns[first_site : first_site + num_parts]) > num_columns:
            raise ValueError("tiles.max_tiles is less than tiles.ranges needs")

    def _address_words(self) -> Any:
        words = np.zeros(cut.NUM_WORDS, np.int64)
        words[cut.NUM_SEGMENTS] = self._num_segments
        for index, name in (
            (cut.SEGMENTS, "segments"),
            (cut.RANGES, "ranges"),
            (cut.RANKS, "ranks"),
            (cut.A_OFFSET, "a_offset"),
            (cut.A_STRIDE, "a_stride"),
            (cut.BT_OFFSET, "bt_offset"),
            (cut.BT_STRIDE, "bt_stride"),
            (cut.SCALE, "scale"),
            (cut.U_OFFSET, "u_offset"),
            (cut.V_OFFSET, "v_offset"),
            (cut.GAIN_OFFSET, "gain_offset"),
        ):
            words[index] = self._arrays[name].ctypes.data
        return words

    def _count_shrink(self, widths: Any) -> Items:
        return self._count(widths, "a_offset", "a_stride", np.zeros(0, np.int32))

    def _count_expand(self, widths: Any) -> Items:
        columns_U = np.zeros(widths.size * self._num_segments, np.int32)
        return self._count(widths, "bt_offset", "bt_stride", columns_U)

    def _count(self, widths: Any, offset: str, stride: str, columns_U: Any) -> Items:
        arrays = self._arrays
        items_U = np.zeros(widths.size * self._num_segments, np.int64)
        faults = np.zeros(widths.size, np.int64)
        cut.count_items(
            arrays["segments"],
            arrays["ranges"],
            arrays[offset],
            arrays[stride],
            arrays["ranks"],
            widths,
            self.pool_size,
            items_U,
            columns_U,
            faults,
        )
        if columns_U.size:
            cut.check_vectors(
                arrays["ranges"],
                arrays["ranks"],
                arrays["u_offset"],
                arrays["v_offset"],
                arrays["gain_offset"],
                widths,
                self._num_floats,
                items_U,
                faults,
            )
        return Items(widths, items_U, columns_U, faults)


class LastPlan:
    """Keeps the plan of the table used last: a step calls the kernels for every linear."""

    def __init__(self) -> None:
        self._last: TablePlan | None = None

    def of(self, tiles: TileTable, pool: Tensor) -> TablePlan:
        """The plan of a table. Raises ValueError if its tensors do not fit together."""
        last = self._last
        if (
            last is not None
            and last.tiles is tiles
            and last.pool_size == pool.numel()
            and last.dtype == pool.dtype
        ):
            return last
        plan = TablePlan(tiles, pool, None if last is None else last.widths)
        self._last = plan  # another thread may set another meanwhile
        return plan


last_plan = LastPlan()


def _check_lengths(arrays: dict[str, Any]) -> None:
    """Raise ValueError if the tensors of a table differ in length, or segments do not ascend."""
    num_tiles = arrays["a_offset"].size
    for name in ("a_stride", "bt_offset", "bt_stride", "ranks", "scale", "u_offset", "v_offset"):
        if arrays[name].size != num_tiles:
            raise ValueError(f"tiles.{name} has another length than tiles.a_offset")
    segments, ranges, gains = arrays["segments"], arrays["ranges"], arrays["gain_offset"]
    if segments.size != ranges.shape[1] + 1:
        raise ValueError("tiles.ranges has another number of segments than tiles.segments")
    if gains.shape != ranges.shape:
        raise ValueError("tiles.gain_offset has another shape than tiles.ranges")
    if segments[0] != 0:
        raise ValueError("tiles.segments must go from 0 to the number of tokens")
    if (segments[1:] < segments[:-1]).any():
        raise ValueError("tiles.segments must ascend")


def _replaced(widths: Any, first_site: int, values: tuple[int, ...]) -> Any:
    result = widths.copy()
    result[first_site : first_site + len(values)] = values
    return result
