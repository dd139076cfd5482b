"""From a request and its described adapters to a sequence, or to the reason why there is none.

Knows what can never fit the context or the pool; queues nothing. Used by the engine.
"""

from __future__ import annotations

from collections.abc import Callable

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.client import EngineInfo
from loraswarm.core.request import Request, check_context
from loraswarm.core.sequence import Sequence
from loraswarm.engine.adoption import check_adapters, restore_
from loraswarm.engine.arrivals import Arrival
from loraswarm.engine.mixing import first_adapted, resolve_mix
from loraswarm.engine.scheduler import Scheduler
from loraswarm.errors import InvalidRequest


class SequenceMaker:
    """The rules of one engine; `num_taken_pages` are those that operators have pinned."""

    def __init__(
        self, info: EngineInfo, scheduler: Scheduler, num_taken_pages: Callable[[], int]
    ) -> None:
        self._info = info
        self._scheduler = scheduler
        self._num_taken_pages = num_taken_pages

    def check(self, request: Request) -> None:
        """Raise InvalidRequest for what can never be served, whatever the adapters are."""
        if not request.prompt_token_ids:
            raise InvalidRequest("prompt is empty; it must have at least one token", "prompt")
        num_prompt = len(request.prompt_token_ids)
        check_context(num_prompt, request.params.max_tokens, self._info.max_model_len)
        _check_token_ids(request, self._info.vocab_size)

    def make(self, arrival: Arrival) -> tuple[Sequence, list[AdapterInfo]]:
        """The sequence and the adapters that it uses: none, if they act on no token of it.

        Raises   InvalidRequest if the adapters cannot be combined, it can never fit with them, or
                 they are not those of its snapshot.
        """
        request, params = arrival.request, arrival.request.params
        named = infos = [entry.info for entry in arrival.entries if entry.info is not None]
        weights = [weight for _, weight in request.weighted_adapters] if infos else []
        mix = resolve_mix(infos, weights)
        start = first_adapted(infos, request.prompt_token_ids)
        if start is None:
            infos, mix, start = [], (), 0
        max_tokens = self._check_lengths(request, infos)
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= frozenset(self._info.end_token_ids)
        sequence = Sequence(
            request=request,
            mix=mix,
            seed=arrival.seed,
            max_tokens=max_tokens,
            end_token_ids=frozenset(ends),
            first_adapted=start,
            order=arrival.order,
            arrived_s=arrival.arrived_s,
            is_frozen=arrival.is_frozen,
        )
        if arrival.snapshot is not None:
            check_adapters(arrival.snapshot, infos, named)
            restore_(sequence, arrival.snapshot)
        return sequence, infos

    def _check_lengths(self, request: Request, infos: list[AdapterInfo]) -> int:
        """The most tokens the request may generate; raises if it can never fit."""
        num_prompt = len(request.prompt_token_ids)
        max_len = self._info.max_model_len
        pool_len = self._scheduler.max_sequence_tokens(infos, self._num_taken_pages())
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
