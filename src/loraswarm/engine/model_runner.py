"""Owns the base model; runs batches over the pages of the pool.

Does not know queues or requests: it is told what to run. Called by the engine.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.prepare import PreparedBatch, prepare
from loraswarm.engine.step import Step
from loraswarm.memory.kv_cache import KVCache
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_store import TileStore
from loraswarm.models.decoder import Decoder


class ModelRunner:
    """The base model, the page buffer and the tiles in it, on one device."""

    def __init__(self, decoder: Decoder, buffer: PageBuffer, tiles: TileStore) -> None:
        self.decoder = decoder
        self._buffer = buffer
        self._tiles = tiles

    def forget(self, dropped: Iterable[AdapterKey]) -> None:
        """These adapters are in their pages no more."""
        for key in dropped:
            self._tiles.drop(key)

    def prepare(self, step: Step, kv_cache: KVCache) -> PreparedBatch:
        """The tensors of the step's forward pass."""
        return prepare(step.chunks, kv_cache, self._buffer, self._tiles)

    @torch.inference_mode()
    def run(self, prepared: PreparedBatch) -> Tensor:
        """Logits [Z, V] float32 of the batch's logit rows; its tokens' K and V are now in pages."""
        return self.decoder.forward(prepared.batch)
