"""What the next steps will do, as far as open requests and rates of arrival tell.

Steps ahead are taken in a few intervals, each longer than the one before. Open requests are known;
those to come are Poisson arrivals. Knows no costs. Built by cost for one view.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from loraswarm.engine.policies.merging.forecast import Arrivals, Forecast, Name
from loraswarm.engine.policies.merging.view import MergeView

BOUNDS = (0, 4, 12, 28, 60, 124, 252)
"""Steps from now at which intervals begin and end."""
SPANS = tuple(pairwise(BOUNDS))
MIDDLES = tuple((begin + end) / 2.0 for begin, end in SPANS)
StepSeconds = Callable[[float], float]
"""Seconds that a step of so many tokens is likely to take."""


@dataclass(slots=True)
class Load:
    """One adapter's part in each interval.

    `tokens` of all its requests; `open_rows` and `new_rows` in a step in its middle, of requests
    that are open now and (expected) of others; `variance` of the tokens.
    """

    tokens: list[float] = field(default_factory=lambda: [0.0] * len(SPANS))
    open_rows: list[int] = field(default_factory=lambda: [0] * len(SPANS))
    new_rows: list[float] = field(default_factory=lambda: [0.0] * len(SPANS))
    variance: list[float] = field(default_factory=lambda: [0.0] * len(SPANS))

    @classmethod
    def sum_of(cls, loads: Iterable[Load]) -> Load:
        """All of them together."""
        loads = tuple(loads)
        return cls(
            tokens=[sum(each) for each in zip(*(load.tokens for load in loads), strict=True)],
            open_rows=[sum(each) for each in zip(*(load.open_rows for load in loads), strict=True)],
            new_rows=[sum(each) for each in zip(*(load.new_rows for load in loads), strict=True)],
            variance=[sum(each) for each in zip(*(load.variance for load in loads), strict=True)],
        )

    def add_open(self, begin: float, decodes_at: float, end: float, prefill: float) -> None:
        """A request that computes `prefill` tokens of its prompt first, then one a step."""
        for place, (start, stop) in enumerate(SPANS):
            if start >= end:
                return
            if prefill:
                length = max(decodes_at - begin, 1e-9)
                shared = min(stop, decodes_at) - max(start, begin)
                self.tokens[place] += prefill * max(0.0, shared) / length
            self.tokens[place] += max(0.0, min(stop, end) - max(start, decodes_at))
            if begin <= MIDDLES[place] < end:
                self.open_rows[place] += 1

    def add_arrivals(
        self, start: float, arrivals: Arrivals, used: float, step_s: Sequence[float]
    ) -> None:
        """Requests to come, from so many steps on, which take `step_s` in each interval; they use
        `used` of their limits."""
        outputs = max(1.0, used * arrivals.output_tokens)
        arrived = [0.0]  # at the bounds
        for place, (begin, stop) in enumerate(SPANS):
            length = max(0.0, stop - max(begin, start))
            new = arrivals.slow * step_s[place] * length
            arrived.append(arrived[-1] + new)
            middle = MIDDLES[place]
            rows = _at(arrived, middle) - _at(arrived, middle - outputs)
            tokens = length * rows + new * arrivals.prompt_tokens
            self.tokens[place] += tokens
            self.new_rows[place] += rows
            self.variance[place] += tokens * (arrivals.prompt_tokens + outputs)


@dataclass(slots=True)
class Outlook:
    """Loads of all adapters (None: what has none of its own), their sum, and seconds of a step in
    each interval."""

    loads: dict[Name, Load] = field(default_factory=dict)
    total: Load = field(default_factory=Load)
    step_s: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, view: MergeView, forecast: Forecast, seconds: StepSeconds) -> Outlook:
        """From what is open and what comes."""
        outlook = cls()
        free_at = outlook._add_requests(view, forecast)
        for place, (begin, end) in enumerate(SPANS):
            tokens = sum(load.tokens[place] for load in outlook.loads.values())
            outlook.step_s.append(seconds(max(1.0, tokens / (end - begin))))
        for name, arrivals in forecast.arrivals.items():
            load = outlook._load(name)
            load.add_arrivals(free_at, arrivals, forecast.output_share, outlook.step_s)
        outlook.total = Load.sum_of(outlook.loads.values())
        return outlook

    def others(self, load: Load, place: int) -> tuple[float, int, float]:
        """Tokens, open rows and expected new rows of all but one, in one interval."""
        total = self.total
        return (
            max(0.0, total.tokens[place] - load.tokens[place]),
            total.open_rows[place] - load.open_rows[place],
            max(0.0, total.new_rows[place] - load.new_rows[place]),
        )

    def _add_requests(self, view: MergeView, forecast: Forecast) -> float:
        """Open ones: prompts one after the other in chunks, waiting requests as seats become free.
        Returns when a seat is free for others."""
        running = [request for request in view.requests if request.is_running]
        waiting = [request for request in view.requests if not request.is_running]
        chunk = max(1.0, view.max_step_tokens - len(running))
        ends: list[float] = []
        read_at = 0.0  # when the prompts of all before are computed
        for request in running + waiting:
            is_full = len(ends) >= view.num_seats
            begin = heapq.heappop(ends) if is_full else 0.0
            if request.prefill_tokens:
                begin = max(begin, read_at)
            decodes_at = begin + request.prefill_tokens / chunk
            read_at = max(read_at, decodes_at)
            end = decodes_at + forecast.outputs_of(request)
            load = self._load(request.adapter)
            load.add_open(begin, decodes_at, end, request.prefill_tokens)
            heapq.heappush(ends, end)
        return max(read_at, ends[0]) if len(ends) >= view.num_seats else read_at

    def _load(self, name: Name) -> Load:
        return self.loads.setdefault(name, Load())


def chance_of_none(open_rows: int, new_rows: float) -> float:
    """That a step has none of these rows."""
    return 0.0 if open_rows else math.exp(-new_rows)


def _at(arrived: Sequence[float], step: float) -> float:
    """Arrivals until a step, between the bounds known so far in proportion."""
    for place in range(len(arrived) - 1):
        begin, end = SPANS[place]
        if step < end:
            part = max(0.0, step - begin) / (end - begin)
            return arrived[place] + part * (arrived[place + 1] - arrived[place])
    return arrived[-1]
