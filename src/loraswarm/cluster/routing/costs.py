"""What one more request would cost on a replica, in seconds, from the view's sums alone.

Owns no state but figures derived from one cost model. Knows neither which replicas are asked about
nor who decides. Called by the marginal policy, and by placement for what a request amounts to.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

from loraswarm.cluster.routing.router import NO_PREFIX, KnownPrefix
from loraswarm.cluster.view import ClusterView, ReplicaView, RoutedRequest
from loraswarm.core.cost_model import CostFigures
from loraswarm.core.step_cost import ChunkWork, StepWork

SAMPLED_ADAPTERS = 4
"""Of so many adapters in use on a replica, those used longest, the bytes are looked up; the others
are taken to be as large."""
SHARE_UNDER_WAY = 0.5
"""What is left of a load that another request has begun, on average."""


class AddedCost(NamedTuple):
    """Seconds that a request adds to the waiting of all, itself included.

    `wait_s` pass until it has a seat and the prompts before it are computed, `load_s` to bring its
    adapters into pages, `prefill_s` to compute what of its prompt is not cached, `answer_s` in the
    steps of its answer. `others_s` is what the requests that run beside it wait longer, added up:
    for its prompt, and for each step that it makes longer.
    """

    wait_s: float
    load_s: float
    prefill_s: float
    answer_s: float
    others_s: float

    @property
    def total_s(self) -> float:
        return self.wait_s + self.load_s + self.prefill_s + self.answer_s + self.others_s


class DecodeRows(NamedTuple):
    """A step of nothing but decodes: `num_rows` sequences with `context_tokens` in pages, and their
    `num_adapters` distinct adapters of `mean_bytes` each. If there are any, every row has one."""

    num_rows: float
    context_tokens: float
    num_adapters: float
    mean_bytes: float


class StepEstimates:
    """Seconds of steps by one cost model; see `StepCosts` for the sum that they are parts of."""

    def __init__(self, costs: CostFigures) -> None:
        self.costs = costs
        step = costs.step
        self._brackets = step.brackets
        widths = [end - begin for begin, end in pairwise(step.brackets)]
        below = (width * each for width, each in zip(widths, step.token_s, strict=False))
        self._below_s = (0.0, *accumulate(below))
        self._kv_token_s = step.kv_byte_s * costs.kv_token_bytes
        self._chunk_token_s = cache(self._measure_chunk)

    def rows_s(self, num_rows: float) -> float:
        """What the rows of a step cost that each end in a token, beside `fixed_s`."""
        step = self.costs.step
        bracket = bisect_right(self._brackets, num_rows) - 1
        inside_s = step.token_s[bracket] * (num_rows - self._brackets[bracket])
        return self._below_s[bracket] + inside_s + step.logit_row_s * num_rows

    def decode_s(self, rows: DecodeRows) -> float:
        """Seconds of a step of these decodes."""
        step = self.costs.step
        seconds = step.fixed_s + self.rows_s(rows.num_rows)
        seconds += self._kv_token_s * (rows.context_tokens + rows.num_rows)
        if not rows.num_adapters:
            return seconds
        own_s = step.adapted_token_s + step.lora_product_s * rows.mean_bytes
        distinct_s = step.adapter_s + step.tile_byte_s * rows.mean_bytes
        return seconds + step.lora_s + own_s * rows.num_rows + distinct_s * rows.num_adapters

    def added_row_s(self, rows: DecodeRows, num_bytes: int | None, is_new: bool) -> float:
        """What one more row adds to a step of `rows`, beside what is read of its context.

        Its adapter takes `num_bytes` (None: it has none) and `is_new` among theirs, or is not.
        """
        step = self.costs.step
        seconds = self.rows_s(rows.num_rows + 1) - self.rows_s(rows.num_rows)
        if num_bytes is None:
            return seconds
        seconds += step.adapted_token_s + step.lora_product_s * num_bytes
        if is_new:
            seconds += step.adapter_s + step.tile_byte_s * num_bytes
        return seconds if rows.num_adapters else seconds + step.lora_s

    def context_s(self, num_tokens: float) -> float:
        """What a step takes to read K and V of so many tokens, for one row."""
        return self._kv_token_s * num_tokens

    def prefill_s(self, num_tokens: int, num_before: int, num_bytes: int, max_tokens: int) -> float:
        """Seconds to compute `num_tokens` of a prompt after `num_before`, with an adapter of
        `num_bytes` (0: none), in steps of at most `max_tokens`."""
        step = self.costs.step
        token_s = self._chunk_token_s(max_tokens)
        if num_bytes:
            token_s += step.adapted_token_s + step.lora_product_s * num_bytes
        pairs = num_tokens * (num_before + num_tokens / 2)
        return num_tokens * token_s + step.attention_pair_s * pairs

    def queued_prefill_s(self, num_tokens: int, max_tokens: int) -> float:
        """Seconds for prompts of which no more is known than how long they are together."""
        return num_tokens * self._chunk_token_s(max_tokens)

    def _measure_chunk(self, max_tokens: int) -> float:
        """Seconds of a token in a step full of them, without what it attends to."""
        work = StepWork.of([ChunkWork(num_tokens=max_tokens, num_computed=0)], 0)
        pairs_s = self.costs.step.attention_pair_s * work.attention_pairs
        return (self.costs.step_s(work) - pairs_s) / max_tokens


def request_bytes(request: RoutedRequest, view: ClusterView) -> int | None:
    """Of the adapters of a request, together; None if it has none. One whose size is not known
    (yet) counts as nothing, which leaves the fixed costs of it."""
    if not request.adapters:
        return None
    return sum(view.adapter_bytes.get(name, 0) for name in request.adapters)


def mean_adapter_bytes(replica: ReplicaView, view: ClusterView) -> float:
    """Of the adapters in use there; 0 if none is."""
    num_sampled = min(len(replica.num_requests_of), SAMPLED_ADAPTERS)
    known, num_bytes = view.adapter_bytes, 0
    for name in islice(replica.num_requests_of, num_sampled):
        num_bytes += known.get(name, 0)
    return num_bytes / num_sampled if num_sampled else 0.0


def load_s(request: RoutedRequest, replica: ReplicaView, view: ClusterView) -> float:
    """Seconds until all its adapters are in pages there, one after the other.

    device   0                       host   copy_s
    store    load_s + copy_s         the half of it if another request has begun it
    """
    seconds = 0.0
    for name in request.adapters:
        tier = replica.tiers.get(name)
        if tier == "device":
            continue
        num_bytes = view.adapter_bytes.get(name, 0)
        one_s = view.costs.copy_s(num_bytes)
        if tier is None:
            one_s += view.costs.load_s(num_bytes)
        seconds += one_s * (SHARE_UNDER_WAY if name in replica.num_requests_of else 1.0)
    return seconds


def num_prefill(request: RoutedRequest, num_cached: int) -> int:
    """Tokens to compute before its next one where the first `num_cached` are in pages. The last is
    computed in any case, unless the request brings K and V of all with it."""
    num_missing = min(request.prefill_tokens, request.context_tokens - num_cached)
    return max(num_missing, min(1, request.prefill_tokens))


def num_to_end(request: RoutedRequest, replica: ReplicaView, adapter_tokens: float) -> int:
    """How many of the replica's requests must end before there is a seat and room for its prompt.

    `adapter_tokens` is how many tokens would fit where adapters in use are.
    """
    num_open = len(replica.requests)
    num_ahead = num_open + 1 - replica.limits.num_seats
    capacity = replica.limits.num_pages * replica.limits.page_tokens
    excess = replica.context_tokens + request.context_tokens + adapter_tokens - capacity
    if excess > 0 and replica.context_tokens > 0:
        num_ahead = max(num_ahead, int(excess * num_open / replica.context_tokens) + 1)
    return min(max(num_ahead, 0), num_open)


class MarginalCosts:
    """`AddedCost` of requests on replicas of one view's cost model."""

    def __init__(self, costs: CostFigures) -> None:
        self.steps = StepEstimates(costs)

    def added(
        self,
        request: RoutedRequest,
        replica: ReplicaView,
        view: ClusterView,
        prefix: KnownPrefix = NO_PREFIX,
    ) -> AddedCost:
        """What the request costs if it goes there now; constant time, whatever is open there.

        Those that are open run as many at a time as there are seats, each with its share of the
        sums. A seat comes free when one has given the mean of the tokens that are left.
        """
        steps, limits = self.steps, replica.limits
        mean_bytes = mean_adapter_bytes(replica, view)
        num_open = len(replica.requests)
        num_rows = min(num_open, limits.num_seats)
        share = num_rows / num_open if num_open else 0.0
        num_adapters = min(len(replica.num_requests_of), num_rows)
        rows = DecodeRows(num_rows, replica.context_tokens * share, num_adapters, mean_bytes)
        step_s = steps.decode_s(rows)

        wait_s = steps.queued_prefill_s(replica.prefill_tokens, limits.max_step_tokens)
        adapter_tokens = num_adapters * mean_bytes / limits.page_bytes * limits.page_tokens
        if num_ahead := num_to_end(request, replica, adapter_tokens):
            wait_s += num_ahead * (replica.tokens_left / num_open) * step_s / num_rows

        num_bytes = request_bytes(request, view)
        num_missing = num_prefill(request, prefix.tokens_at(replica.replica_id))
        num_before = request.context_tokens - num_missing
        prefill_s = steps.prefill_s(num_missing, num_before, num_bytes or 0, limits.max_step_tokens)
        is_new = any(name not in replica.num_requests_of for name in request.adapters)
        num_left = request.tokens_left
        added_s = steps.added_row_s(rows, num_bytes, is_new)
        added_s += steps.context_s(request.context_tokens + num_left / 2)
        num_slowed = min(replica.tokens_left * share, float(num_rows * num_left))
        return AddedCost(
            wait_s=wait_s,
            load_s=load_s(request, replica, view),
            prefill_s=prefill_s,
            answer_s=num_left * (step_s + added_s),
            others_s=num_slowed * added_s + num_rows * prefill_s,
        )
