"""Builds the Batch of given tokens over a small page pool, as the engine would.

Keeps K and V of named sequences between batches, so that a prompt can be run in chunks. Pages are
handed out in a shuffled order: a kernel that ignores the page table reads another sequence.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from loraswarm.core.base_shape import BaseShape
from loraswarm.kernels import AttentionWork, TileTable
from loraswarm.models.batch import Batch


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
