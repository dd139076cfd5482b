"""Hands requests over to other engines and takes over theirs.

Stops and resumes a request's planning, describes it as a snapshot, and puts a snapshot in line as
one of this engine's own. Two phases: the source keeps a frozen request until it is told to thaw or
to release it, so that there is one owner whatever fails on the way. Called by the engine between
steps; does not know where snapshots go.
"""

from __future__ import annotations

import time
from dataclasses import replace

from loraswarm.core.client import EngineInfo
from loraswarm.core.request import Request
from loraswarm.core.sequence import Sequence
from loraswarm.core.snapshot import KVPages, SequenceSnapshot
from loraswarm.engine.adoption import check_snapshot, request_to_serve
from loraswarm.engine.arrivals import Arrival
from loraswarm.engine.reception import Reception
from loraswarm.engine.scheduler import Scheduler
from loraswarm.engine.step import Step
from loraswarm.memory.kv_cache import KVCache
from loraswarm.memory.page_buffer import PageBuffer


class Migration:
    """Requests of one engine that come from others and go to them."""

    def __init__(
        self,
        info: EngineInfo,
        reception: Reception,
        scheduler: Scheduler,
        kv_cache: KVCache,
        buffer: PageBuffer,
    ) -> None:
        self._info = info
        self._reception = reception
        self._scheduler = scheduler
        self._kv_cache = kv_cache
        self._buffer = buffer
        # Integers and floats of one base have other K and V; what it weighs tells them apart.
        self._layout = f"model={info.model} weight_bytes={info.weight_bytes} {buffer.layout}"

    def freeze(self, request_id: str, with_kv: bool) -> SequenceSnapshot | None:
        """See Engine.freeze; no step may be under way."""
        arrival = self._reception.arrival_of(request_id)
        if arrival is not None:
            arrival.is_frozen = True
            return _snapshot_of_arrival(arrival, with_kv)
        sequence = self._scheduler.freeze(request_id)
        if sequence is None:
            return None
        return _snapshot_of(sequence, self._kv_of(sequence) if with_kv else None)

    def thaw(self, request_id: str) -> bool:
        """See Engine.thaw."""
        arrival = self._reception.arrival_of(request_id)
        if arrival is None:
            return self._scheduler.thaw(request_id)
        was_frozen, arrival.is_frozen = arrival.is_frozen, False
        return was_frozen

    def adopt(self, snapshot: SequenceSnapshot) -> None:
        """See Engine.adopt."""
        check_snapshot(snapshot, self._info, self._layout)
        self._reception.receive(request_to_serve(snapshot), snapshot)

    def fill(self, step: Step) -> None:
        """Write what sequences of the step have brought into their pages."""
        for fill in step.fills:
            self._buffer.write_page(fill.page, fill.data)

    def _kv_of(self, sequence: Sequence) -> KVPages | None:
        """What of its K and V is in pages, or still to go there."""
        num_tokens = sequence.num_computed
        if num_tokens == 0:
            return sequence.brought
        num_pages = -(-num_tokens // self._kv_cache.page_tokens)
        pages = self._kv_cache.pages_of(sequence.request_id)[:num_pages]
        return KVPages(
            layout=self._layout,
            num_tokens=num_tokens,
            pages=tuple(map(self._buffer.read_page, pages)),
        )


def _snapshot_of(sequence: Sequence, kv: KVPages | None) -> SequenceSnapshot:
    has_reported = sequence.num_output > 0
    return SequenceSnapshot(
        request=_fixed(sequence.request, sequence.seed, sequence.max_tokens),
        output_token_ids=tuple(sequence.output_token_ids),
        adapter_digests=tuple(digest for _, digest in sequence.adapter_keys),
        prompt_logprobs=() if has_reported else tuple(sequence.prompt_logprobs),
        waited_s=time.monotonic() - sequence.arrived_s,
        queue_s=sequence.queue_s,
        num_cached_tokens=sequence.num_cached,
        kv=kv,
    )


def _snapshot_of_arrival(arrival: Arrival, with_kv: bool) -> SequenceSnapshot:
    """One that waits for its adapters is as it came, whether from a user or another engine."""
    request = _fixed(arrival.request, arrival.seed, arrival.request.params.max_tokens)
    waited_s = time.monotonic() - arrival.arrived_s
    if arrival.snapshot is None:
        return SequenceSnapshot(request=request, waited_s=waited_s)
    kv = arrival.snapshot.kv if with_kv else None
    return replace(arrival.snapshot, request=request, waited_s=waited_s, kv=kv)


def _fixed(request: Request, seed: int, max_tokens: int | None) -> Request:
    """The request with what an engine chooses: another one would choose otherwise."""
    signed = (seed + 2**63) % 2**64 - 2**63  # draws depend on its lower 64 bits
    return replace(request, params=replace(request.params, seed=signed, max_tokens=max_tokens))
