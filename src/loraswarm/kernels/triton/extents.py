"""How far the tiles and vectors of every site reach into the pool, and what is wrong with that.

A table comes before the widths of the modules that use it, so it is reduced once to a few numbers a
site; widths are then checked against those, all sites at once. Numpy only; called by plan.
Legend: M sites, G segments, N tiles, W tiles in the order of the sites that use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loraswarm.kernels import MAX_TILE_RANKS
from loraswarm.kernels.triton.items import count_tiles

Array = np.ndarray
UNKNOWN = -1
FAR = 1 << 60
FULL_ALIGNMENT = 8
"""Elements of 16 bits in the widest load of a thread."""

MESSAGES = (
    "",
    "tiles.a_stride or tiles.bt_stride is less than a row",
    "a tile lies outside of the pool: tiles.a_offset or tiles.bt_offset",
    "a vector lies outside of the pool: tiles.gain_offset",
    "a vector lies outside of the pool: tiles.v_offset",
    "a vector lies outside of the pool: tiles.u_offset",
)
BAD_STRIDE, BAD_OFFSET, BAD_GAIN, BAD_V, BAD_U = range(1, 6)


def check_table(arrays: Mapping[str, Array]) -> None:
    """Raise ValueError for what is wrong with a table whatever the widths, but for its segments."""
    num_tiles = arrays["a_offset"].size
    for name in ("a_stride", "bt_offset", "bt_stride", "ranks", "scale", "u_offset", "v_offset"):
        if arrays[name].size != num_tiles:
            raise ValueError(f"tiles.{name} has another length than tiles.a_offset")
    ranges, ranks = arrays["ranges"], arrays["ranks"]
    if arrays["gain_offset"].shape != ranges.shape:
        raise ValueError("tiles.gain_offset has another shape than tiles.ranges")
    first, last = ranges[:, :, 0], ranges[:, :, 1]
    if ((first < last) & ((first < 0) | (last > num_tiles))).any():
        raise ValueError("tiles.ranges names tiles that do not exist")
    if num_tiles and not 1 <= ranks.min() <= ranks.max() <= MAX_TILE_RANKS:
        raise ValueError("tiles.ranks must be from 1 to 16")


def check_segments(segments: Array, ranges: Array) -> None:
    """Raise ValueError unless segments ascend from 0 and are as many as `ranges` has."""
    if segments.size != ranges.shape[1] + 1:
        raise ValueError("tiles.ranges has another number of segments than tiles.segments")
    if segments[0] != 0:
        raise ValueError("tiles.segments must go from 0 to the number of tokens")
    if (segments[1:] < segments[:-1]).any():
        raise ValueError("tiles.segments must ascend")


class Widths:
    """In and out features of every site, as far as calls have told; `version` counts changes.

    With `keeps_widest`, a narrower module than one known already changes nothing.
    """

    def __init__(self, num_sites: int, keeps_widest: bool = False) -> None:
        self.in_M = np.full(num_sites, UNKNOWN, np.int64)
        self.out_M = np.full(num_sites, UNKNOWN, np.int64)
        self.version = 0
        self._keeps_widest = keeps_widest

    def learn_in(self, first_site: int, widths: Sequence[int]) -> None:
        """What shrink reads of rows of A, from `first_site` on."""
        self._learn(self.in_M, first_site, widths)

    def learn_out(self, first_site: int, widths: Sequence[int]) -> None:
        """What expand reads of rows of Bt, from `first_site` on."""
        self._learn(self.out_M, first_site, widths)

    def _learn(self, known_M: Array, first_site: int, widths: Sequence[int]) -> None:
        known = known_M[first_site : first_site + len(widths)]
        news = np.maximum(known, widths) if self._keeps_widest else np.array(widths)
        if (known != news).any():
            known[:] = news
            self.version += 1


class SiteExtents:
    """What the checks, and the choice of kernels, need to know of a table without its segments.

    `most_tiles_M` are the most tiles of a segment at each site.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        ranks = arrays["ranks"].astype(np.int64)
        a_offset, a_stride = arrays["a_offset"], arrays["a_stride"]
        bt_offset, bt_stride = arrays["bt_offset"], arrays["bt_stride"]
        u_offset, v_offset = arrays["u_offset"], arrays["v_offset"]
        self.has_v = bool((v_offset >= 0).any())
        self.most_tiles_M = count_tiles(arrays["ranges"]).max(axis=1, initial=0)
        lows_KN = (
            a_offset,
            a_stride,
            -(a_offset + (ranks - 1) * a_stride),
            bt_offset,
            bt_stride,
            -(bt_offset + (ranks - 1) * bt_stride),
            u_offset,
            -np.where(u_offset >= 0, u_offset + ranks, 0),
            v_offset,
            -v_offset,
        )
        bits_KN = (a_offset | a_stride, bt_offset | bt_stride)
        order = _SiteOrder(arrays["ranges"])
        lows_KM = [order.reduce(np.minimum, low_N, FAR) for low_N in lows_KN]
        self._a_low_M, self._a_stride_M, a_high_M = lows_KM[:3]
        self._bt_low_M, self._bt_stride_M, bt_high_M = lows_KM[3:6]
        self._a_high_M, self._bt_high_M = -a_high_M, -bt_high_M
        self._u_low_M, self._u_high_M = lows_KM[6], -lows_KM[7]
        self._v_low_M, self._v_high_M = lows_KM[8], -lows_KM[9]
        self._a_bits_M, self._bt_bits_M = (
            order.reduce(np.bitwise_or, bits_N, 0).tolist() for bits_N in bits_KN
        )
        gains_MG2 = arrays["gain_offset"].reshape(self.most_tiles_M.size, -1)
        self._gain_low_M = gains_MG2.min(axis=1, initial=UNKNOWN)
        self._gain_high_M = gains_MG2.max(axis=1, initial=UNKNOWN)

    def a_alignment(self, first_site: int, num_parts: int) -> int:
        """A power of two, 8 at most, that divides where rows of A begin at these sites."""
        return _alignment(self._a_bits_M[first_site : first_site + num_parts])

    def bt_alignment(self, first_site: int, num_parts: int) -> int:
        """The same of Bt."""
        return _alignment(self._bt_bits_M[first_site : first_site + num_parts])

    def alignment(self) -> int:
        """The same of A and Bt at all sites."""
        return _alignment([*self._a_bits_M, *self._bt_bits_M])

    def shrink_faults(self, in_M: Array, num_elements: int) -> Array:
        """For each site whose width is known the number of a message, else 0."""
        is_outside_M = (self._a_low_M < 0) | (self._a_high_M + in_M > num_elements)
        faults = (self._a_stride_M < in_M, BAD_STRIDE), (is_outside_M, BAD_OFFSET)
        return _first_fault(in_M, faults)

    def expand_faults(self, out_M: Array, num_elements: int, num_floats: int) -> Array:
        """For each site whose width is known the number of a message, else 0."""
        last_start_M = np.maximum(num_floats - out_M, UNKNOWN)
        is_outside_M = (self._bt_low_M < 0) | (self._bt_high_M + out_M > num_elements)
        is_gain_bad_M = (self._gain_low_M < UNKNOWN) | (self._gain_high_M > last_start_M)
        is_v_bad_M = (self._v_low_M < UNKNOWN) | (self._v_high_M > last_start_M)
        is_u_bad_M = (self._u_low_M < UNKNOWN) | (self._u_high_M > num_floats)
        return _first_fault(
            out_M,
            (
                (self._bt_stride_M < out_M, BAD_STRIDE),
                (is_outside_M, BAD_OFFSET),
                (is_gain_bad_M, BAD_GAIN),
                (is_v_bad_M, BAD_V),
                (is_u_bad_M, BAD_U),
            ),
        )


