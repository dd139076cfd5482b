"""Shrink and expand equal the reference for every type, width, rank, batch and popularity.

A device runs all of it; the interpreter one batch of each type, width and rank, of bounded work.
The weights of a type and width are made once: adapters are windows, shifted against each other, of
the same rows.
Legend: I in features, O out features, R ranks, N rows of all windows.

    rows of A      | 0 | 1 | 2 | 3 | 4 | ...        each I long, then NaN up to the next
    adapter 0      | 0 | 1 |
    adapter 1              | 2 | 3 |                 its rows begin where the number says
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernel_cases import segments_of
from loraswarm.kernels import MAX_TILE_RANKS, TileTable, reference
from loraswarm.kernels.triton import items, lora
from loraswarm.kernels.triton.launch import DEVICE_TYPE, IS_INTERPRETED
from loraswarm.kernels.triton.plan import plans
from loraswarm.kernels.triton.shrink import shrink_blocks
from tolerance import TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("interpreted_triton")

DEVICE = torch.empty(0, device=DEVICE_TYPE).device
DTYPES = list(TOLERANCE)
WIDTHS = (64, 896, 4096, 14336)
RANKS = (1, 3, 8, 16, 33, 64, 128)
BATCHES = (1, 2, 3, 7, 16, 64, 133)
POPULARITIES = ("distinct", "uniform", "zipf", "identical")
PREFILL_BATCHES = (64, 133)
SHIFT = 2
"""Rows between the beginnings of adapters of adjacent numbers."""
MAX_ADAPTERS = max(BATCHES)
NUM_ROWS = SHIFT * MAX_ADAPTERS + max(RANKS)
MOST_PIECES = 30
"""Pieces of work of a batch that the interpreter is given: some hundredths of a second each."""
SOME_WIDTHS = WIDTHS[:2] if IS_INTERPRETED else WIDTHS


class Part(NamedTuple):
    """An adapter's tiles in a segment."""

    adapter: int
    rank: int
    scale: float = 0.5
    has_vectors: bool = False


class Segment(NamedTuple):
    """Adjacent tokens of the same parts; the gains are those of an adapter."""

    parts: tuple[Part, ...]
    num_tokens: int
    gains_of: int | None = None


@dataclass(frozen=True)
class Weights:
    """The pool of one type and width, and x and y [133, width] of all batches.

    `vectors_at` counts float32 of the pool: adapter n's u, v, g and c are there from 4 n on.
    """

    pool: Tensor
    on_device: Tensor
    a_at: int
    bt_at: int
    pitch: int
    vectors_at: int
    width: int
    x_TI: Tensor
    y_TO: Tensor

    def table(self, segments: Sequence[Segment]) -> TileTable:
        """One site."""
        columns = {
            name: [] for name in ("a_offset", "bt_offset", "ranks", "scale", "u_offset", "v_offset")
        }
        ranges, gains, bounds = [], [], [0]
        for segment in segments:
            first = len(columns["ranks"])
            for part in segment.parts:
                self._add(columns, part)
            ranges.append([first, len(columns["ranks"])])
            adapter = segment.gains_of
            gains.append([-1, -1] if adapter is None else self._vectors(adapter)[2:])
            bounds.append(bounds[-1] + segment.num_tokens)
        num_tiles = len(columns["ranks"])
        strides = torch.full((num_tiles,), self.pitch)
        most = max((last - first for first, last in ranges), default=0)
        return TileTable(
            segments=torch.tensor(bounds, dtype=torch.int32),
            ranges=torch.tensor([ranges], dtype=torch.int32).view(1, -1, 2),
            a_offset=torch.tensor(columns["a_offset"], dtype=torch.int64),
            bt_offset=torch.tensor(columns["bt_offset"], dtype=torch.int64),
            a_stride=strides,
            bt_stride=strides,
            ranks=torch.tensor(columns["ranks"], dtype=torch.int32),
            scale=torch.tensor(columns["scale"], dtype=torch.float32),
            u_offset=torch.tensor(columns["u_offset"], dtype=torch.int64),
            v_offset=torch.tensor(columns["v_offset"], dtype=torch.int64),
            gain_offset=torch.tensor([gains]).view(1, -1, 2),
            max_tiles=(most,),
            has_gains=(any(segment.gains_of is not None for segment in segments),),
        )

    def _add(self, columns: dict[str, list], part: Part) -> None:
        u_at, v_at, _, _ = self._vectors(part.adapter)
        for first in range(0, part.rank, MAX_TILE_RANKS):
            row = SHIFT * part.adapter + first
            columns["a_offset"].append(self.a_at + row * self.pitch)
            columns["bt_offset"].append(self.bt_at + row * self.pitch)
            columns["ranks"].append(min(part.rank - first, MAX_TILE_RANKS))
            columns["scale"].append(part.scale)
            columns["u_offset"].append(u_at + first if part.has_vectors else -1)
            columns["v_offset"].append(v_at if part.has_vectors else -1)

    def _vectors(self, adapter: int) -> list[int]:
        """Where u, v, g and c of an adapter begin; they overlap, shifted."""
        return [self.vectors_at + 4 * adapter + index for index in range(4)]


