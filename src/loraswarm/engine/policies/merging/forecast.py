"""How much work of each adapter will come: rates of arrival and usual lengths, from what is seen.

A fast average reacts within a few steps, a slow one is steady; when the fast one leaves the range
that chance allows about the slow one, the slow one starts anew from it. Knows adapters as keys
only. Used by cost, which shows it every view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.policies.merging.view import OpenRequest

FAST_STEPS = 48.0
SLOW_STEPS = 256.0
SURPRISE = 3.0
"""Deviations of the fast average from the slow one that are taken for a change of the traffic."""
KEPT_SHARE = 0.9
FORGOTTEN = 0.02
"""Arrivals expected in the time of the slow average, below which an adapter is forgotten."""
MIN_SPAN_S = 1e-6

Name = AdapterKey | None


@dataclass(slots=True)
class Arrivals:
    """Arrivals of one adapter: `fast` and `slow` per second, over about so many seconds each.

    `prompt_tokens` and `output_tokens` are usual ones of a request, the latter at most.
    """

    prompt_tokens: float
    output_tokens: float
    fast: float = 0.0
    slow: float = 0.0
    slow_window_s: float = 0.0

    def saw(self, num: int, gap_s: float, fast_s: float, slow_s: float) -> None:
        """So many came in the last `gap_s` seconds; windows are `fast_s` and at most `slow_s`."""
        self.slow_window_s = min(slow_s, max(self.slow_window_s, fast_s) + gap_s)
        self.fast = _averaged(self.fast, num, gap_s, fast_s)
        self.slow = _averaged(self.slow, num, gap_s, self.slow_window_s)
        chance = max(self.slow, 1.0 / fast_s) / (2.0 * fast_s)
        if abs(self.fast - self.slow) > SURPRISE * math.sqrt(chance):
            self.slow, self.slow_window_s = self.fast, fast_s

    def saw_request(self, request: OpenRequest) -> None:
        """One of the arrivals."""
        kept = KEPT_SHARE
        self.prompt_tokens = kept * self.prompt_tokens + (1 - kept) * request.prefill_tokens
        self.output_tokens = kept * self.output_tokens + (1 - kept) * request.output_tokens


class Forecast:
    """Rates of every adapter that came lately, and the share of its limit that an answer uses."""

    def __init__(self) -> None:
        self.arrivals: dict[Name, Arrivals] = {}
        self.output_share = 1.0
        self._seen_s: float | None = None
        self._open: dict[str, tuple[int, int]] = {}  # first and last known outputs to come

    def saw(
        self, requests: Iterable[OpenRequest], now_s: float, step_s: float, num_steps: int = 1
    ) -> None:
        """The open requests at this moment, so many steps of about `step_s` after the last."""
        requests = tuple(requests)
        new: dict[Name, list[OpenRequest]] = {}
        for request in requests:
            if request.request_id not in self._open:
                new.setdefault(request.adapter, []).append(request)
        self._note_ends(requests, num_steps)
        is_first = self._seen_s is None
        gap_s = 0.0 if self._seen_s is None else max(0.0, now_s - self._seen_s)
        if gap_s < MIN_SPAN_S and not new:
            return
        self._seen_s = now_s
        # What is there at first came at no known rate.
        self._count({} if is_first else new, gap_s, max(step_s, MIN_SPAN_S))

    def outputs_of(self, request: OpenRequest) -> float:
        """Tokens that it is expected to generate still."""
        return max(1.0, self.output_share * request.output_tokens)

    def _count(self, new: dict[Name, list[OpenRequest]], gap_s: float, step_s: float) -> None:
        for name, requests in new.items():
            first = requests[0]
            found = Arrivals(float(first.prefill_tokens), float(first.output_tokens))
            arrivals = self.arrivals.setdefault(name, found)
            for request in requests:
                arrivals.saw_request(request)
        for name, arrivals in list(self.arrivals.items()):
            num = len(new.get(name, ()))
            arrivals.saw(num, gap_s, FAST_STEPS * step_s, SLOW_STEPS * step_s)
            if not num and arrivals.slow * SLOW_STEPS * step_s < FORGOTTEN:
                del self.arrivals[name]

    def _note_ends(self, requests: tuple[OpenRequest, ...], num_steps: int) -> None:
        """Learn from requests that are gone how much of their limit they used."""
        still = {}
        for request in requests:
            first, _ = self._open.get(request.request_id, (request.output_tokens, 0))
            still[request.request_id] = (first, request.output_tokens)
        for request_id, (first, last) in self._open.items():
            if request_id not in still and first > 0:
                used = (first - max(0, last - num_steps)) / first
                share = KEPT_SHARE * self.output_share + (1.0 - KEPT_SHARE) * used
                self.output_share = min(1.0, max(0.01, share))
        self._open = still


def _averaged(rate: float, num: int, gap_s: float, window_s: float) -> float:
    """The exponential average of a rate after `num` events in `gap_s` seconds."""
    return rate * math.exp(-gap_s / window_s) + num / window_s * _spread(gap_s / window_s)


def _spread(gap: float) -> float:
    """What events somewhere in a gap of so many windows weigh at its end, on average."""
    return -math.expm1(-gap) / gap if gap > 1e-9 else 1.0
