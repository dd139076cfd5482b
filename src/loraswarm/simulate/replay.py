"""One trace through the engine's scheduler and a merge policy, on a clock that steps push on.

The scheduler, its memory and the policy are the real ones; the model's tokens are made up and a
step takes what the machine's cost model says. Knows nothing about what results are compared with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.sequence import AdapterKey, Sequence
from loraswarm.core.step_cost import ChunkWork, StepWork
from loraswarm.engine.policies import FirstComeFirstServed
from loraswarm.engine.policies.merging import MergePolicy, MergeView, OpenRequest, StepSeen
from loraswarm.engine.scheduler import Scheduler, StepLimits
from loraswarm.engine.step import ChunkResult, Step
from loraswarm.engine.supply import EverythingAtHand
from loraswarm.errors import ConfigError
from loraswarm.memory.memory import Memory, MemoryOptions
from loraswarm.simulate.machine import GEOMETRY, SHAPE, Machine, Switcher
from loraswarm.simulate.traces import Trace, TraceRequest

NUM_PAGES = 21_845  # 4 GiB
LIMITS = StepLimits(num_sequences=32, num_tokens=512)
TOKEN = 1


@dataclass(frozen=True, slots=True)
class Served:
    """A request that has ended."""

    request: TraceRequest
    first_token_s: float
    end_s: float

    @property
    def latency_s(self) -> float:
        return self.end_s - self.request.arrival_s


@dataclass(frozen=True, slots=True)
class TakenStep:
    """A step with nothing merged, by its work; `hot_tokens` are those of each adapter's rows."""

    start_s: float
    end_s: float
    work: StepWork
    hot_tokens: Mapping[AdapterKey, int]


@dataclass(slots=True)
class Run:
    """What came of a trace: requests in the order of their ends, steps in turn."""

    served: list[Served] = field(default_factory=list)
    steps: list[TakenStep] = field(default_factory=list)
    merged_s: float = 0.0
    switch_s: float = 0.0
    num_switches: int = 0