@lru_cache(maxsize=1)
def weights_of(dtype: torch.dtype, width: int, padding: int) -> Weights:
    """Rows of A and Bt begin on whole loads of the kernels if `padding` and `width` allow it."""
    generator = torch.Generator().manual_seed(width)
    pitch, guard = width + padding, 64
    num_vector_floats = width + max(RANKS) + 4 * (MAX_ADAPTERS + 1)

    def rows() -> Tensor:
        block = torch.full((NUM_ROWS, pitch), float("nan"), dtype=dtype)
        block[:, :width] = torch.randn(NUM_ROWS, width, generator=generator) * width**-0.5
        return block.view(-1)

    nothing = torch.full((guard,), float("nan"), dtype=dtype)
    vectors = torch.randn(num_vector_floats, generator=generator).view(dtype)
    a_rows, bt_rows = rows(), rows().mul_(width**0.5 * max(RANKS) ** -0.5)
    pool = torch.cat([nothing, a_rows, bt_rows, nothing, vectors, nothing])
    before = 2 * guard + len(a_rows) + len(bt_rows)
    per_float = 4 // dtype.itemsize
    assert before % per_float == 0
    x_TI, y_TO = torch.randn(2, MAX_ADAPTERS, width, generator=generator).to(dtype)
    return Weights(
        pool=pool,
        on_device=pool.to(DEVICE),
        a_at=guard,
        bt_at=guard + len(a_rows),
        pitch=pitch,
        vectors_at=before // per_float,
        width=width,
        x_TI=x_TI,
        y_TO=y_TO,
    )


def segments(popularity: str, batch: int, rank: int) -> list[Segment]:
    """One adapter a segment, all of one rank, or tokens of the base."""
    found = []
    for name, num_tokens in segments_of(popularity, batch):
        parts = () if name is None else (Part(int(name.removeprefix("adapter")), rank),)
        found.append(Segment(parts, num_tokens))
    return found


def check(weights: Weights, wanted: Sequence[Segment]) -> str | None:
    """What is wrong with shrink or expand of these segments, or with rows of the base."""
    tiles = weights.table(wanted)
    num_tokens = int(tiles.segments[-1])
    x_TI, y_TO = weights.x_TI[:num_tokens], weights.y_TO[:num_tokens].clone()
    is_base_T = torch.repeat_interleave(
        torch.tensor([not segment.parts and segment.gains_of is None for segment in wanted]),
        torch.tensor([segment.num_tokens for segment in wanted]),
    )
    y_TO[is_base_T, ::2] = -0.0
    y_TO[is_base_T, 1::2] = float("nan")
    h_QTR = reference.lora_shrink(x_TI, weights.pool, tiles, 0, 1)
    expected_TO = y_TO.clone()
    bounds = (0, weights.width)
    reference.lora_expand_(expected_TO, h_QTR, weights.pool, tiles, 0, bounds)
    found_QTR = lora.lora_shrink(x_TI.to(DEVICE), weights.on_device, tiles, 0, 1).cpu()
    found_TO = y_TO.to(DEVICE, copy=True)
    lora.lora_expand_(found_TO, h_QTR.to(DEVICE), weights.on_device, tiles, 0, bounds)
    found_TO = found_TO.cpu()
    try:
        assert_close(defined(found_QTR, tiles), defined(h_QTR, tiles), torch.float32)
        assert_close(found_TO[~is_base_T], expected_TO[~is_base_T], y_TO.dtype)
    except AssertionError as error:
        return str(error)
    bits = found_TO[is_base_T].view(torch.uint8), y_TO[is_base_T].view(torch.uint8)
    if not torch.equal(*bits):
        return "rows of the base have changed"
    if not is_base_T.all() and torch.equal(found_TO[~is_base_T], y_TO[~is_base_T]):
        return "rows of adapters have not changed"
    return None


def defined(h_QTR: Tensor, tiles: TileTable) -> Tensor:
    """h with zeros in the columns that no tile writes."""
    result = torch.zeros_like(h_QTR)
    for segment, (first, last) in enumerate(tiles.ranges[0].tolist()):
        tokens = slice(*tiles.segments[segment : segment + 2].tolist())
        for tile in range(first, last):
            begin = MAX_TILE_RANKS * (tile - first)
            columns = slice(begin, begin + int(tiles.ranks[tile]))
            result[:, tokens, columns] = h_QTR[:, tokens, columns]
    return result


