"""What the server counts and times of its requests, as Prometheus series.

Owns the registry of one application and which adapters have series of their own. Knows nothing
about HTTP or the engine's counts (engine_metrics). `choices` feeds it, `scrape` reads it.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from loraswarm.core.events import FinishReason, SequenceEvent
from loraswarm.core.request import Request
from loraswarm.text.generation import TextDelta

MAX_OWN_LABELS = 100
OTHER, MIXED = "_other", "_mixed"
RESERVED = (OTHER, MIXED)
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
QUEUE_S = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
WHOSE = (
    f"By adapter: the base model by its name, sums of adapters as {MIXED}, the first"
    f" {MAX_OWN_LABELS} adapters asked for by theirs, all others as {OTHER};"
    " the sum over this label is the total."
)
Outcome = Literal["success", "error", "abort"]
OUTCOMES: tuple[Outcome, ...] = ("success", "error", "abort")
OUTCOME_OF_END: dict[FinishReason, Outcome] = {
    "stop": "success",
    "length": "success",
    "error": "error",
    "abort": "abort",
}


class RequestMetrics:
    """Series of all requests. A request is one choice of one prompt: what the engine runs."""

    def __init__(self, base_model: str) -> None:
        self.registry = CollectorRegistry()
        self._base_model = base_model
        self._own: dict[str, AdapterSeries] = {}
        self._shared: dict[str, AdapterSeries] = {}
        label, registry = ["adapter"], self.registry
        self.requests = Counter(
            "loraswarm_requests",
            f"Requests that have ended, by outcome. {WHOSE}",
            ["adapter", "outcome"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "loraswarm_prompt_tokens", f"Tokens of prompts. {WHOSE}", label, registry=registry
        )
        self.cached_tokens = Counter(
            "loraswarm_cached_prompt_tokens",
            f"Tokens of prompts whose K and V were there already. {WHOSE}",
            label,
            registry=registry,
        )
        self.generated_tokens = Counter(
            "loraswarm_generated_tokens", f"Tokens generated. {WHOSE}", label, registry=registry
        )
        self.first_token = Histogram(
            "loraswarm_time_to_first_token_seconds",
            f"From the request's arrival to its first token. {WHOSE}",
            label,
            registry=registry,
            buckets=FIRST_TOKEN_S,
        )
        self.between_tokens = Histogram(
            "loraswarm_inter_token_latency_seconds",
            f"From one token to the next. {WHOSE}",
            label,
            registry=registry,
            buckets=BETWEEN_TOKENS_S,
        )
        self.queue = Histogram(
            "loraswarm_queue_seconds",
            f"From the request's arrival in the engine to its first step. {WHOSE}",
            label,
            registry=registry,
            buckets=QUEUE_S,
        )
        self.open_requests = Gauge(
            "loraswarm_open_requests", "Requests that have not ended.", registry=registry
        )
        self.http_errors = Counter(
            "loraswarm_http_errors",
            "HTTP requests answered with an error, by status.",
            ["status"],
            registry=registry,
        )

    def count_error(self, status: int) -> None:
        """An HTTP request was answered with `status`."""
        self.http_errors.labels(status).inc()

    @property
    def own_labels(self) -> frozenset[str]:
        """Names of the adapters that have series of their own; grows to MAX_OWN_LABELS."""
        return frozenset(self._own)

    def watch(self, request: Request) -> RequestWatch:
        """To be entered when `request` is handed to the engine."""
        return RequestWatch(self, self._series_of(request), request)

    def _series_of(self, request: Request) -> AdapterSeries:
        name = request.adapter
        if name is None:
            return self._shared_series(MIXED if request.adapters else self._base_model)
        series = self._own.get(name)
        if series is not None:
            return series
        if len(self._own) >= MAX_OWN_LABELS or name in RESERVED:
            return self._shared_series(OTHER)
        return self._own.setdefault(name, AdapterSeries(self, name))

    def _shared_series(self, label: str) -> AdapterSeries:
        series = self._shared.get(label)
        return series or self._shared.setdefault(label, AdapterSeries(self, label))


class AdapterSeries:
    """The series of one value of the label, looked up once."""

    __slots__ = (
        "between_tokens",
        "cached_tokens",
        "first_token",
        "generated_tokens",
        "outcomes",
        "prompt_tokens",
        "queue",
    )

    def __init__(self, metrics: RequestMetrics, label: str) -> None:
        self.first_token = metrics.first_token.labels(label)
        self.between_tokens = metrics.between_tokens.labels(label)
        self.queue = metrics.queue.labels(label)
        self.prompt_tokens = metrics.prompt_tokens.labels(label)
        self.cached_tokens = metrics.cached_tokens.labels(label)
        self.generated_tokens = metrics.generated_tokens.labels(label)
        self.outcomes = {name: metrics.requests.labels(label, name) for name in OUTCOMES}


class RequestWatch:
    """One request while it is open: `with` it, and tell it every event.

    The outcome is counted once, on leaving: "success" or what the terminal event said; without one
    "abort" if the request was closed or cancelled from here, else "error".
    """

    __slots__ = ("_last_s", "_metrics", "_outcome", "_request", "_series", "num_cached_tokens")

    def __init__(self, metrics: RequestMetrics, series: AdapterSeries, request: Request) -> None:
        self.num_cached_tokens = 0
        self._metrics = metrics
        self._series = series
        self._request = request
        self._outcome: Outcome | None = None
        self._last_s: float | None = None

    def __enter__(self) -> RequestWatch:
        self._metrics.open_requests.inc()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._metrics.open_requests.dec()
        outcome = self._outcome
        if outcome is None:
            is_closed = isinstance(error, GeneratorExit | asyncio.CancelledError)
            outcome = "abort" if is_closed else "error"
        self._series.outcomes[outcome].inc()

    def saw(self, event: SequenceEvent, delta: TextDelta) -> None:
        """Note `event` and what of it is part of the answer."""
        if delta.token_ids:
            self._saw_tokens(event, len(delta.token_ids), time.monotonic())
        reason = delta.finish_reason
        if reason is not None:
            self._outcome = OUTCOME_OF_END[reason]

    def _saw_tokens(self, event: SequenceEvent, num_tokens: int, now_s: float) -> None:
        series = self._series
        series.generated_tokens.inc(num_tokens)
        if self._last_s is None:
            self._saw_first(event, now_s)
        else:
            series.between_tokens.observe((now_s - self._last_s) / num_tokens)
        self._last_s = now_s

    def _saw_first(self, event: SequenceEvent, now_s: float) -> None:
        series = self._series
        series.first_token.observe(now_s - self._request.arrival_s)
        series.prompt_tokens.inc(len(self._request.prompt_token_ids))
        self.num_cached_tokens = event.num_cached_tokens or 0
        series.cached_tokens.inc(self.num_cached_tokens)
        if event.queue_s is not None:
            series.queue.observe(event.queue_s)
