"""One replica as a light model: seats, pages, adapters and steps, as engine/scheduler has them.

Decodes first, then chunks of prompts that were begun, then those that wait, first come first
served; the youngest gives way where pages are short. Tells the view what a front would see: tokens
that came. Knows neither the other replicas nor a clock. Called by cluster and moving.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from loraswarm.cluster.view import ReplicaView
from loraswarm.core.step_cost import StepWork
from loraswarm.simulate.cluster.rows import Rows, SimRequest
from loraswarm.simulate.cluster.stock import Stock, Surroundings

Chunks = list[tuple[SimRequest, int]]


class Replica:
    """`view` is the cluster's of it. `on_end` is called with each request that has all its tokens.

    A request is in one of: waiting (in a queue), begun (it has a seat and pages for its known
    tokens, not all of which are computed), rows. `on_leave` of `freeze` is called when the request
    is in none of them, with what it held still counted in `num_frozen_pages`.
    """

    def __init__(
        self, view: ReplicaView, around: Surroundings, on_end: Callable[[SimRequest], None]
    ) -> None:
        self.view = view
        self.limits = view.limits
        self.rows = Rows(self.limits.page_tokens)
        self.stock = Stock(view.replica_id, self.limits, around, self._arrived)
        self.is_stepping = False
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_computed_tokens = 0
        self.num_frozen_pages = 0
        self._around = around
        self._on_end = on_end
        self._begun: dict[SimRequest, None] = {}
        self._running: dict[SimRequest, None] = {}
        self._ready: list[tuple[int, int, SimRequest]] = []
        self._absent: dict[str, list[tuple[int, int, SimRequest]]] = {}
        self._chunks: Chunks = []
        self._freezing: list[tuple[SimRequest, Callable[[], None]]] = []

    def receive(self, request: SimRequest) -> None:
        """Queue it by its order; K and V that it has come with it."""
        request.ticket += 1
        request.is_waiting = True
        request.replica_id = self.view.replica_id
        entry = (request.order, request.ticket, request)
        name = request.adapter
        if name is not None:
            self.stock.hold(name)
        if name is None or self.stock.is_at_hand(name):
            heapq.heappush(self._ready, entry)
        else:
            self._absent.setdefault(name, []).append(entry)
        self._around.wake(self.view.replica_id)

    def plan(self) -> float | None:
        """Begin the next step; returns its seconds, None if nothing can run now."""
        assert not self.is_stepping
        has_preempted = self._take_row_pages()
        self._chunks = []
        budget = self.limits.max_step_tokens - len(self.rows)
        for request in self._begun:
            if budget > 0 and self._is_ready(request):
                budget = self._add_chunk(request, budget)
        if not has_preempted:
            self._admit(budget)
        if not self._chunks and not self.rows:
            return None
        seconds = self._around.costs.step_s(self._work())
        self.is_stepping = True
        self.busy_s += seconds
        self.num_steps += 1
        return seconds

    def finish(self, now_s: float) -> None:
        """The step is over: its tokens are there."""
        self.is_stepping = False
        self._around.wake(self.view.replica_id)
        view, rows = self.view, self.rows
        view.context_tokens += len(rows)
        view.tokens_left -= rows.num_shrinking
        self.num_computed_tokens += len(rows)
        for request in rows.advance():
            rows.leave(request)
            self._end(request, now_s)
        for request, num_tokens in self._chunks:
            request.num_computed += num_tokens
            self.num_computed_tokens += num_tokens
            if request.num_computed == request.num_known:
                self._give(request, now_s)
        self._chunks = []
        for request, on_leave in self._freezing:
            self._take_out(request, on_leave)
        self._freezing = []

    def freeze(self, request: SimRequest, on_leave: Callable[[], None]) -> None:
        """Stop computing it, after the step that is under way. `on_leave` is called unless it ends
        with that step."""
        if self.is_stepping and not request.is_waiting:
            self._freezing.append((request, on_leave))
        else:
            self._take_out(request, on_leave)

    def release_pages(self, num_pages: int) -> None:
        """What a request that left held is not needed any more."""
        self.num_frozen_pages -= num_pages
        self.stock.num_free += num_pages
        self._around.wake(self.view.replica_id)

    def can_run(self) -> bool:
        """Whether a step is due that has not been begun."""
        if self.is_stepping:
            return False
        waiting = (request for _, ticket, request in self._ready if request.ticket == ticket)
        is_kept_out = bool(self._running) or self.num_frozen_pages > 0
        could_start = not is_kept_out and any(each.is_waiting for each in waiting)
        return bool(self.rows) or could_start or any(self._is_ready(each) for each in self._begun)

    def check(self) -> None:
        """Assert that pages and sums are right; between steps."""
        self.rows.tell()
        known = {each: each.num_known + self.rows.tick - each.joined for each in self.rows.members}
        assert self.rows.kv_tokens == sum(known.values())
        pages = sum(-(-(tokens - 1) // self.limits.page_tokens) for tokens in known.values())
        pages += sum(each.num_pages for each in self._begun)
        self.stock.check(pages + self.num_frozen_pages)
        assert self._running.keys() == self._begun.keys() | self.rows.members.keys()
        assert len(self._running) <= self.limits.num_seats
        requests = self.view.requests.values()
        assert self.view.context_tokens == sum(each.context_tokens for each in requests)
        assert self.view.tokens_left == sum(each.tokens_left for each in requests)

    def _is_ready(self, request: SimRequest) -> bool:
        return request.adapter is None or self.stock.is_ready(request.adapter)

    def _arrived(self, adapter: str) -> None:
        for entry in self._absent.pop(adapter, ()):
            heapq.heappush(self._ready, entry)
        self._around.wake(self.view.replica_id)

    def _take_row_pages(self) -> bool:
        """Take the pages that rows need for the next step; whether somebody had to give way."""
        has_preempted = False
        while not self.stock.make_room(self.rows.num_new_pages):
            self._preempt(next(reversed(self._running)))
            has_preempted = True
        self.stock.num_free -= self.rows.num_new_pages
        return has_preempted

    def _preempt(self, request: SimRequest) -> None:
        """Back to the queue; all of it is computed again."""
        self._stop(request)
        self.stock.num_free += request.num_pages
        request.num_pages = request.num_computed = 0
        self.num_preemptions += 1
        self.receive(request)

    def _stop(self, request: SimRequest) -> None:
        """It gives back its seat and its adapter; its pages stay taken."""
        del self._running[request]
        if request.joined >= 0:
            self.rows.leave(request)
        else:
            del self._begun[request]
        if request.adapter is not None:
            self.stock.unpin(request.adapter)

    def _admit(self, budget: int) -> None:
        """Start those that wait while tokens, seats and pages for their known tokens last.

        One whose adapter is not at hand is passed over; one that does not fit holds up the rest.
        """
        while self._ready and budget > 0 and len(self._running) < self.limits.num_seats:
            order, ticket, request = self._ready[0]
            name = request.adapter
            if not request.is_waiting or request.ticket != ticket:
                heapq.heappop(self._ready)
            elif name is not None and not self.stock.is_at_hand(name):
                heapq.heappop(self._ready)
                self._absent.setdefault(name, []).append((order, ticket, request))
                self.stock.want(name)
            elif self._try_start(request):
                heapq.heappop(self._ready)
                if self._is_ready(request):
                    budget = self._add_chunk(request, budget)
            else:
                return

    def _try_start(self, request: SimRequest) -> bool:
        """Pin the adapter and take pages for all known tokens, if there is room for one more, or
        change nothing."""
        stock, name = self.stock, request.adapter
        num_pages = self.view.pages_for(request.num_known + 1)
        num_adapter_pages = stock.pages_of(name) if name is not None else 0
        num_own = stock.idle_pages_of(name) if name is not None else 0
        if num_pages + num_adapter_pages > stock.num_available - num_own:
            return False
        if name is not None:
            stock.pin(name)
            stock.release(name)
        num_pages = self.view.pages_for(request.num_known)
        has_room = stock.make_room(num_pages)
        assert has_room
        stock.num_free -= num_pages
        request.num_pages = num_pages
        request.is_waiting = False
        self._begun[request] = None
        self._running[request] = None
        return True

    def _add_chunk(self, request: SimRequest, budget: int) -> int:
        """Plan what fits of it; returns the tokens that are left for others."""
        num_tokens = min(request.num_known - request.num_computed, budget)
        self._chunks.append((request, num_tokens))
        return budget - num_tokens

    def _work(self) -> StepWork:
        """Of the rows and the chunks; the rows' part costs the same however many they are."""
        rows = self.rows
        num_tokens = num_logit_rows = len(rows)
        num_adapters, tile_bytes = len(rows.num_of), rows.tile_bytes
        num_adapted, products, kv_tokens, pairs = (
            rows.num_adapted,
            rows.own_bytes,
            rows.kv_tokens,
            0,
        )
        seen: set[str] = set()
        for request, count in self._chunks:
            num_tokens += count
            num_logit_rows += request.num_computed + count == request.num_known
            if count == 1:
                kv_tokens += request.num_computed + 1
            else:
                pairs += count * request.num_computed + count * (count + 1) // 2
            name = request.adapter
            if name is None:
                continue
            num_adapted += count
            products += count * request.num_bytes
            if name not in rows.num_of and name not in seen:
                seen.add(name)
                num_adapters += 1
                tile_bytes += request.num_bytes
        return StepWork(
            num_tokens=num_tokens,
            num_logit_rows=num_logit_rows,
            num_adapters=num_adapters,
            num_adapted_tokens=num_adapted,
            tile_bytes=tile_bytes,
            lora_products=products,
            kv_bytes=kv_tokens * self._around.costs.kv_token_bytes,
            attention_pairs=pairs,
        )

    def _give(self, request: SimRequest, now_s: float) -> None:
        """All known tokens have K and V, and the next has come."""
        request.num_given += 1
        self.view.saw_tokens(request.request_id, 1)
        if request.first_s < 0.0:
            request.first_s = now_s
        del self._begun[request]
        if request.num_given == request.output_tokens:
            self._end(request, now_s)
        else:
            self.rows.join(request)

    def _end(self, request: SimRequest, now_s: float) -> None:
        del self._running[request]
        if request.adapter is not None:
            self.stock.unpin(request.adapter)
        self.stock.num_free += request.num_pages
        request.num_pages = 0
        request.end_s = now_s
        self._on_end(request)

    def _take_out(self, request: SimRequest, on_leave: Callable[[], None]) -> None:
        if request.is_done:
            return
        if request.is_waiting:
            request.is_waiting = False
            if request.adapter is not None:
                self.stock.release(request.adapter)
        else:
            self._stop(request)
        self.num_frozen_pages += request.num_pages
        on_leave()
        self._around.wake(self.view.replica_id)