def num_pieces(weights: Weights, wanted: Sequence[Segment]) -> int:
    """Pieces of work of a shrink cut for decode."""
    tiles = weights.table(wanted)
    blocks = shrink_blocks(weights.width, weights.pool.itemsize, items.DECODE, 1)
    splits = -(-weights.width // blocks.split_features)
    chunks = [-(-segment.num_tokens // items.DECODE.item_tokens) for segment in wanted]
    counts = (tiles.ranges[0, :, 1] - tiles.ranges[0, :, 0]).tolist()
    return splits * sum(count * chunk for count, chunk in zip(counts, chunks, strict=True))


def cells(weights: Weights, dtype: torch.dtype, rank: int) -> list[tuple[str, int]]:
    """Popularities and batches: all on a device; interpreted, one whose work is bounded."""
    if not IS_INTERPRETED:
        return list(product(POPULARITIES, BATCHES))
    turn = DTYPES.index(dtype) + RANKS.index(rank) + WIDTHS.index(weights.width)
    popularity = POPULARITIES[turn % len(POPULARITIES)]
    small = [
        batch
        for batch in BATCHES[1:]
        if num_pieces(weights, segments(popularity, batch, rank)) <= MOST_PIECES
    ]
    return [(popularity, (small or [1])[turn % max(len(small), 1)])]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_batch_and_popularity_equals_reference(dtype, width, rank):
    weights = weights_of(dtype, width, padding=8)
    faults = [
        f"{popularity}, batch {batch}: {fault}"
        for popularity, batch in cells(weights, dtype, rank)
        if (fault := check(weights, segments(popularity, batch, rank))) is not None
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("rank", [3, 16, 33, 128])
@pytest.mark.parametrize("width", SOME_WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_batches_cut_for_prefill_equal_reference(dtype, width, rank, monkeypatch):
    monkeypatch.setattr(items, "DECODE_TOKENS", 0)
    weights = weights_of(dtype, width, padding=8)
    chosen = list(product(("zipf", "identical"), PREFILL_BATCHES))
    if IS_INTERPRETED:
        chosen = [("identical", PREFILL_BATCHES[0])]
    faults = []
    for popularity, batch in chosen:
        wanted = segments(popularity, batch, rank)
        assert plans.of(weights.table(wanted), DEVICE).table.cut == items.PREFILL
        if (fault := check(weights, wanted)) is not None:
            faults.append(f"{popularity}, batch {batch}: {fault}")
    assert not faults, "\n".join(faults)


def mixed(num_each: int) -> list[Segment]:
    """Every rank, tokens of the base between, sums, signed tiles, vectors, and gains alone."""
    ranked = [Segment((Part(7 * index, rank),), num_each) for index, rank in enumerate(RANKS)]
    own, merged = Part(50, 16, 0.75), Part(51, 33, 0.5)
    return [
        *ranked[:3],
        Segment((), num_each + 1),
        *ranked[3:],
        Segment((own, merged._replace(scale=-0.5)), num_each),
        Segment((merged._replace(scale=-0.5),), num_each),
        Segment((Part(60, 33, 0.5, has_vectors=True),), num_each, gains_of=60),
        Segment((), num_each, gains_of=61),
        Segment((), num_each),
    ]


@pytest.mark.parametrize("padding", [8, 5])
@pytest.mark.parametrize("width", SOME_WIDTHS[:1] if IS_INTERPRETED else WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_signs_and_vectors_in_one_batch_equal_reference(dtype, width, padding):
    weights = weights_of(dtype, width, padding)
    fault = check(weights, mixed(num_each=1))
    assert fault is None, fault


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_the_other_sign_take_back_what_tiles_add(dtype):
    weights = weights_of(dtype, 64, padding=8)
    part = Part(5, 33, 0.5)
    both = weights.table([Segment((part, part._replace(scale=-0.5)), 3)])
    one = weights.table([Segment((part,), 3)])
    results = []
    for tiles in (both, one):
        y_TO = weights.y_TO[:3].to(DEVICE, copy=True)
        h_QTR = lora.lora_shrink(weights.x_TI[:3].to(DEVICE), weights.on_device, tiles, 0, 1)
        lora.lora_expand_(y_TO, h_QTR, weights.on_device, tiles, 0, (0, 64))
        results.append(y_TO.cpu())
    assert_close(results[0], weights.y_TO[:3], dtype)
    assert not torch.allclose(results[1].float(), weights.y_TO[:3].float(), atol=0.1)
