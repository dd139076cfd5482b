"""What the next steps will do, as far as open requests and rates of arrival tell.

Steps ahead are taken in a few intervals, each longer than the one before. Open requests are known;
those to come are Poisson arrivals. Knows no costs. Built by cost for one view.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from loraswarm.engine.policies.merging.forecast import Arrivals, Forecast, Name
from loraswarm.engine.policies.merging.view import MergeView, OpenRequest

BOUNDS = (0, 4, 12, 28, 60, 124, 252)
"""Steps from now at which intervals begin and end."""
NUM_INTERVALS = len(BOUNDS) - 1
MIDDLES = tuple((begin + end) / 2.0 for begin, end in pairwise(BOUNDS))


@dataclass(slots=True)
class Load:
    """One adapter's part in each interval.

    `tokens` of all its requests; `open_rows` and `new_rows` in a step in its middle, of requests
    that are open now and (expected) of others; `variance` of the tokens.
    """

    tokens: list[float] = field(default_factory=lambda: [0.0] * NUM_INTERVALS)
    open_rows: list[int] = field(default_factory=lambda: [0] * NUM_INTERVALS)
    new_rows: list[float] = field(default_factory=lambda: [0.0] * NUM_INTERVALS)
    variance: list[float] = field(default_factory=lambda: [0.0] * NUM_INTERVALS)

    def add_open(self, start: float, prefill: float, outputs: float, chunk: float) -> None:
        """A request that starts so many steps from now, with chunks of `chunk` tokens at first."""
        middle = start + max(0.0, math.ceil(prefill / chunk) - 1.0) if prefill else start
        end = middle + outputs
        for place, (begin, stop) in enumerate(pairwise(BOUNDS)):
            if prefill and begin <= start < stop:
                self.tokens[place] += prefill
            decodes = min(stop, end) - max(begin, middle)
            if decodes > 0.0:
                self.tokens[place] += decodes
            if start <= MIDDLES[place] < end:
                self.open_rows[place] += 1

    def add_arrivals(self, start: float, arrivals: Arrivals, per_step: float, used: float) -> None:
        """Requests to come, so many in a step; the first can start so many steps from now."""
        outputs = max(1.0, used * arrivals.output_tokens)
        size = arrivals.prompt_tokens + outputs
        for place, (begin, stop) in enumerate(pairwise(BOUNDS)):
            length = max(0.0, stop - max(begin, start))
            if length == 0.0:
                continue
            rows = per_step * min(max(0.0, MIDDLES[place] - start), outputs)
            tokens = length * (rows + per_step * arrivals.prompt_tokens)
            self.tokens[place] += tokens
            self.new_rows[place] += rows
            self.variance[place] += tokens * size


@dataclass(slots=True)
class Outlook:
    """Loads of all adapters; `None` is what has none of its own."""

    loads: dict[Name, Load]

    @classmethod
    def of(cls, view: MergeView, forecast: Forecast, step_s: float) -> Outlook:
        """From what is open and what comes, with steps of about `step_s`."""
        outlook = cls({})
        free_at = outlook._add_requests(view, forecast)
        for name, arrivals in forecast.arrivals.items():
            per_step = arrivals.slow * step_s
            load = outlook._load(name)
            load.add_arrivals(free_at, arrivals, per_step, forecast.output_share)
        return outlook

    def others(self, name: Name, place: int) -> tuple[float, int, float]:
        """Tokens, open rows and expected new rows of all but one, in one interval."""
        rest = [load for other, load in self.loads.items() if other != name]
        return (
            sum(load.tokens[place] for load in rest),
            sum(load.open_rows[place] for load in rest),
            sum(load.new_rows[place] for load in rest),
        )

    def variance(self, place: int) -> float:
        """Of the difference of any adapter's tokens and the others', in one interval."""
        return sum(load.variance[place] for load in self.loads.values())

    def _add_requests(self, view: MergeView, forecast: Forecast) -> float:
        """Open ones, waiting ones as seats become free; returns when one is free for others."""
        running = [request for request in view.requests if request.is_running]
        waiting = [request for request in view.requests if not request.is_running]
        chunk = max(1.0, view.max_step_tokens - len(running))
        ends = [self._add(request, 0.0, forecast, chunk) for request in running]
        heapq.heapify(ends)
        for request in waiting:
            start = heapq.heappop(ends) if len(ends) >= view.num_seats else 0.0
            heapq.heappush(ends, self._add(request, start, forecast, chunk))
        return ends[0] if len(ends) >= view.num_seats else 0.0

    def _add(self, request: OpenRequest, start: float, forecast: Forecast, chunk: float) -> float:
        outputs = forecast.outputs_of(request)
        load = self._load(request.adapter)
        load.add_open(start, request.prefill_tokens, outputs, chunk)
        return start + outputs

    def _load(self, name: Name) -> Load:
        return self.loads.setdefault(name, Load())


def chance_of_none(open_rows: int, new_rows: float) -> float:
    """That a step has none of these rows."""
    return 0.0 if open_rows else math.exp(-new_rows)


def lengths() -> Sequence[float]:
    """Steps of each interval."""
    return tuple(float(end - begin) for begin, end in pairwise(BOUNDS))
