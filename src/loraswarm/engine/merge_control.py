"""Joins a merge policy to an engine: shows it what is open, has the merger do what it wants, and
tells it what steps took.

Decides nothing itself. Called by the engine before and after each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from loraswarm.core.sequence import AdapterKey, Sequence
from loraswarm.core.step_cost import ChunkWork, StepWork
from loraswarm.engine.merging import Merger
from loraswarm.engine.policies.merging import MergePolicy, MergeView, OpenRequest, StepSeen
from loraswarm.engine.scheduler import Scheduler, StepLimits
from loraswarm.engine.step import Step


@dataclass(frozen=True, slots=True)
class MergeFacts:
    """What a policy is told of an engine beside its requests.

    `bytes_of` are an adapter's bytes in pages that can be merged; None for one that is served no
    more, and for one that has none. `kv_token_bytes` are K and V of a token.
    """

    limits: StepLimits
    kv_token_bytes: int
    bytes_of: Callable[[AdapterKey], int | None]


class MergeControl:
    """One policy, carried out on one engine's merger."""

    def __init__(
        self, policy: MergePolicy, merger: Merger, scheduler: Scheduler, facts: MergeFacts
    ) -> None:
        self._policy = policy
        self._merger = merger
        self._scheduler = scheduler
        self._facts = facts
        self._switch_s = 0.0
        self._switched_share = 0.0

    def advance(self, budget_s: float) -> frozenset[str] | None:
        """Ask the policy and work towards its target for about so long.

        Returns the ids of the requests that alone may compute in the next step; None: all.
        """
        merger, begin_s = self._merger, time.perf_counter()
        target, before = merger.target, merger.share_merged
        requests = self._requests()
        only = None
        if requests:
            decision = self._policy.decide(self._view(requests))
            merger.set_target(decision.target)
            only = decision.only
        merger.advance(budget_s)
        self._switch_s = time.perf_counter() - begin_s
        kept = before if merger.target == target else 0.0
        self._switched_share = merger.share_merged - kept
        return only

    def saw_step(self, step: Step, seconds: float) -> None:
        """A step was taken, and has not been committed."""
        merger = self._merger
        share, merged = merger.share_merged, merger.target
        hot = (merged, 1.0)
        num_hot = sum(c.num_tokens for c in step.chunks if c.sequence.mix == (hot,))
        work = StepWork.of(
            (self._work_of(chunk.sequence, chunk.num_tokens, chunk.begin) for chunk in step.chunks),
            self._facts.kv_token_bytes,
        )
        self._policy.saw_step(
            StepSeen(
                work=work,
                seconds=seconds,
                num_hot_tokens=num_hot if share > 0.0 else 0,
                merged_bytes=self._bytes_of(merged) if merged is not None and share > 0.0 else 0,
                merged_share=share,
                switch_s=self._switch_s,
                switched_share=self._switched_share,
            )
        )

    def _requests(self) -> tuple[OpenRequest, ...]:
        now_s = time.monotonic()
        return tuple(
            OpenRequest.of(sequence, is_running, now_s)
            for sequence, is_running in self._scheduler.open_sequences()
        )

    def _view(self, requests: tuple[OpenRequest, ...]) -> MergeView:
        merger, share = self._merger, self._merger.share_merged
        keys = {request.adapter for request in requests} | {merger.target}
        sizes = {key: self._facts.bytes_of(key) for key in keys if key is not None}
        return MergeView(
            now_s=time.monotonic(),
            requests=requests,
            mergeable={key: size for key, size in sizes.items() if size is not None},
            num_seats=self._facts.limits.num_sequences,
            max_step_tokens=self._facts.limits.num_tokens,
            target=merger.target,
            merged=merger.target if share > 0.0 else None,
            merged_share=share,
        )

    def _work_of(self, sequence: Sequence, num_tokens: int, num_computed: int) -> ChunkWork:
        return ChunkWork(
            num_tokens=num_tokens,
            num_computed=num_computed,
            adapter=sequence.mix or None,
            adapter_bytes=sum(self._bytes_of(key) for key, _ in sequence.mix),
            samples=num_computed + num_tokens == len(sequence.token_ids),
        )

    def _bytes_of(self, key: AdapterKey) -> int:
        return self._facts.bytes_of(key) or 0
