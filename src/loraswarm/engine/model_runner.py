"""Owns the base model; runs batches over the pages of the pool.

Does not know queues or requests: it is told what to run. Called by the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.prepare import PreparedBatch, prepare
from loraswarm.engine.results import StepResults
from loraswarm.engine.step import Step
from loraswarm.engine.transfer import to_device
from loraswarm.memory.kv_cache import KVCache
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_store import TileStore
from loraswarm.models.decoder import Decoder

if TYPE_CHECKING:
    from loraswarm.engine.graphs import DecodeGraphs


class ModelRunner:
    """The base model, the page buffer and the tiles in it, on one device."""

    def __init__(
        self,
        decoder: Decoder,
        buffer: PageBuffer,
        tiles: TileStore,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """With `graphs` decode steps are replayed, where one has been captured."""
        self.decoder = decoder
        self._buffer = buffer
        self._tiles = tiles
        self._graphs = graphs

    def forget(self, dropped: Iterable[AdapterKey]) -> None:
        """These adapters are in their pages no more."""
        for key in dropped:
            self._tiles.drop(key)

    @property
    def is_beside_host(self) -> bool:
        """Whether the device computes while the host goes on."""
        return self._buffer.pool.device.type == "cuda"

    def launch(
        self, step: Step, kv_cache: KVCache, before: StepResults | None = None
    ) -> StepResults:
        """Begin a step, and wait for nothing where the device computes beside the host.

        One that was foreseen takes its tokens from `before`, in the same order, on the device.
        """
        prepared = self.prepare(step, kv_cache)
        if before is not None:
            prepared = replace(prepared, drawn_ids=before.draw())
        return StepResults(self.run(prepared), prepared.rows)

    def prepare(self, step: Step, kv_cache: KVCache) -> PreparedBatch:
        """The tensors of the step's forward pass."""
        return prepare(step.chunks, kv_cache, self._buffer, self._tiles)

    @torch.inference_mode()
    def run(self, prepared: PreparedBatch) -> Tensor:
        """Logits [Z, V] float32 of the batch's logit rows; its tokens' K and V are now in pages.

        They are the caller's to change until it calls again.
        """
        batch, device, drawn_ids = prepared.batch, self._buffer.pool.device, prepared.drawn_ids
        logits_ZV = self._graphs.try_run(batch, drawn_ids) if self._graphs is not None else None
        if logits_ZV is not None:
            return logits_ZV
        if device.type == "cuda":
            batch = to_device(batch, device)
        if drawn_ids is not None:
            batch = replace(batch, token_ids=drawn_ids)
        logits_ZV = self.decoder.forward(batch)
        if device.type == "cpu":
            return logits_ZV
        if len(logits_ZV) == 0:  # nobody waits for them, and pages may be given away next
            torch.cuda.current_stream(device).synchronize()
        return logits_ZV
