"""Decode steps as CUDA graphs: captured once for a size of batch, replayed for every step of it.

A captured step reads the same addresses each time. So a step's tensors are copied into fixed ones,
rows that the batch lacks are padding, and the tile table goes into an arena of the kernels. Which
adapters run, and how many, is read there: one graph serves any that have no more tiles than it was
captured for. Knows no requests. Used by engine/model_runner.
Legend: B rows of a bucket, Z logit rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from loraswarm.core.base_shape import TARGETS
from loraswarm.engine.buckets import buckets_of
from loraswarm.engine.headroom import padding_batch
from loraswarm.engine.transfer import host_tensors, pack, views
from loraswarm.kernels import AttentionWork, TileTable
from loraswarm.kernels.triton.launch import ceil_power
from loraswarm.kernels.triton.plan import PlanArena, plans
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.models.batch import Batch
from loraswarm.models.decoder import Decoder

MAX_SIGNATURES = 8
"""Each keeps the graphs of its buckets, some megabytes each (headroom.GRAPH_BYTES)."""
Replay = Callable[[], Tensor]
Signature = tuple[tuple[int, ...], tuple[bool, ...]]
"""By site: the most tiles, in powers of two and the same for a target in every layer, and whether
any segment has gains."""
OF_THE_BASE: tuple[int, Signature | None] = 0, None
"""Steps without adapters over the base's own weights; their graphs are never forgotten."""


class Recorder(Protocol):
    """Makes a step that can be repeated without its Python."""

    def __call__(self, run: Replay) -> Replay:
        """Run it, and return what runs the same again: with the same result, another value."""
        ...