class Replay:
    """One run of a trace; `budget_share` of each step may be spent on switching beside it.

    Raises   ConfigError for a request that the pool cannot hold.
    """

    def __init__(
        self, trace: Trace, machine: Machine, policy: MergePolicy, budget_share: float = 0.1
    ) -> None:
        self._pending = list(reversed(trace.requests))
        self._machine = machine
        self._policy = policy
        self._budget_share = budget_share
        self._infos = {info.name: info for info in machine.infos_of(trace.ranks)}
        self._bytes = {info.key: machine.bytes_of(info) for info in self._infos.values()}
        self._now_s = 0.0
        self._order = 0
        self._open: dict[str, TraceRequest] = {}
        self._first_s: dict[str, float] = {}
        self._switcher = Switcher(machine.merge_s)
        options = MemoryOptions(has_prefix_cache=False, clock=lambda: self._now_s)
        self._memory = Memory.of_pages(NUM_PAGES, SHAPE, GEOMETRY, options)
        self._scheduler = Scheduler(
            self._memory,
            FirstComeFirstServed(),
            EverythingAtHand(),
            LIMITS,
            clock=lambda: self._now_s,
        )
        self._found = Run()
        self._require_fit(trace)

    def run(self) -> Run:
        """Serve every request to its end."""
        while self._pending or self._scheduler.has_work:
            if not self._scheduler.has_work:
                self._now_s = max(self._now_s, self._pending[-1].arrival_s)
            while self._pending and self._pending[-1].arrival_s <= self._now_s:
                self._arrive(self._pending.pop())
            self._step()
        self._scheduler.check()
        self._found.num_switches = self._switcher.total
        return self._found

    def _require_fit(self, trace: Trace) -> None:
        longest: dict[str | None, int] = {}
        for one in trace.requests:
            num_tokens = one.prompt_tokens + one.output_tokens
            longest[one.adapter] = max(num_tokens, longest.get(one.adapter, 0))
        for adapter, num_tokens in longest.items():
            infos = [] if adapter is None else [self._infos[adapter]]
            limit = self._scheduler.max_sequence_tokens(infos)
            if num_tokens > limit:
                raise ConfigError(
                    f"trace {trace.name} has a request of {num_tokens:,} tokens; the simulated pool"
                    f" holds {limit:,} beside its adapter"
                )

    def _arrive(self, request: TraceRequest) -> None:
        request_id = str(self._order)
        infos: list[AdapterInfo] = []
        if request.adapter is not None:
            infos = [self._infos[request.adapter]]
        params = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
        sequence = Sequence(
            request=Request(
                request_id=request_id,
                prompt_token_ids=(TOKEN,) * request.prompt_tokens,
                params=params,
                adapter=request.adapter,
            ),
            mix=tuple((info.key, 1.0) for info in infos),
            seed=0,
            max_tokens=request.output_tokens,
            end_token_ids=frozenset(),
            order=self._order,
            arrived_s=request.arrival_s,
        )
        self._order += 1
        self._open[request_id] = request
        self._scheduler.add(sequence, infos)

    def _step(self) -> None:
        view = self._view()
        decision = self._policy.decide(view)
        assert decision.target is None or decision.target in view.mergeable
        self._switcher.set_target(decision.target)
        step = self._scheduler.plan(decision.only)
        if step.chunks:
            self._run(step)
        for load in step.loads:
            self._memory.adapters.finish_load(load.info.key)
            if not step.chunks:
                self._now_s += self._machine.figures.copy_s(self._bytes[load.info.key])
        assert step.chunks or step.loads, "work is waiting but nothing can run"

    def _view(self) -> MergeView:
        switcher, now_s = self._switcher, self._now_s
        return MergeView(
            now_s=now_s,
            requests=tuple(
                OpenRequest.of(sequence, is_running, now_s)
                for sequence, is_running in self._scheduler.open_sequences()
            ),
            mergeable=self._bytes,
            num_seats=LIMITS.num_sequences,
            max_step_tokens=LIMITS.num_tokens,
            target=switcher.target,
            merged=switcher.merged,
            merged_share=switcher.share,
        )

    def _run(self, step: Step) -> None:
        """Let a step's time pass, and its tokens be there."""
        work, hot_tokens = self._work_of(step)
        switcher, start_s = self._switcher, self._now_s
        merged, share = switcher.merged, switcher.share
        num_hot = hot_tokens[merged] if merged is not None else 0
        num_bytes = self._bytes[merged] if merged is not None else 0
        seconds = self._machine.step_s(work, num_hot, num_bytes, share)
        switch_s, switched = switcher.advance(self._budget_share * seconds)
        self._now_s += seconds + switch_s
        self._found.steps.append(TakenStep(start_s, self._now_s, work, hot_tokens))
        self._found.merged_s += share * (seconds + switch_s)
        self._found.switch_s += switch_s
        self._policy.saw_step(
            StepSeen(
                work=work,
                seconds=seconds,
                num_hot_tokens=num_hot,
                merged_bytes=num_bytes,
                merged_share=share,
                switch_s=switch_s,
                switched_share=switched,
            )
        )
        self._commit(step)

    def _work_of(self, step: Step) -> tuple[StepWork, Counter[AdapterKey]]:
        chunks, hot_tokens = [], Counter[AdapterKey]()
        for chunk in step.chunks:
            keys = chunk.sequence.adapter_keys
            key = keys[0] if keys else None
            if key is not None:
                hot_tokens[key] += chunk.num_tokens
            chunks.append(
                ChunkWork(
                    num_tokens=chunk.num_tokens,
                    num_computed=chunk.sequence.num_computed,
                    adapter=key,
                    adapter_bytes=self._bytes[key] if key is not None else 0,
                    samples=chunk.samples,
                )
            )
        return StepWork.of(chunks, self._machine.figures.kv_token_bytes), hot_tokens

    def _commit(self, step: Step) -> None:
        results = [ChunkResult(TOKEN if chunk.samples else None) for chunk in step.chunks]
        for event in self._scheduler.commit(step, results):
            self._first_s.setdefault(event.request_id, self._now_s)
            if event.finish_reason is not None:
                first_s = self._first_s.pop(event.request_id)
                request = self._open.pop(event.request_id)
                self._found.served.append(Served(request, first_s, self._now_s))
