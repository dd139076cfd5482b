"""Who runs in the next step: admission, chunked prefill, preemption, and what a step's end means.

Owns the waiting and running queues and writes every Sequence. Decides through a Policy, takes pages
from KVCache and AdapterCache; knows nothing about tensors, so it can be simulated. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.events import ErrorInfo, FinishReason, SequenceEvent
from loraswarm.core.sequence import AdapterKey, Sequence
from loraswarm.engine.policies import Policy
from loraswarm.engine.step import ChunkResult, ScheduledChunk, Step
from loraswarm.errors import InvalidRequest
from loraswarm.memory.adapter_cache import AdapterLoad
from loraswarm.memory.memory import Memory


class Scheduler:
    """Continuous batching under a budget of tokens a step.

    Invariants: a running sequence has its adapters pinned and pages for its tokens; a waiting one
    has neither. `max_step_tokens >= max_num_sequences`, so that every decode fits a step.
    """

    def __init__(
        self,
        memory: Memory,
        policy: Policy,
        max_num_sequences: int,
        max_step_tokens: int,
    ) -> None:
        assert max_step_tokens >= max_num_sequences
        self._pool = memory.pool
        self._kv = memory.kv_cache
        self._adapters = memory.adapters
        self._policy = policy
        self._max_num_sequences = max_num_sequences
        self._max_step_tokens = max_step_tokens
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._infos: dict[str, tuple[AdapterInfo, ...]] = {}
        self._loads: dict[AdapterKey, AdapterLoad] = {}
        self._evicted: list[AdapterKey] = []
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def max_sequence_tokens(self, infos: Seq[AdapterInfo]) -> int:
        """Tokens of the longest sequence that fits the whole pool beside its adapters."""
        adapter_pages = sum(self._adapters.num_pages(info) for info in infos)
        return max(0, self._pool.num_pages - adapter_pages) * self._kv.page_tokens

    def add(self, sequence: Sequence, infos: Seq[AdapterInfo]) -> None:
        """Queue a sequence and the adapters of its mix. It must fit the empty pool
        (`max_sequence_tokens`)."""
        assert sequence.adapter_keys == tuple(info.key for info in infos)
        if any(other.request_id == sequence.request_id for other in self._all()):
            raise InvalidRequest(f"request id {sequence.request_id!r} is already in use")
        self._infos[sequence.request_id] = tuple(infos)
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> SequenceEvent | None:
        """End a request now and free what it holds; None if it is not here (already ended)."""
        for sequence in self._all():
            if sequence.request_id == request_id:
                self._end(sequence)
                return SequenceEvent(request_id=request_id, finish_reason="abort")
        return None

    def abort_all(self) -> list[SequenceEvent]:
        """Abort every request."""
        ids = [sequence.request_id for sequence in self._all()]
        return [event for request_id in ids if (event := self.abort(request_id))]

    def plan(self) -> Step:
        """Choose the next step: decodes first, then prefill chunks, then newcomers."""
        self._loads, self._evicted = {}, []
        planned: dict[Sequence, int] = {}
        preempted = self._plan_decodes(planned)
        budget = self._max_step_tokens - len(planned)
        for sequence in self._running:
            if sequence not in planned and budget > 0:
                planned[sequence] = min(sequence.num_uncomputed, budget)
                budget -= planned[sequence]
        if not preempted:
            self._admit(planned, budget)
        chunks = tuple(ScheduledChunk(sequence, count) for sequence, count in planned.items())
        assert chunks or not self.has_work, "work is waiting but nothing can run"
        return Step(chunks, tuple(self._loads.values()), tuple(self._evicted))

    def fail_adapters(
        self, step: Step, failures: Mapping[AdapterKey, ErrorInfo]
    ) -> tuple[Step, list[SequenceEvent]]:
        """End every sequence with an adapter that could not be loaded; returns the step without
        them."""
        events = []
        for sequence in self._all():
            errors = [failures[key] for key in sequence.adapter_keys if key in failures]
            if errors:
                self._end(sequence)
                events.append(_error_event(sequence, errors[0]))
        for key in failures:
            self._adapters.discard(key)
        chunks = tuple(
            chunk for chunk in step.chunks if not failures.keys() & set(chunk.sequence.adapter_keys)
        )
        loads = tuple(load for load in step.loads if load.info.key not in failures)
        return Step(chunks, loads, step.evicted), events

    def commit(self, step: Step, results: Iterable[ChunkResult]) -> list[SequenceEvent]:
        """Record what the step computed: new tokens, ends, freed pages."""
        events = []
        for chunk, result in zip(step.chunks, results, strict=True):
            event = self._commit_chunk(chunk, result)
            if event is not None:
                events.append(event)
        return events

    def check(self) -> None:
        """Assert the invariants of the pool, the caches and the queues."""
        self._pool.check()
        self._adapters.check()
        for sequence in self._running:
            assert all(self._adapters.is_resident(key) for key in sequence.adapter_keys)
            assert not self._kv.num_missing_pages(sequence.request_id, sequence.num_computed)
        for sequence in self._waiting:
            assert not self._kv.pages_of(sequence.request_id)

    def _all(self) -> list[Sequence]:
        return [*self._running, *self._waiting]

    def _plan_decodes(self, planned: dict[Sequence, int]) -> bool:
        """Plan one token for each decoding sequence, preempting until the rest has pages."""
        preempted: set[Sequence] = set()
        for sequence in [s for s in self._running if s.num_uncomputed == 1]:
            while sequence not in preempted:
                missing = self._kv.num_missing_pages(sequence.request_id, len(sequence.token_ids))
                if missing == 0 or self._make_room(missing):
                    self._kv.reserve(sequence.request_id, len(sequence.token_ids))
                    planned[sequence] = 1
                    break
                victim = self._policy.victim(self._running)
                self._preempt(victim)
                planned.pop(victim, None)
                preempted.add(victim)
        return bool(preempted)

    def _admit(self, planned: dict[Sequence, int], budget: int) -> None:
        """Start waiting sequences while tokens, seats and pages for their known tokens last."""
        while self._waiting and budget > 0 and len(self._running) < self._max_num_sequences:
            sequence = self._policy.next_waiting(self._waiting)
            if not self._try_start(sequence):
                return
            planned[sequence] = min(sequence.num_uncomputed, budget)
            budget -= planned[sequence]

    def _try_start(self, sequence: Sequence) -> bool:
        """Pin the adapters and take pages for all known tokens and one more, or change nothing."""
        infos = self._infos[sequence.request_id]
        resident = [info for info in infos if self._adapters.is_resident(info.key)]
        absent = [info for info in infos if info not in resident]
        num_tokens = min(len(sequence.token_ids) + 1, sequence.num_prompt + sequence.max_tokens)
        num_kv_pages = self._kv.num_missing_pages(sequence.request_id, num_tokens)
        num_pages = sum(self._adapters.num_load_pages(info) for info in absent) + num_kv_pages
        for info in resident:
            self._adapters.pin(info)
        if not self._has_room(num_pages):
            for info in resident:
                self._adapters.unpin(info.key)
            return False
        self._make_room(num_kv_pages)
        self._kv.reserve(sequence.request_id, num_tokens)
        for info in absent:
            load, evicted = self._adapters.pin_evicting(info)
            assert load is not None
            self._loads[info.key] = load
            self._evicted += evicted
        self._waiting.remove(sequence)
        self._running.append(sequence)
        return True

    def _has_room(self, num_pages: int) -> bool:
        """Whether `num_pages` are free, or would be without the idle adapters."""
        missing = num_pages - self._pool.num_free
        return missing <= 0 or self._adapters.num_idle_pages() >= missing

    def _make_room(self, num_pages: int) -> bool:
        """Evict idle adapters until `num_pages` are free; evicts none if that cannot suffice."""
        if not self._has_room(num_pages):
            return False
        self._evicted += self._adapters.evict_idle(num_pages)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; K/V is recomputed later from the kept tokens."""
        self._running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        self._waiting.insert(0, sequence)
        self.num_preemptions += 1

    def _commit_chunk(self, chunk: ScheduledChunk, result: ChunkResult) -> SequenceEvent | None:
        sequence = chunk.sequence
        if result.error is not None:
            self._end(sequence)
            return _error_event(sequence, result.error)
        sequence.num_computed += chunk.num_tokens
        sequence.prompt_logprobs.extend(result.prompt_logprobs)
        if sequence.num_uncomputed > 0:
            return None
        may_end = sequence.may_end
        if result.token_id is not None:
            sequence.token_ids.append(result.token_id)
        reason: FinishReason | None = None
        if may_end and result.token_id in sequence.end_token_ids:
            reason = "stop"
        elif sequence.num_output >= sequence.max_tokens:
            reason = "length"
        if reason is not None:
            self._end(sequence)
        return _token_event(sequence, result, reason)

    def _end(self, sequence: Sequence) -> None:
        queue = self._running if sequence in self._running else self._waiting
        queue.remove(sequence)
        if queue is self._running:
            self._release(sequence)
        self._infos.pop(sequence.request_id, None)

    def _release(self, sequence: Sequence) -> None:
        self._kv.free(sequence.request_id)
        for key in sequence.adapter_keys:
            self._adapters.unpin(key)


def _error_event(sequence: Sequence, error: ErrorInfo) -> SequenceEvent:
    return SequenceEvent(request_id=sequence.request_id, finish_reason="error", error=error)


def _token_event(
    sequence: Sequence, result: ChunkResult, reason: FinishReason | None
) -> SequenceEvent:
    """The event of a chunk that reached the last known token; prompt logprobs go with the first."""
    is_first = sequence.num_output == (result.token_id is not None)
    return SequenceEvent(
        request_id=sequence.request_id,
        token_ids=() if result.token_id is None else (result.token_id,),
        logprobs=(result.logprob,) if result.logprob is not None else None,
        prompt_logprobs=tuple(sequence.prompt_logprobs) or None if is_first else None,
        finish_reason=reason,
        stop_token_id=result.token_id if reason == "stop" else None,
    )