class _SiteOrder:
    """The tiles of all units in order, to be reduced site by site."""

    def __init__(self, ranges: Array) -> None:
        tiles_U = count_tiles(ranges).reshape(-1)
        ends_U = np.cumsum(tiles_U)
        shift_U = ranges[:, :, 0].reshape(-1) - (ends_U - tiles_U)
        num_tiles = int(ends_U[-1]) if ends_U.size else 0
        self._tile_W = np.arange(num_tiles) + np.repeat(shift_U, tiles_U)
        tiles_M = tiles_U.reshape(ranges.shape[:2]).sum(axis=1)
        self._sites = np.flatnonzero(tiles_M)
        self._begins = (np.cumsum(tiles_M) - tiles_M)[self._sites]
        self._num_sites = ranges.shape[0]

    def reduce(self, function: np.ufunc, values_N: Array, empty: int) -> Array:
        """[M]; `empty` for sites without tiles."""
        result_M = np.full(self._num_sites, empty, np.int64)
        if self._sites.size == 0:
            return result_M
        if values_N.min() == values_N.max():
            result_M[self._sites] = values_N[0]
        else:
            result_M[self._sites] = function.reduceat(values_N[self._tile_W], self._begins)
        return result_M


def _first_fault(width_M: Array, faults: Sequence[tuple[Array, int]]) -> Array:
    result_M = np.zeros(width_M.size, np.int64)
    for is_bad_M, number in reversed(faults):
        result_M[is_bad_M] = number
    result_M[width_M == UNKNOWN] = 0
    return result_M


def _alignment(bits: Sequence[int]) -> int:
    """The largest power of two, 8 at most, that divides all of them."""
    joined = FULL_ALIGNMENT
    for each in bits:
        joined |= each
    return joined & -joined
