"""Owns the base model and which weights are in use; runs batches over the pages of the pool.

Does not know queues or requests: it is told what to run, and by engine/merging what is merged.
Called by the engine.
"""

from __future__ import annotations

import itertools
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
from loraswarm.memory.tile_store import MergedSites, TileStore
from loraswarm.models.decoder import Decoder
from loraswarm.models.layers.linear import LoraLinear
from loraswarm.models.layers.weight import Weight

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
        """With `graphs` decode steps are replayed, where one has been captured, unless
        `is_switching`: then the weights in use will soon be others."""
        self.decoder = decoder
        self._buffer = buffer
        self._tiles = tiles
        self._graphs = graphs
        self._merged: MergedSites = ()
        self._versions = itertools.count(1)
        self._version = 0
        self.is_switching = False

    @property
    def merged(self) -> MergedSites:
        """By site of the linears, the adapter in the weight in use; () if all are the base's."""
        return self._merged

    def use(self, linear: LoraLinear, weight: Weight | None, key: AdapterKey | None) -> None:
        """Multiply by `weight` from the next batch on, in which adapter `key` is merged; None and
        None: by the base's. A batch that was prepared before must not be run any more."""
        assert (weight is None) == (key is None)
        linear.merged = weight
        sites = list(self._merged) or [None] * self.decoder.shape.num_linears
        sites[linear.sites.start : linear.sites.stop] = [key] * linear.num_parts
        self._merged = tuple(sites) if any(sites) else ()
        self._version = next(self._versions) if self._merged else 0

    def forget(self, dropped: Iterable[AdapterKey]) -> None:
        """These adapters are in their pages no more."""
        for key in dropped:
            self._tiles.drop(key)

    @property
    def buffer(self) -> PageBuffer:
        """The pages, for whoever copies K and V out of them or into them between steps."""
        return self._buffer

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
        return prepare(step.chunks, kv_cache, self._buffer, self._tiles, self._merged)

    @torch.inference_mode()
    def run(self, prepared: PreparedBatch) -> Tensor:
        """Logits [Z, V] float32 of the batch's logit rows; its tokens' K and V are now in pages.

        They are the caller's to change until it calls again.
        """
        batch, device, drawn_ids = prepared.batch, self._buffer.pool.device, prepared.drawn_ids
        logits_ZV = None
        if self._graphs is not None and not self.is_switching:
            logits_ZV = self._graphs.try_run(batch, self._version, drawn_ids)
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
