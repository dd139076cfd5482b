"""Who runs in the next step: admission, chunked prefill, preemption, and what a step's end means.

Owns the waiting and running queues and writes every Sequence. Decides through a Policy, takes pages
from Memory; knows nothing about tensors, so it can be simulated. No torch.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.events import ErrorInfo, FinishReason, SequenceEvent
from loraswarm.core.sequence import AdapterKey, Sequence
from loraswarm.engine.holdings import Holdings
from loraswarm.engine.policies import Policy
from loraswarm.engine.sequence_events import error_event, token_event
from loraswarm.engine.step import ChunkResult, PageFill, ScheduledChunk, Step
from loraswarm.engine.step_budget import StepBudget
from loraswarm.engine.supply import AdapterSupply
from loraswarm.memory.adapter_cache import AdapterLoad
from loraswarm.memory.memory import Memory


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most sequences that run, and the most tokens of one step."""

    num_sequences: int
    num_tokens: int

    def __post_init__(self) -> None:
        assert self.num_tokens >= self.num_sequences


class Scheduler:
    """Continuous batching under a budget of tokens a step.

    Invariants: a running sequence has its adapters pinned and pages for its tokens; a waiting one
    has neither, but its adapters are protected where they are. A running sequence whose adapters
    are still being copied into their pages computes nothing until `Memory.adapters` says that they
    are ready. `max_step_tokens >= max_num_sequences`, so that every decode fits a step. A frozen
    sequence keeps its place and what it holds, but computes nothing and does not start.
    """

    def __init__(
        self,
        memory: Memory,
        policy: Policy,
        supply: AdapterSupply,
        limits: StepLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._kv = memory.kv_cache
        self._adapters = memory.adapters
        self._policy = policy
        self._supply = supply
        self._limits = limits
        self._clock = clock
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._holdings = Holdings(memory)
        self._loads: dict[AdapterKey, AdapterLoad] = {}
        self._fills: list[PageFill] = []
        self._ahead: frozenset[Sequence] = frozenset()
        self._ended_ahead: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_asked_tokens = 0
        self.num_prefix_hit_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_frozen(self) -> int:
        return sum(sequence.is_frozen for sequence in self._all())

    @property
    def is_frozen(self) -> bool:
        """Whether all that is here is frozen."""
        return all(sequence.is_frozen for sequence in self._all())

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def max_sequence_tokens(self, infos: Seq[AdapterInfo], num_taken_pages: int = 0) -> int:
        """Tokens of the longest sequence that fits the pool beside its adapters, when
        `num_taken_pages` are taken for good."""
        return self._holdings.max_sequence_tokens(infos, num_taken_pages)

    def add(self, sequence: Sequence, infos: Seq[AdapterInfo]) -> None:
        """Queue a sequence, by its `order`, and the adapters of its mix. It must fit the empty pool
        (`max_sequence_tokens`)."""
        self._holdings.open(sequence, infos)
        self._queue(sequence)

    def freeze(self, request_id: str) -> Sequence | None:
        """Plan a sequence no more until `thaw`; None if it is not here.

        If a decode finds no pages it is the first to give way: whoever froze it has what it loses.
        """
        sequence = self._find(request_id)
        if sequence is not None:
            assert sequence not in self._ahead, "a step is under way that computes it"
            sequence.is_frozen = True
        return sequence

    def thaw(self, request_id: str) -> bool:
        """Go on with a frozen sequence; False if it is not here or not frozen."""
        sequence = self._find(request_id)
        if sequence is None or not sequence.is_frozen:
            return False
        sequence.is_frozen = False
        return True

    def abort(self, request_id: str) -> SequenceEvent | None:
        """End a request now and free what it holds; None if it is not here (already ended)."""
        sequence = self._find(request_id)
        if sequence is None:
            return None
        self._end(sequence)
        return SequenceEvent(request_id=request_id, finish_reason="abort")

    def abort_all(self) -> list[SequenceEvent]:
        """Abort every request."""
        ids = [sequence.request_id for sequence in self._all()]
        return [event for request_id in ids if (event := self.abort(request_id))]

    def plan(self, only: Container[str] | None = None) -> Step:
        """Choose the next step: decodes first, then prefill chunks, then newcomers.

        With `only`, sequences of those request ids alone compute, unless none of them can: then all
        may, so that those that hold seats or pages cannot keep the others out for ever. The step
        may be empty while adapters are on their way.
        """
        assert not self._ahead, "a step is under way that was foreseen"
        self._loads, self._fills = {}, []
        planned = self._choose(only)
        if not planned and only is not None:
            planned = self._choose(None)
        chunks = tuple(ScheduledChunk(sequence, count) for sequence, count in planned.items())
        loads, dropped = tuple(self._loads.values()), tuple(self._memory.take_dropped())
        return Step(chunks, loads, dropped, tuple(self._fills))

    def _choose(self, only: Container[str] | None) -> dict[Sequence, int]:
        """Sequences of the next step and how many tokens of each."""
        planned: dict[Sequence, int] = {}
        ready = [s for s in self._running if self._is_ready(s) and _may_go_on(s, only)]
        preempted = self._plan_decodes(ready, planned)
        budget = StepBudget(self._limits.num_tokens - len(planned))
        for sequence in ready:
            if sequence not in planned and sequence not in preempted:
                budget.plan(sequence, planned)
        if not preempted:
            self._admit(planned, budget, only)
        return planned

    def try_extend(self, step: Step) -> bool:
        """Take pages for a step that was foreseen while the one before it runs: free pages alone.

        False, and nothing changed, if it is not what `plan` would choose, or free pages are short.
        Until `settle` its sequences keep what they hold, also if they end.
        """
        has_seat = len(self._running) < self._limits.num_sequences
        may_admit = has_seat and any(not sequence.is_frozen for sequence in self._waiting)
        num_computing = sum(not sequence.is_frozen for sequence in self._running)
        if self._ended_ahead or may_admit or len(step.chunks) != num_computing:
            return False
        ends = [(chunk.sequence.request_id, chunk.end) for chunk in step.chunks]
        num_missing = sum(self._kv.num_missing_pages(*end) for end in ends)
        if num_missing > self._memory.pool.num_free:
            return False
        for end in ends:
            self._kv.reserve(*end)
        self._ahead = frozenset(chunk.sequence for chunk in step.chunks)
        return True

    def settle(self) -> None:
        """No step is under way: what has ended meanwhile gives back what it holds."""
        ended, self._ended_ahead, self._ahead = self._ended_ahead, [], frozenset()
        for sequence in ended:
            self._holdings.give_back(sequence)

    def fail_adapters(self, failures: Mapping[AdapterKey, ErrorInfo]) -> list[SequenceEvent]:
        """End every sequence with an adapter that will never be there."""
        return self._fail(self._all(), failures)

    def fail_waiting(self, key: AdapterKey, error: ErrorInfo) -> list[SequenceEvent]:
        """End the waiting sequences of an adapter that can be brought no more; nothing if it is in
        pages or at hand."""
        if self._adapters.is_resident(key) or self._supply.is_at_hand(key):
            return []
        return self._fail(self._waiting, {key: error})

    def commit(self, step: Step, results: Iterable[ChunkResult]) -> list[SequenceEvent]:
        """Record what the step computed: new tokens, ends, freed pages.

        Of a step that was foreseen, nothing for sequences that have ended since.
        """
        running = set(self._running)
        events = []
        for chunk, result in zip(step.chunks, results, strict=True):
            event = self._commit_chunk(chunk, result) if chunk.sequence in running else None
            if event is not None:
                events.append(event)
        return events

    def open_sequences(self) -> list[tuple[Sequence, bool]]:
        """Every sequence that is not frozen, in order of arrival, and whether it runs."""
        found = [(sequence, True) for sequence in self._running]
        found += [(sequence, False) for sequence in self._waiting]
        computing = [pair for pair in found if not pair[0].is_frozen]
        return sorted(computing, key=lambda pair: pair[0].order)

    def needs(self) -> int:
        """Pages of the sequence here that needs the most, its adapters included."""
        return max(map(self._holdings.num_pages_at_end, self._all()), default=0)

    def adapters_in_use(self) -> tuple[Counter[str], Counter[str]]:
        """Running and waiting sequences by the names of their adapters."""
        queues = self._running, self._waiting
        running, waiting = (Counter(n for s in q for n, _ in s.adapter_keys) for q in queues)
        return running, waiting

    def check(self) -> None:
        """Assert the invariants of the pool, the caches and the queues."""
        self._memory.check()
        for sequence in self._running:
            assert all(self._adapters.is_resident(key) for key in sequence.adapter_keys)
            assert not self._kv.num_missing_pages(sequence.request_id, sequence.num_computed)
        for sequence in self._waiting:
            assert sequence in self._ended_ahead or not self._kv.pages_of(sequence.request_id)
        orders = [sequence.order for sequence in self._waiting]
        assert orders == sorted(orders)

    def _fail(
        self, sequences: Iterable[Sequence], failures: Mapping[AdapterKey, ErrorInfo]
    ) -> list[SequenceEvent]:
        events = []
        for sequence in list(sequences):
            errors = [failures[key] for key in sequence.adapter_keys if key in failures]
            if errors:
                self._end(sequence)
                events.append(error_event(sequence, errors[0]))
        return events

    def _all(self) -> list[Sequence]:
        return [*self._running, *self._waiting]

    def _find(self, request_id: str) -> Sequence | None:
        return next((each for each in self._all() if each.request_id == request_id), None)

    def _is_ready(self, sequence: Sequence) -> bool:
        return all(self._adapters.is_ready(key) for key in sequence.adapter_keys)

    def _plan_decodes(self, ready: Seq[Sequence], planned: dict[Sequence, int]) -> set[Sequence]:
        """Plan one token for each decoding sequence, preempting until the rest has pages."""
        preempted: set[Sequence] = set()
        for sequence in [s for s in ready if s.num_uncomputed == 1]:
            while sequence not in preempted:
                missing = self._kv.num_missing_pages(sequence.request_id, len(sequence.token_ids))
                if missing == 0 or self._memory.make_room(missing) is not None:
                    self._kv.reserve(sequence.request_id, len(sequence.token_ids))
                    planned[sequence] = 1
                    break
                frozen = [each for each in self._running if each.is_frozen]
                victim = self._policy.victim(frozen or self._running)
                self._preempt(victim)
                planned.pop(victim, None)
                preempted.add(victim)
        return preempted

    def _admit(
        self, planned: dict[Sequence, int], budget: StepBudget, only: Container[str] | None
    ) -> None:
        """Start waiting sequences while tokens, seats and pages for their known tokens last.

        One whose adapters are not at hand is passed over; one that does not fit holds up those
        behind it, so that it is not overtaken for ever.
        """
        allowed = [sequence for sequence in self._waiting if _may_go_on(sequence, only)]
        waiting = [sequence for sequence in allowed if self._is_at_hand(sequence)]
        while waiting and not budget.is_spent and len(self._running) < self._limits.num_sequences:
            sequence = self._policy.next_waiting(waiting)
            waiting.remove(sequence)
            if not self._is_at_hand(sequence):
                continue  # an earlier one has taken its pages
            if not self._try_start(sequence):
                return
            if self._is_ready(sequence):
                budget.plan(sequence, planned)

    def _is_at_hand(self, sequence: Sequence) -> bool:
        """Whether its adapters could be copied into pages now; asks for those that could not.

        One whose copy has failed cannot, until all that have pinned it have let it go.
        """
        if any(self._adapters.has_failed(key) for key in sequence.adapter_keys):
            return False
        absent = [
            key
            for key in sequence.adapter_keys
            if not self._adapters.is_resident(key) and not self._supply.is_at_hand(key)
        ]
        for key in absent:
            self._supply.want(key)
        return not absent

    def _try_start(self, sequence: Sequence) -> bool:
        """Let it run with all that it must hold, or change nothing."""
        taken = self._holdings.try_take(sequence)
        if taken is None:
            return False
        self._loads |= {load.info.key: load for load in taken.loads}
        self._fills += taken.fills
        self._waiting.remove(sequence)
        self._running.append(sequence)
        for key in sequence.adapter_keys:
            self._adapters.unprotect(key)
            self._supply.release(key)
        sequence.num_computed, sequence.brought = taken.num_computed, None
        self.num_prefix_asked_tokens += len(sequence.token_ids)
        self.num_prefix_hit_tokens += taken.num_cached
        if sequence.queue_s is None:
            sequence.num_cached = min(taken.num_cached, sequence.num_prompt)
            sequence.queue_s = self._clock() - sequence.arrived_s
        return True

    def _queue(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda waiting: waiting.order)
        for key in sequence.adapter_keys:
            self._adapters.protect(key)
            self._supply.hold(key)

    def _preempt(self, sequence: Sequence) -> None:
        """Back into the queue; what of its K/V is not cached is recomputed from the kept tokens."""
        self._running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        self._queue(sequence)
        self.num_preemptions += 1

    def _commit_chunk(self, chunk: ScheduledChunk, result: ChunkResult) -> SequenceEvent | None:
        sequence = chunk.sequence
        if result.error is not None:
            self._end(sequence)
            return error_event(sequence, result.error)
        sequence.num_computed += chunk.num_tokens
        self._kv.publish(sequence.request_id, sequence.token_ids, sequence.num_computed)
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
        return token_event(sequence, result, reason)

    def _end(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
            for key in sequence.adapter_keys:
                self._adapters.unprotect(key)
                self._supply.release(key)
        self._holdings.close(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence in self._ahead:
            self._ended_ahead.append(sequence)
        else:
            self._holdings.give_back(sequence)


def _may_go_on(sequence: Sequence, only: Container[str] | None) -> bool:
    return not sequence.is_frozen and (only is None or sequence.request_id in only)
