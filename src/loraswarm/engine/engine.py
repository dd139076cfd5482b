"""The loop: plan a step, load adapters, run the model, draw tokens, commit.

Accepts and aborts requests, resolves adapter names, and turns everything that happens into events.
Built by engine/setup; driven by LLM in this process or by engine/child in its own.
"""

from __future__ import annotations

import random

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.adapters.catalog import Catalog
from loraswarm.core.client import EngineInfo, EngineStats
from loraswarm.core.events import ErrorInfo, SequenceEvent
from loraswarm.core.request import Request, check_context
from loraswarm.core.sequence import AdapterKey, Sequence
from loraswarm.engine.mixing import first_adapted, resolve_mix
from loraswarm.engine.model_runner import ModelRunner
from loraswarm.engine.results import chunk_results
from loraswarm.engine.scheduler import Scheduler
from loraswarm.engine.step import Step
from loraswarm.errors import InvalidRequest
from loraswarm.memory.memory import Memory


class Engine:
    """One base model, one page pool, any number of adapters; one thread drives it."""

    def __init__(
        self,
        info: EngineInfo,
        catalog: Catalog,
        runner: ModelRunner,
        memory: Memory,
        scheduler: Scheduler,
        seed: int | None,
    ) -> None:
        self.info = info
        self._catalog = catalog
        self._runner = runner
        self._memory = memory
        self._scheduler = scheduler
        self._random = random.Random(seed)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises   InvalidRequest, UnknownAdapter or AdapterError at once if it can never be served;
                 nothing else is touched.
        """
        infos = [self._catalog.resolve(name) for name, _ in request.weighted_adapters]
        mix = resolve_mix(infos, [weight for _, weight in request.weighted_adapters])
        start = first_adapted(infos, request.prompt_token_ids)
        if start is None:
            infos, mix, start = [], (), 0
        max_tokens = self._check_lengths(request, infos)
        _check_token_ids(request, self.info.vocab_size)
        params = request.params
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= frozenset(self.info.end_token_ids)
        sequence = Sequence(
            request=request,
            mix=mix,
            seed=params.seed if params.seed is not None else self._random.getrandbits(64),
            max_tokens=max_tokens,
            end_token_ids=frozenset(ends),
            first_adapted=start,
        )
        self._scheduler.add(sequence, infos)

    def abort(self, request_id: str) -> SequenceEvent | None:
        """End a request; returns its terminal event, or None if it has already ended."""
        return self._scheduler.abort(request_id)

    def abort_all(self) -> list[SequenceEvent]:
        """End every request."""
        return self._scheduler.abort_all()

    def step(self) -> list[SequenceEvent]:
        """Advance every scheduled request by one chunk or token; returns what happened."""
        step = self._scheduler.plan()
        events: list[SequenceEvent] = []
        try:
            failures = self._runner.load(step)
        except BaseException as error:
            self._scheduler.fail_adapters(step, _unloaded(step, error))
            raise
        if failures:
            step, events = self._scheduler.fail_adapters(step, failures)
        if not step.chunks:
            return events
        prepared = self._runner.prepare(step, self._memory.kv_cache)
        logits_ZV = self._runner.run(prepared)
        return events + self._scheduler.commit(step, chunk_results(logits_ZV, prepared.rows))

    def stats(self) -> EngineStats:
        """Counts of requests, pages and adapters at this moment."""
        return EngineStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_free_pages=self._memory.pool.num_free,
            num_kv_pages=self._memory.pool.num_owned("kv"),
            num_adapter_pages=self._memory.pool.num_owned("adapter"),
            num_pinned_adapters=self._memory.adapters.num_pinned,
            num_resident_adapters=self._memory.adapters.num_resident,
        )

    def check(self) -> None:
        """Assert the invariants of pool, caches and queues (for tests and idle moments)."""
        self._scheduler.check()

    def _check_lengths(self, request: Request, infos: list[AdapterInfo]) -> int:
        """The most tokens the request may generate; raises if it can never fit."""
        num_prompt = len(request.prompt_token_ids)
        max_len = self.info.max_model_len
        pool_len = self._scheduler.max_sequence_tokens(infos)
        if num_prompt == 0:
            raise InvalidRequest("prompt is empty; it must have at least one token", "prompt")
        check_context(num_prompt, request.params.max_tokens, max_len)
        total = num_prompt + (request.params.max_tokens or 0)
        is_scored_only = request.params.max_tokens == 0
        if total > pool_len or num_prompt + (not is_scored_only) > pool_len:
            names = ", ".join(repr(info.name) for info in infos)
            beside = f" beside adapter {names}" if infos else ""
            raise InvalidRequest(
                f"prompt ({num_prompt:,} tokens) and max_tokens ({total - num_prompt:,}) need "
                f"{total:,} tokens of K/V; the page pool holds {pool_len:,}{beside} (--pool-bytes)",
                "prompt",
            )
        if request.params.max_tokens is not None:
            return request.params.max_tokens
        room = min(max_len, pool_len) - num_prompt
        if request.params.min_tokens > room:
            raise InvalidRequest(
                f"min_tokens is {request.params.min_tokens:,}; after a prompt of {num_prompt:,} "
                f"tokens there is room for {room:,}",
                "min_tokens",
            )
        return room


def _unloaded(step: Step, error: BaseException) -> dict[AdapterKey, ErrorInfo]:
    """Every load of a step whose loading was cut short; none may count as resident."""
    reason = ErrorInfo(f"loading was cut short: {error!r}", "engine_error", 500)
    return {load.info.key: reason for load in step.loads}


def _check_token_ids(request: Request, vocab_size: int) -> None:
    params = request.params
    for name, ids in (
        ("prompt", request.prompt_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
    ):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"{name} has token id {token_id}; the vocabulary has {vocab_size:,}", name
                )
