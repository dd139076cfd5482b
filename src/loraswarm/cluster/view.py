"""What routing, placement and migration see: replicas, what is open on them, what they hold.

Plain data. Kept true by the front, from what it has sent and what replicas report, and by the
simulator; the policies only read it. Adapters are known by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loraswarm.core.cost_model import CostFigures

HeldTier = Literal["device", "host"]


@dataclass(slots=True, eq=False, kw_only=True)
class RoutedRequest:
    """A request that is open somewhere.

    `adapters` are those it needs, none for the base. `prefill_tokens` of it are still to be
    computed before its next token; `expected_tokens` are those that its answer is taken to have,
    `output_tokens` those it has.
    """

    request_id: str
    adapters: tuple[str, ...]
    prompt_tokens: int
    expected_tokens: int
    prefill_tokens: int
    output_tokens: int = 0
    arrived_s: float = 0.0

    @property
    def context_tokens(self) -> int:
        """Tokens that have K and V once it decodes."""
        return self.prompt_tokens + self.output_tokens

    @property
    def tokens_left(self) -> int:
        """Of its answer, as expected; an open request has at least one."""
        return max(1, self.expected_tokens - self.output_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLimits:
    """What one replica can hold: requests that run at once, tokens of a step, pages of its pool,
    bytes of adapters in host memory."""

    num_seats: int
    max_step_tokens: int
    num_pages: int
    page_tokens: int
    page_bytes: int
    host_bytes: int = 0


@dataclass(slots=True, eq=False)
class ReplicaView:
    """One replica: what is open on it, and which adapters it holds where.

    Sums over the open requests are kept with every change, so that a decision reads them at once.
    `tiers` has adapters in pages ("device") or in host memory only ("host"); all others are in
    their store. `accepts` is False while it drains, starts or is not answering.
    """

    replica_id: str
    limits: ReplicaLimits
    accepts: bool = True
    tiers: dict[str, HeldTier] = field(default_factory=dict)
    requests: dict[str, RoutedRequest] = field(default_factory=dict)
    num_requests_of: dict[str, int] = field(default_factory=dict)
    context_tokens: int = 0
    prefill_tokens: int = 0
    tokens_left: int = 0

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def add(self, request: RoutedRequest) -> None:
        """Raises ValueError if its id is open here already."""
        if request.request_id in self.requests:
            raise ValueError(f"request {request.request_id!r} is open on {self.replica_id!r}")
        self.requests[request.request_id] = request
        self._count(request, 1)
        for name in request.adapters:
            self.num_requests_of[name] = self.num_requests_of.get(name, 0) + 1

    def remove(self, request_id: str) -> RoutedRequest:
        """It has ended, or is elsewhere. Raises KeyError if it is not open here."""
        request = self.requests.pop(request_id)
        self._count(request, -1)
        for name in request.adapters:
            self.num_requests_of[name] -= 1
            if self.num_requests_of[name] == 0:
                del self.num_requests_of[name]
        return request

    def saw_tokens(self, request_id: str, num_tokens: int) -> None:
        """So many more tokens of its answer came; its prompt has been computed."""
        request = self.requests[request_id]
        self._count(request, -1)
        request.output_tokens += num_tokens
        request.prefill_tokens = 0
        self._count(request, 1)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that K and V of so many tokens take."""
        return -(-num_tokens // self.limits.page_tokens)

    def _count(self, request: RoutedRequest, sign: int) -> None:
        self.context_tokens += sign * request.context_tokens
        self.prefill_tokens += sign * request.prefill_tokens
        self.tokens_left += sign * request.tokens_left


@dataclass(slots=True, eq=False)
class ClusterView:
    """All replicas, the adapters' bytes in pages, and what steps and loads cost on each of them.

    `holders` are, for each adapter, the replicas that have it in pages or in host memory.
    """

    costs: CostFigures
    adapter_bytes: Mapping[str, int]
    replicas: dict[str, ReplicaView] = field(default_factory=dict)
    holders: dict[str, set[str]] = field(default_factory=dict)
    now_s: float = 0.0

    def set_tier(self, replica_id: str, adapter: str, tier: HeldTier | None) -> None:
        """Where a replica has an adapter now; None: only in its store."""
        replica = self.replicas[replica_id]
        if tier is None:
            replica.tiers.pop(adapter, None)
            holders = self.holders.get(adapter, set())
            holders.discard(replica_id)
            if not holders:
                self.holders.pop(adapter, None)
            return
        replica.tiers[adapter] = tier
        self.holders.setdefault(adapter, set()).add(replica_id)

    def remove_replica(self, replica_id: str) -> ReplicaView:
        """It is gone, and so is what it held; what was open on it is the caller's."""
        for adapter in tuple(self.replicas[replica_id].tiers):
            self.set_tier(replica_id, adapter, None)
        return self.replicas.pop(replica_id)
