"""Owns the base model and the bytes of the page pool; writes adapters into pages, runs batches.

Does not know queues or requests: it is told what to load and what to run. Called by the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from loraswarm.adapters.adapter import Adapter, AdapterInfo, BaseWeights
from loraswarm.core.events import ErrorInfo
from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.prepare import PreparedBatch, prepare
from loraswarm.engine.step import Step
from loraswarm.errors import EngineError, LoRASwarmError
from loraswarm.memory.kv_cache import KVCache
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_store import TileStore
from loraswarm.models.decoder import Decoder

AdapterReader = Callable[[AdapterInfo, BaseWeights, torch.dtype], Adapter]
_logger = logging.getLogger(__name__)


class ModelRunner:
    """The base model, the page buffer and the tiles in it, on one device."""

    def __init__(
        self, decoder: Decoder, buffer: PageBuffer, tiles: TileStore, read_adapter: AdapterReader
    ) -> None:
        self._decoder = decoder
        self._buffer = buffer
        self._tiles = tiles
        self._read_adapter = read_adapter

    def load(self, step: Step) -> dict[AdapterKey, ErrorInfo]:
        """Carry out the step's evictions and loads; returns the loads that failed, with why."""
        for key in step.evicted:
            self._tiles.drop(key)
        failures: dict[AdapterKey, ErrorInfo] = {}
        for load in step.loads:
            try:
                adapter = self._read_adapter(load.info, self._decoder, self._buffer.pool.dtype)
                self._tiles.load(load, adapter)
            except Exception as error:  # whatever is in a file, it must harm its own requests only
                failures[load.info.key] = _error_info(load.info, error)
        return failures

    def prepare(self, step: Step, kv_cache: KVCache) -> PreparedBatch:
        """The tensors of the step's forward pass."""
        return prepare(step.chunks, kv_cache, self._buffer, self._tiles)

    @torch.inference_mode()
    def run(self, prepared: PreparedBatch) -> Tensor:
        """Logits [Z, V] float32 of the batch's logit rows; its tokens' K and V are now in pages."""
        return self._decoder.forward(prepared.batch)


def _error_info(info: AdapterInfo, error: Exception) -> ErrorInfo:
    """What the adapter's requests are told; a bug of ours goes to the log with its traceback."""
    if isinstance(error, LoRASwarmError):
        return ErrorInfo(str(error), error.error_type, error.http_status)
    _logger.error("adapter not loaded name=%r path=%r", info.name, str(info.path), exc_info=error)
    message = f"adapter {info.name!r} could not be loaded: {type(error).__name__} (see the log)"
    return ErrorInfo(message, EngineError.error_type, EngineError.http_status)
