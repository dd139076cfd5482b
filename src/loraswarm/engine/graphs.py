"""Decode steps as CUDA graphs: captured once for a size of batch, replayed for every step of it.

A captured step reads the same addresses each time. So a step's tensors are copied into fixed ones,
rows that the batch lacks are padding, and the tile table goes into an arena of the kernels. Which
adapters run, and how many, is read there: one graph serves any that have no more tiles than it was
captured for. Knows no requests. Used by engine/model_runner.
Legend: B rows of a bucket, Z logit rows, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from loraswarm.core.base_shape import TARGETS
from loraswarm.engine.buckets import buckets_of
from loraswarm.engine.devices import free_bytes, memory_report
from loraswarm.engine.headroom import padding_batch
from loraswarm.engine.transfer import host_tensors, pack, views
from loraswarm.errors import ConfigError
from loraswarm.kernels import AttentionWork, TileTable
from loraswarm.kernels.triton.launch import ceil_power
from loraswarm.kernels.triton.plan import PlanArena, plans
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.models.batch import Batch
from loraswarm.models.decoder import Decoder

log = logging.getLogger(__name__)
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
        self._stream = _capture_stream(device)
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
            with (
                _without_collections(),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                result = run()
        return graph, result


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines: torch has 32 and hands them out again after those, so that a new one for
    each would be some day's stream of copies, which must not be captured."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage is collected: graphs of another engine may be in it, and none may be destroyed
    while one is captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(slots=True)
class _Captured:
    """A step of one size: the batch it reads, and how to run it."""

    batch: Batch
    packed: Tensor
    replay: Replay


class _Graphs:
    """The graphs of one signature, by bucket, and where they read a table."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
        """Forget all graphs; one of them may be running."""
        if self.captured and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
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
        # Likewise, of as many pages as the longest context has.
        self._page_table = torch.zeros(max_rows, max_pages, dtype=torch.int32, device=self._device)
        self._is_full = False
        self._graphs: OrderedDict[tuple[int, Signature | None], _Graphs] = OrderedDict()

    def try_run(
        self, batch: Batch, weights_version: int = 0, drawn_ids: Tensor | None = None
    ) -> Tensor | None:
        """Logits [Z, V] of a batch that is still on the host; None if it is no decode step, does
        what a graph cannot, or the device had no memory for a graph of its size.

        They lie where the next replay writes. A graph reads the weights that were in use when it
        was captured: `weights_version` is 0 for the base's, which stay, and another number for
        each other set of them, of which the last alone may come again. `drawn_ids` [T], on the
        device, are in the place of the batch's token ids.
        """
        num_rows = len(batch.token_ids)
        if not _is_decode(batch) or num_rows > self._buckets[-1]:
            return None
        signature = None if batch.tiles is None else self._signature(batch.tiles)
        if self._is_full and (weights_version, signature) not in self._graphs:
            return None
        graphs = self._of(weights_version, signature)
        if batch.tiles is not None:
            graphs.load(batch.tiles)
        bucket = next(size for size in self._buckets if size >= num_rows)
        if not self._try_capture(bucket, batch, signature, graphs):
            return None
        self._fill(graphs.captured[bucket], batch)
        if drawn_ids is not None:
            graphs.captured[bucket].batch.token_ids[:num_rows].copy_(drawn_ids, non_blocking=True)
        return graphs.captured[bucket].replay()[:num_rows]

    @torch.inference_mode()
    def capture_base(self, buffer: PageBuffer, report: Callable[[str], None]) -> None:
        """Capture the steps of all sizes in which no adapter runs, over the pages of `buffer`;
        `report` gets one line.

        The largest comes first: smaller ones then find what memory they need.
        Raises    ConfigError if there is not enough.
        """
        begin_s, begin_bytes = time.monotonic(), free_bytes(self._device)
        like, graphs = padding_batch(buffer, 1, 1), self._of(*OF_THE_BASE)
        for bucket in reversed(self._buckets):
            if not self._try_capture(bucket, like, None, graphs):
                raise ConfigError(
                    f"the graph of decode steps of {bucket} rows does not fit beside weights and"
                    f" page pool: {memory_report(self._device)}; lower memory_utilization,"
                    " pool_bytes or max_num_sequences"
                )
        rows = ",".join(map(str, self._buckets))
        seconds, num_bytes = time.monotonic() - begin_s, begin_bytes - free_bytes(self._device)
        report(f"captured base decode steps rows={rows} seconds={seconds:.1f} bytes={num_bytes:,}")

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

    def _try_capture(
        self, bucket: int, like: Batch, signature: Signature | None, graphs: _Graphs
    ) -> bool:
        """Whether there is a graph, now at least. If the device has no memory for it none is
        captured any more: what a failed capture leaves behind is torch's own."""
        if bucket in graphs.captured:
            return True
        if self._is_full:
            return False
        try:
            graphs.captured[bucket] = self._capture(bucket, like, signature, graphs)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            self._is_full = True
            log.warning(
                "no more decode steps are captured as graphs rows=%d reason=%r",
                bucket,
                f"out of memory: {memory_report(self._device)}",
            )
        return not self._is_full

    def _capture(
        self, bucket: int, like: Batch, signature: Signature | None, graphs: _Graphs
    ) -> _Captured:
        host = _padding(bucket)
        packed = pack(host, is_pinned=False).to(self._device)
        token_ids, positions, slots, logit_rows, starts, contexts = views(packed, host)
        table = self._page_table[:bucket]
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
        captured.packed.copy_(source, non_blocking=True)
        wide = self._page_table[:num_rows, : table.shape[1]]
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


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the allocator found none: when a capture ends early torch raises what follows from
    that, and a driver without memory says so in words."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__context__
    return False


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
