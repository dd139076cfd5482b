"""The requests that the front has accepted and not yet ended: what each was sent, and who has it.

Owns the requests' places in the ClusterView and which events a client still lacks. Knows no
replica. Written by the front's streams, read by moving and the controller.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from loraswarm.cluster.view import ClusterView, RoutedRequest
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request

FIRST_GUESS_TOKENS = 128
LENGTH_MEMORY = 0.98


@dataclass(frozen=True, slots=True)
class Handover:
    """The stream of the replica that has adopted a request, from token `num_tokens` on."""

    stream: AsyncGenerator[SequenceEvent, None]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Pause:
    """The time without a token that a move makes for a client, from `begin_s` on: `num_tokens` have
    their K and V brought (`with_kv`) or computed again."""

    begin_s: float
    num_tokens: int
    with_kv: bool


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request on its way to a client.

    `request` has a seed, so that whoever computes it draws the same tokens. `token_ids` are those
    that its client has. `replica_id` is its one owner; None while it has none. `digests` are the
    contents of its adapters that they were computed with, None if that is not known. `num_losses`
    replicas in turn have died with it without a token in between. `settled` is clear while it is
    being moved: then nobody else decides who has it next. `is_arriving` while it goes on from a
    snapshot without a token yet; `refused_by` are replicas that have refused to. `pause` lasts
    until the next token.
    """

    request: Request
    expected_tokens: int
    arrived_s: float
    token_ids: list[int] = field(default_factory=list)
    digests: tuple[str, ...] | None = None
    replica_id: str | None = None
    sent_s: float = 0.0
    has_begun: bool = False
    is_open: bool = True
    num_losses: int = 0
    num_tokens_at_loss: int = 0
    handover: Handover | None = None
    pause: Pause | None = None
    is_arriving: bool = False
    refused_by: set[str] = field(default_factory=set)
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.settled.set()

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def take(self, event: SequenceEvent) -> SequenceEvent:
        """Note what the client is about to get; what it has already is left out."""
        self.token_ids.extend(event.token_ids)
        if self.has_begun:
            facts = event.prompt_logprobs, event.num_cached_tokens, event.queue_s
            if facts != (None, None, None):
                return dataclasses.replace(
                    event, prompt_logprobs=None, num_cached_tokens=None, queue_s=None
                )
            return event
        self.has_begun = bool(event.token_ids) or event.prompt_logprobs is not None
        if event.queue_s is not None:
            before_s = self.sent_s - self.arrived_s
            return dataclasses.replace(event, queue_s=event.queue_s + before_s)
        return event


class OpenRequests:
    """All open requests by id; keeps the view's replicas true about them."""

    def __init__(self, view: ClusterView, seeds: random.Random) -> None:
        """`seeds` gives one to each request that has none. `on_pause`, which may be set later, is
        told the seconds of each pause."""
        self.on_pause: Callable[[Pause, float], None] = lambda pause, seconds: None
        self._view = view
        self._seeds = seeds
        self._held: dict[str, OpenRequest] = {}
        self._mean_tokens = float(FIRST_GUESS_TOKENS)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, request_id: str) -> OpenRequest | None:
        return self._held.get(request_id)

    def open(self, request: Request) -> OpenRequest:
        """Accept it and fix its seed. Raises ValueError if its id is in use."""
        if request.request_id in self._held:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        params = request.params
        if params.seed is None:
            # Of a range that a client's own may have.
            params = dataclasses.replace(params, seed=self._seeds.getrandbits(63))
            request = dataclasses.replace(request, params=params)
        expected = max(1, round(self._mean_tokens))
        if params.max_tokens is not None:
            expected = min(expected, params.max_tokens)
        held = OpenRequest(request, expected, asyncio.get_running_loop().time())
        self._held[request.request_id] = held
        return held

    def close(self, held: OpenRequest) -> None:
        """Its client has its end, or has gone."""
        held.is_open = False
        self.displace(held)
        del self._held[held.request_id]
        if held.token_ids:
            new = (1 - LENGTH_MEMORY) * len(held.token_ids)
            self._mean_tokens = LENGTH_MEMORY * self._mean_tokens + new

    def routed(self, held: OpenRequest) -> RoutedRequest:
        """As the policies see it, wherever it goes next: all its tokens are still to be computed,
        but for those that a K/V transfer brings."""
        num_prompt, num_output = len(held.request.prompt_token_ids), len(held.token_ids)
        return RoutedRequest(
            request_id=held.request_id,
            adapters=tuple(name for name, _ in held.request.weighted_adapters),
            prompt_tokens=num_prompt,
            expected_tokens=held.expected_tokens,
            prefill_tokens=num_prompt + num_output,
            output_tokens=num_output,
            arrived_s=held.arrived_s,
        )

    def place(self, held: OpenRequest, routed: RoutedRequest, replica_id: str) -> None:
        """`replica_id` has it from now on, and nobody else."""
        self._give(held, routed, replica_id)
        held.is_arriving = bool(held.token_ids)
        held.sent_s = asyncio.get_running_loop().time()

    def displace(self, held: OpenRequest) -> None:
        """Nobody has it; what its replica's view still counts of it goes."""
        replica = self._view.replicas.get(held.replica_id or "")
        if replica is not None and held.request_id in replica.requests:
            replica.remove(held.request_id)
        held.replica_id = held.pause = None

    def hand_over(
        self, held: OpenRequest, replica_id: str, handover: Handover, pause: Pause
    ) -> None:
        """It was adopted: `replica_id` has it, and its client reads on there."""
        routed = self.routed(held)
        routed.prefill_tokens = 0
        self._give(held, routed, replica_id)
        held.handover = handover
        if held.token_ids:  # one that has not started may wait for a seat
            held.pause = pause

    def take(self, held: OpenRequest, event: SequenceEvent) -> SequenceEvent:
        """As OpenRequest.take; the owner's view counts the tokens."""
        if event.token_ids:
            held.is_arriving = False
            self._end_pause(held)
        if event.token_ids and held.replica_id is not None:
            replica = self._view.replicas.get(held.replica_id)
            if replica is not None and held.request_id in replica.requests:
                replica.saw_tokens(held.request_id, len(event.token_ids))
        return held.take(event)

    def _end_pause(self, held: OpenRequest) -> None:
        if held.pause is None or held.handover is not None:
            return  # what the source had sent before comes first
        pause, held.pause = held.pause, None
        self.on_pause(pause, asyncio.get_running_loop().time() - pause.begin_s)

    def _give(self, held: OpenRequest, routed: RoutedRequest, replica_id: str) -> None:
        self.displace(held)
        self._view.replicas[replica_id].add(routed)
        held.replica_id = replica_id

    def on_replica(self, replica_id: str) -> list[OpenRequest]:
        """Those that it has, oldest first."""
        replica = self._view.replicas.get(replica_id)
        if replica is None:
            return []
        return [self._held[request_id] for request_id in replica.requests]
