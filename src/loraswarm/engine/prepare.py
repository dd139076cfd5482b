"""Turns a Step into a Batch: gathers token ids, positions, page tables and logit rows as tensors.

Orders chunks so that those of one mix of adapters are adjacent (a segment of the tile table); a
chunk that reaches from tokens of the base into tokens of an activated LoRA makes two segments.
Called by the engine between plan and run; changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from loraswarm.engine.step import ScheduledChunk
from loraswarm.kernels import AttentionWork
from loraswarm.memory.kv_cache import KVCache
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_store import MergedSites, Segment, TileStore
from loraswarm.models.batch import Batch


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Which logits of the batch belong to a chunk.

    `sample_row` is the row its new token is drawn from (None: none); prompt token
    `first_prompt_position + i` is predicted by row `prompt_rows[i]`.
    """

    chunk: ScheduledChunk
    sample_row: int | None
    prompt_rows: range
    first_prompt_position: int


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A batch and, in the same order as the step's chunks, where each chunk's logits are.

    `drawn_ids` [T] int64, on the device, take the place of the batch's token ids: what the step
    before has drawn is not known to the host yet.
    """

    batch: Batch
    rows: tuple[LogitRows, ...]
    drawn_ids: Tensor | None = None


def prepare(
    chunks: tuple[ScheduledChunk, ...],
    kv_cache: KVCache,
    buffer: PageBuffer,
    tiles: TileStore,
    merged: MergedSites = (),
) -> PreparedBatch:
    """Build the tensors of one forward pass, on the host but for overlays, `pages` and `pool`.

    Chunks' pages must be reserved, adapters loaded. `merged` is in the weights that it will run on.
    """
    order = sorted(range(len(chunks)), key=lambda index: chunks[index].sequence.mix)
    ordered = [chunks[index] for index in order]
    token_ids, positions = _tokens_and_positions(ordered)
    page_table = _page_table(ordered, kv_cache)
    counts = np.array([chunk.num_tokens for chunk in ordered])
    page_tokens = kv_cache.page_tokens
    pages = page_table[np.repeat(np.arange(len(ordered)), counts), positions // page_tokens]
    rows, logit_rows = _logit_rows(ordered)
    segments = _segments(ordered)
    head_segments = _segments_of_rows(segments, logit_rows)
    slots = pages.astype(np.int64) * page_tokens + positions % page_tokens
    batch = Batch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        logit_rows=torch.from_numpy(np.array(logit_rows, dtype=np.int64)),
        attention=_attention_work(ordered, counts, page_table),
        tiles=tiles.table(segments, merged),
        overlays=tiles.overlays(segments),
        head_tiles=tiles.table(head_segments, merged),
        head_overlays=tiles.overlays(head_segments),
        pages=buffer.pages,
        pool=buffer.pool,
    )
    place = {index: rank for rank, index in enumerate(order)}
    return PreparedBatch(batch, tuple(rows[place[index]] for index in range(len(chunks))))


def _segments(chunks: list[ScheduledChunk]) -> list[Segment]:
    """Runs of tokens of one mix, in order."""
    segments: list[Segment] = []
    for chunk in chunks:
        num_base = min(max(chunk.sequence.first_adapted - chunk.begin, 0), chunk.num_tokens)
        for mix, count in (((), num_base), (chunk.sequence.mix, chunk.num_tokens - num_base)):
            if count == 0:
                continue
            if segments and segments[-1][0] == mix:
                count += segments.pop()[1]
            segments.append((mix, count))
    return segments


def _segments_of_rows(segments: list[Segment], rows: list[int]) -> list[Segment]:
    """The same mixes with the number of logit rows (ascending tokens) that fall to each."""
    ends = list(accumulate(count for _, count in segments))
    bounds = [0, *np.searchsorted(rows, ends).tolist()]
    return [(mix, bounds[index + 1] - bounds[index]) for index, (mix, _) in enumerate(segments)]


def _tokens_and_positions(chunks: list[ScheduledChunk]) -> tuple[np.ndarray, np.ndarray]:
    token_ids: list[int] = []
    positions = []
    for chunk in chunks:
        known = chunk.sequence.token_ids[chunk.begin : chunk.end]
        token_ids += known + [0] * (chunk.num_tokens - len(known))  # drawn_ids has the others
        positions.append(np.arange(chunk.begin, chunk.end))
    return np.array(token_ids, dtype=np.int64), np.concatenate(positions)


def _page_table(chunks: list[ScheduledChunk], kv_cache: KVCache) -> np.ndarray:
    lists = [kv_cache.pages_of(chunk.sequence.request_id) for chunk in chunks]
    table = np.zeros((len(lists), max(len(pages) for pages in lists)), dtype=np.int32)
    for row, pages in enumerate(lists):
        table[row, : len(pages)] = pages
    return table


def _attention_work(
    chunks: list[ScheduledChunk], counts: np.ndarray, page_table: np.ndarray
) -> AttentionWork:
    starts = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    contexts = np.array([chunk.end for chunk in chunks], dtype=np.int32)
    return AttentionWork(
        query_starts=torch.from_numpy(starts),
        context_lens=torch.from_numpy(contexts),
        page_table=torch.from_numpy(page_table),
        max_query_tokens=int(counts.max()),
        max_context_tokens=int(contexts.max()),
    )


def _logit_rows(chunks: list[ScheduledChunk]) -> tuple[list[LogitRows], list[int]]:
    """Where each chunk's logits come out, and the batch tokens whose logits are wanted."""
    rows: list[LogitRows] = []
    wanted: list[int] = []
    first_token = 0
    for chunk in chunks:
        positions = _prompt_positions(chunk)
        begin = len(wanted)
        offset = first_token - chunk.begin - 1
        wanted += [offset + position for position in positions]
        prompt_rows = range(begin, len(wanted))
        sample_row = None
        if chunk.samples:
            sample_row = len(wanted)
            wanted.append(first_token + chunk.num_tokens - 1)
        rows.append(LogitRows(chunk, sample_row, prompt_rows, positions.start))
        first_token += chunk.num_tokens
    return rows, wanted


def _prompt_positions(chunk: ScheduledChunk) -> range:
    """Prompt tokens that the chunk's tokens predict and whose log-probability is still wanted."""
    sequence = chunk.sequence
    if sequence.request.params.prompt_logprobs is None:
        return range(0)
    begin = max(chunk.begin + 1, len(sequence.prompt_logprobs))
    return range(begin, min(chunk.end + 1, sequence.num_prompt))