class CudaRecorder:
    """Captures on one device; all graphs share memory, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        zero = torch.zeros(1, device=device)
        # A pool whose last graph is gone cannot be captured into again, so one is kept.
        self._kept = self._captured(lambda: zero + 1)

    def __call__(self, run: Replay) -> Replay:
        graph, result = self._captured(run)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _captured(self, run: Replay) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            run()  # what is compiled, or allocated for good, is so now
            torch.cuda.synchronize()
            # By threads: adapters are copied by one of its own meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = run()
        return graph, result


@dataclass(slots=True)
class _Captured:
    """A step of one size: the batch it reads, and how to run it."""

    batch: Batch
    packed: Tensor
    replay: Replay


class _Graphs:
    """The graphs of one signature, by bucket, and where they read a table."""

    def __init__(self, device: torch.device) -> None:
        self.arena = PlanArena(device)
        self.captured: dict[int, _Captured] = {}
        self._bindings = ExitStack()

    def load(self, tiles: TileTable) -> None:
        """Put a table where they read it. Those that cannot be replayed with it are forgotten."""
        if self.arena.load(tiles):
            self.close()

    def bind(self, tiles: TileTable) -> None:
        """Kernels that are called with this table read what is loaded."""
        self._bindings.enter_context(plans.bind(tiles, self.arena))

    def close(self) -> None:
        """Forget all graphs."""
        self.captured.clear()
        self._bindings.close()


class DecodeGraphs:
    """Captured decode steps of one decoder, by signature of the tile table and bucket of rows.

    `max_pages` is the most pages of a sequence, `max_rows` the most rows of a step.
    """

    def __init__(
        self, decoder: Decoder, recorder: Recorder, max_pages: int, page_tokens: int, max_rows: int
    ) -> None:
        self._decoder = decoder
        self._device = decoder.rope.table_LE.device
        self._recorder = recorder
        self._max_pages = max_pages
        self._page_tokens = page_tokens
        self._buckets = buckets_of(max_rows)
        # Of all graphs: what one of them would keep for itself is free again for the others.
        self._logits_BV = torch.empty(
            max_rows, decoder.config.vocab_size, dtype=torch.float32, device=self._device
        )
        self._graphs: OrderedDict[tuple[int, Signature | None], _Graphs] = OrderedDict()

    def try_run(
        self, batch: Batch, weights_version: int = 0, drawn_ids: Tensor | None = None
    ) -> Tensor | None:
        """Logits [Z, V] of a batch that is still on the host; None if it is no decode step, or does
        what a graph cannot.

        They lie where the next replay writes. A graph reads the weights that were in use when it
        was captured: `weights_version` is 0 for the base's, which stay, and another number for
        each other set of them, of which the last alone may come again. `drawn_ids` [T], on the
        device, are in the place of the batch's token ids.
        """
        num_rows = len(batch.token_ids)
        if not _is_decode(batch) or num_rows > self._buckets[-1]:
            return None
        signature = None if batch.tiles is None else self._signature(batch.tiles)
        graphs = self._of(weights_version, signature)
        if batch.tiles is not None:
            graphs.load(batch.tiles)
        bucket = next(size for size in self._buckets if size >= num_rows)
        if bucket not in graphs.captured:
            graphs.captured[bucket] = self._capture(bucket, batch, signature, graphs)
        self._fill(graphs.captured[bucket], batch)
        if drawn_ids is not None:
            graphs.captured[bucket].batch.token_ids[:num_rows].copy_(drawn_ids, non_blocking=True)
        return graphs.captured[bucket].replay()[:num_rows]

    @torch.inference_mode()
    def capture_base(self, buffer: PageBuffer, report: Callable[[str], None]) -> None:
        """Capture the steps of all sizes in which no adapter runs, over the pages of `buffer`;
        `report` gets one line.

        The largest comes first: smaller ones then find what memory they need.
        """
        begin_s = time.monotonic()
        like, graphs = padding_batch(buffer, 1, 1), self._of(*OF_THE_BASE)
        for bucket in reversed(self._buckets):
            if bucket not in graphs.captured:
                graphs.captured[bucket] = self._capture(bucket, like, None, graphs)
        rows = ",".join(map(str, self._buckets))
        report(f"captured base decode steps rows={rows} seconds={time.monotonic() - begin_s:.1f}")

    def _of(self, version: int, signature: Signature | None) -> _Graphs:
        """Those of a signature over weights in use; of those used last a few are kept, and the
        base's."""
        key = version, signature
        if key not in self._graphs:
            for stale in [other for other in self._graphs if other[0] not in (0, version)]:
                self._graphs.pop(stale).close()
            if len(self._graphs) >= MAX_SIGNATURES:
                oldest = next(each for each in self._graphs if each != OF_THE_BASE)
                self._graphs.pop(oldest).close()
            self._graphs[key] = _Graphs(self._device)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _signature(self, tiles: TileTable) -> Signature:
        num_linears = self._decoder.shape.num_linears
        counts, has_gains = list(tiles.max_tiles), list(tiles.has_gains)
        for target in range(len(TARGETS)):
            sites = slice(target, num_linears, len(TARGETS))
            layers = len(counts[sites])
            counts[sites] = [max(counts[sites])] * layers
            has_gains[sites] = [any(has_gains[sites])] * layers
        return tuple(ceil_power(count) if count else 0 for count in counts), tuple(has_gains)

    def _capture(
        self, bucket: int, like: Batch, signature: Signature | None, graphs: _Graphs
    ) -> _Captured:
        table = torch.zeros(bucket, self._max_pages, dtype=torch.int32)
        host = (*_padding(bucket), table)
        packed = pack(host, is_pinned=False).to(self._device)
        token_ids, positions, slots, logit_rows, starts, contexts, table = views(packed, host)
        tiles = None
        if signature is not None:
            assert like.tiles is not None
            tiles = replace(like.tiles, max_tiles=signature[0], has_gains=signature[1])
            graphs.bind(tiles)
        batch = replace(
            like,
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            logit_rows=logit_rows,
            attention=AttentionWork(
                starts, contexts, table, 1, self._max_pages * self._page_tokens
            ),
            tiles=tiles,
            head_tiles=tiles,
        )
        logits_BV = self._logits_BV[:bucket]
        replay = self._recorder(lambda: logits_BV.copy_(self._decoder.forward(batch)))
        return _Captured(batch, packed, replay)

    def _fill(self, captured: _Captured, batch: Batch) -> None:
        """Copy a step's tensors to where the graph reads them."""
        num_rows, bucket = len(batch.token_ids), len(captured.batch.token_ids)
        *small, table = host_tensors(batch)
        padded = _padding(bucket)
        for padding, tensor in zip(padded, small, strict=True):
            padding[: len(tensor)] = tensor
        is_cuda = captured.packed.is_cuda
        source = pack(padded, is_cuda)
        captured.packed[: source.numel()].copy_(source, non_blocking=True)
        wide = captured.batch.attention.page_table[:num_rows, : table.shape[1]]
        wide.copy_(table.pin_memory() if is_cuda else table, non_blocking=True)


def _padding(bucket: int) -> tuple[Tensor, ...]:
    """The host tensors of a batch of padding, in the order of `transfer.host_tensors`, without the
    page table."""
    return (
        torch.zeros(bucket, dtype=torch.int64),
        torch.zeros(bucket, dtype=torch.int64),
        torch.full((bucket,), -1, dtype=torch.int64),
        torch.arange(bucket),
        torch.arange(bucket + 1, dtype=torch.int32),
        torch.zeros(bucket, dtype=torch.int32),
    )


def _is_decode(batch: Batch) -> bool:
    """Whether every token is its sequence's only one and gets logits, and nothing but tiles
    changes what the base does."""
    return (
        batch.attention.max_query_tokens == 1
        and batch.logit_rows.shape == batch.token_ids.shape
        and not batch.overlays
        and not batch.head_overlays
        and batch.head_tiles is batch.tiles
    )
