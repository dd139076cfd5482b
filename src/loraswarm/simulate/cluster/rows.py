"""A request as the simulator has it, and the requests of a replica that get a token in every step.

Sums over the rows are kept as they come and go, so that a step costs no more with many rows than
with one. Knows neither pages' owners nor seconds. Used by replica.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loraswarm.cluster.view import RoutedRequest


@dataclass(slots=True, eq=False, kw_only=True)
class SimRequest:
    """One request of a trace.

    `num_computed` of its tokens have K and V, `num_given` of its answer were given; of a row these
    are what they were when it became one, until it leaves. `num_pages` are those that it holds.
    `ticket` counts how often it was queued.
    """

    routed: RoutedRequest
    order: int
    num_bytes: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    num_computed: int = 0
    num_given: int = 0
    num_pages: int = 0
    ticket: int = 0
    is_waiting: bool = False
    is_moving: bool = False
    replica_id: str = ""
    joined: int = -1
    stops: int = -1
    first_s: float = -1.0
    end_s: float = -1.0

    @property
    def request_id(self) -> str:
        return self.routed.request_id

    @property
    def adapter(self) -> str | None:
        return self.routed.adapters[0] if self.routed.adapters else None

    @property
    def num_known(self) -> int:
        """Tokens that must have K and V, all but the last of them, before the next is there."""
        return self.prompt_tokens + self.num_given

    @property
    def is_done(self) -> bool:
        return self.end_s >= 0.0


@dataclass(slots=True)
class Rows:
    """Decoding requests of one replica.

        tick          counts the steps in which rows were
        ends[t]       rows that give their last token in the step that makes the tick t
        crossing[c]   rows that need one page more in steps at ticks t with t % page_tokens == c
        stops[t]      rows of which no token is expected any more from tick t on, but one

    `kv_tokens` are read by the next step, its own included; `num_shrinking` rows have fewer tokens
    left, as the view has it, after each step.
    """

    page_tokens: int
    tick: int = 0
    kv_tokens: int = 0
    num_adapted: int = 0
    own_bytes: int = 0
    tile_bytes: int = 0
    num_shrinking: int = 0
    members: dict[SimRequest, None] = field(default_factory=dict)
    num_of: dict[str, int] = field(default_factory=dict)
    _ends: dict[int, dict[SimRequest, None]] = field(default_factory=dict)
    _stops: dict[int, int] = field(default_factory=dict)
    _crossing: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._crossing = [0] * self.page_tokens

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_new_pages(self) -> int:
        """That the next step of all rows needs."""
        return self._crossing[self.tick % self.page_tokens]

    def join(self, request: SimRequest) -> None:
        """All its tokens but the last have K and V, and its answer goes on."""
        assert request.num_computed == request.num_known - 1
        request.joined = self.tick
        self.members[request] = None
        num_left = request.output_tokens - request.num_given
        self._ends.setdefault(self.tick + num_left, {})[request] = None
        self._count(request, 1)
        num_shrinks = request.routed.expected_tokens - request.num_given - 1
        if num_shrinks > 0:
            self.num_shrinking += 1
            request.stops = self.tick + num_shrinks
            self._stops[request.stops] = self._stops.get(request.stops, 0) + 1

    def leave(self, request: SimRequest) -> None:
        """It has ended, or gives way; its counts and what the view says of it are exact then."""
        del self.members[request]
        num_left = request.output_tokens - request.num_given
        ends = self._ends.get(request.joined + num_left)
        if ends is not None:
            ends.pop(request, None)
        if request.stops > self.tick:
            self.num_shrinking -= 1
            self._stops[request.stops] -= 1
        self._crossing[self._phase(request)] -= 1
        num_steps = self.tick - request.joined
        request.num_given += num_steps
        request.num_computed += num_steps
        request.joined = request.stops = -1
        request.routed.output_tokens = request.num_given
        request.num_pages = -(-request.num_computed // self.page_tokens)
        self.kv_tokens -= request.num_known
        self._count_adapter(request, -1)

    def advance(self) -> list[SimRequest]:
        """A step of all rows is over; returns those that have ended, which have not left yet."""
        self.kv_tokens += len(self.members)
        self.tick += 1
        self.num_shrinking -= self._stops.pop(self.tick, 0)
        return list(self._ends.pop(self.tick, ()))

    def tell(self) -> None:
        """Make what the view says of each row exact; its sums are in any case."""
        for request in self.members:
            request.routed.output_tokens = request.num_given + self.tick - request.joined

    def _phase(self, request: SimRequest) -> int:
        return (request.joined + 1 - request.num_known) % self.page_tokens

    def _count(self, request: SimRequest, sign: int) -> None:
        self._crossing[self._phase(request)] += sign
        self.kv_tokens += sign * request.num_known
        self._count_adapter(request, sign)

    def _count_adapter(self, request: SimRequest, sign: int) -> None:
        name = request.adapter
        if name is None:
            return
        self.num_adapted += sign
        self.own_bytes += sign * request.num_bytes
        count = self.num_of.get(name, 0) + sign
        if count == 0:
            del self.num_of[name]
            self.tile_bytes -= request.num_bytes
            return
        if count == sign == 1:
            self.tile_bytes += request.num_bytes
        self.num_of[name] = count
