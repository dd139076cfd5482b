"""Builds the Batch of given tokens over a small page pool, as the engine would.

Keeps K and V of named sequences between batches, so that a prompt can be run in chunks. Pages are
handed out in a shuffled order: a kernel that ignores the page table reads another sequence.
Adapters are laid out by hand: tiles by tile_factory, overlays in shuffled blocks of a few rows.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from loraswarm.core.base_shape import BaseShape
from loraswarm.kernels import AttentionWork, TileTable
from loraswarm.kernels.overlay import Overlay, Overlays, PagedRows
from loraswarm.models.batch import Batch
from tile_factory import SiteWeights, TilePool

ROWS_PER_BLOCK = 7
Segments = Sequence[tuple[str | None, int]]


class BatchFactory:
    """Pages of one model and the sequences in them."""

    def __init__(
        self,
        shape: BaseShape,
        dtype: torch.dtype,
        *,
        page_tokens: int = 16,
        num_pages: int = 40,
        seed: int = 0,
    ) -> None:
        sizes = (num_pages, shape.num_layers, 2, shape.num_kv_heads, page_tokens, shape.head_size)
        self.pages = torch.full(sizes, float("nan"), dtype=dtype)
        self._page_tokens = page_tokens
        self._free = list(range(num_pages))
        random.Random(seed).shuffle(self._free)
        self._tables: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def batch(
        self,
        chunks: Mapping[str, Sequence[int]],
        *,
        tiles: TileTable | None = None,
        pool: torch.Tensor | None = None,
        last_rows_only: bool = False,
    ) -> Batch:
        """The next tokens of each named sequence; logits of every token, or of each one's last."""
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for name, token_ids in chunks.items():
            first = self._lengths.get(name, 0)
            self._reserve(name, first + len(token_ids))
            positions += range(first, first + len(token_ids))
            slots += [self._slot(name, at) for at in range(first, first + len(token_ids))]
            starts.append(len(positions))
        rows = [end - 1 for end in starts[1:]] if last_rows_only else list(range(len(positions)))
        return Batch(
            token_ids=torch.tensor([token for chunk in chunks.values() for token in chunk]),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            logit_rows=torch.tensor(rows, dtype=torch.int64),
            attention=self._attention(list(chunks), starts),
            tiles=tiles,
            pages=self.pages,
            pool=self.pages.view(-1) if pool is None else pool,
        )

    def _reserve(self, name: str, num_tokens: int) -> None:
        table = self._tables.setdefault(name, [])
        while len(table) * self._page_tokens < num_tokens:
            table.append(self._free.pop())
        self._lengths[name] = num_tokens

    def _slot(self, name: str, position: int) -> int:
        page = self._tables[name][position // self._page_tokens]
        return page * self._page_tokens + position % self._page_tokens

    def _attention(self, names: list[str], starts: list[int]) -> AttentionWork:
        lengths = [self._lengths[name] for name in names]
        width = max(len(self._tables[name]) for name in names)
        tables = [self._tables[name] + [0] * (width - len(self._tables[name])) for name in names]
        return AttentionWork(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            page_table=torch.tensor(tables, dtype=torch.int32),
            max_query_tokens=max(b - a for a, b in pairwise(starts)),
            max_context_tokens=max(lengths),
        )


@dataclass(frozen=True)
class Rows:
    """What an overlay of every module in `paths` holds."""

    paths: tuple[str, ...]
    rows_NW: Tensor
    token_ids: Tensor | None = None


@dataclass(frozen=True)
class HandAdapter:
    """One adapter: matrices by site, and the rows that stand in for weights of the base."""

    sites: Mapping[int, SiteWeights] = field(default_factory=dict)
    overlays: Sequence[Rows] = ()


class AdapterPool:
    """Adapters by name in one flat pool; NaN lies between what they store."""

    def __init__(
        self, adapters: Mapping[str, HandAdapter], shape: BaseShape, dtype: torch.dtype
    ) -> None:
        self._tiles = TilePool({name: each.sites for name, each in adapters.items()}, dtype)
        self._adapters = adapters
        self._num_sites = shape.num_sites()
        self._pieces = [self._tiles.pool]
        self._num_elements = len(self._tiles.pool)
        self._rows = {
            name: [self._add(rows.rows_NW.to(dtype)) for rows in each.overlays]
            for name, each in adapters.items()
        }
        # Float32 views need whole pairs.
        tail = torch.full((998 + self._num_elements % 2,), float("nan"), dtype=dtype)
        self.pool = torch.cat([*self._pieces, tail])

    def adapt(self, batch: Batch, segments: Segments) -> Batch:
        """The batch with tiles and overlays of (adapter or None, number of tokens), in order."""
        bounds = _bounds(segments)
        head_bounds = torch.searchsorted(batch.logit_rows, torch.tensor(bounds)).tolist()
        names = [name for name, _ in segments]
        counts = [end - begin for begin, end in pairwise(head_bounds)]
        return dataclasses.replace(
            batch,
            pool=self.pool,
            tiles=self._table(segments),
            overlays=self._overlays(names, bounds),
            head_tiles=self._table(list(zip(names, counts, strict=True))),
            head_overlays=self._overlays(names, head_bounds),
        )

    def _table(self, segments: Segments) -> TileTable | None:
        has_sites = any(name is not None and self._adapters[name].sites for name, _ in segments)
        return self._tiles.table(self._num_sites, segments) if has_sites else None

    def _overlays(self, names: Sequence[str | None], bounds: Sequence[int]) -> Overlays:
        overlays: dict[str, tuple[Overlay, ...]] = {}
        for name, (begin, end) in zip(names, pairwise(bounds), strict=True):
            if name is None:
                continue
            for rows, paged in zip(self._adapters[name].overlays, self._rows[name], strict=True):
                for path in rows.paths:
                    overlay = Overlay(begin, end, paged, rows.token_ids)
                    overlays[path] = (*overlays.get(path, ()), overlay)
        return overlays

    def _add(self, rows_NW: Tensor) -> PagedRows:
        """Blocks in a shuffled order: code that ignores the offsets reads other rows."""
        blocks = list(rows_NW.split(ROWS_PER_BLOCK))
        offsets = [0] * len(blocks)
        order = list(range(len(blocks)))
        random.Random(len(blocks)).shuffle(order)
        for index in order:
            gap = torch.full((3,), float("nan"), dtype=rows_NW.dtype)
            self._pieces += [gap, blocks[index].reshape(-1)]
            offsets[index] = self._num_elements + len(gap)
            self._num_elements = offsets[index] + blocks[index].numel()
        num_rows, width = rows_NW.shape
        return PagedRows(torch.tensor(offsets), tuple(offsets), ROWS_PER_BLOCK, num_rows, width)


def _bounds(segments: Segments) -> list[int]:
    bounds = [0]
    for _, num_tokens in segments:
        bounds.append(bounds[-1] + num_tokens)
    return bounds
