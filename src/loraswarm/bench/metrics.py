"""Numbers of a run, by the definitions of NVIDIA's AIPerf.

Of one request: time to first token = first response - start; latency = last response - start;
inter-token latency = (latency - time to first token) / (output tokens - 1). Of a run: duration =
last response of all - first start of all; rates are over it. Failed requests are counted by their
reasons and are in no other number. Reads `RequestRecord`s, knows nothing about who made them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from loraswarm.bench.goodput import Goodput, parse_goodput
from loraswarm.bench.records import RequestRecord

__all__ = [
    "BASE_ROW",
    "Goodput",
    "RequestMetrics",
    "Row",
    "Statistics",
    "Summary",
    "metrics_of",
    "parse_goodput",
    "summarize",
]
# The row of requests without an adapter.
BASE_ROW = "(base)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of a list of values: `std` is the population's, percentiles interpolate linearly."""

    mean: float
    std: float
    min: float
    max: float
    p50: float
    p90: float
    p95: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Statistics of the values that are not None; None if there are none."""
        array = np.array([value for value in values if value is not None], dtype=np.float64)
        if not array.size:
            return None
        p50, p90, p95, p99 = (float(p) for p in np.percentile(array, (50, 90, 95, 99)))
        return cls(
            mean=float(array.mean()),
            std=float(array.std()),
            min=float(array.min()),
            max=float(array.max()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            count=int(array.size),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Of one request that succeeded.

    `inter_token_latency_s` is None for an answer of one token; `output_tokens_per_s_per_user` is
    its inverse, and also None where all tokens came at once.
    """

    time_to_first_token_s: float
    request_latency_s: float
    inter_token_latency_s: float | None
    output_tokens_per_s_per_user: float | None
    num_output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Of a set of requests. Tokens, rates and statistics are of those that succeeded.

    `num_requests` includes the `num_errors` failed ones, which `errors` counts by reason.
    `duration_s` is the whole run's, also in an adapter's row, so that the rates of rows add up; it
    is 0, and the rates with it, if nothing succeeded. `total_cached_tokens` of the prompts were not
    computed; None if the server told it for no request. `goodput_per_s` is None without limits.
    Of those that succeeded, `num_uncounted` are the ones whose output tokens the server did not
    tell, so that parts of the stream stand for them; `num_other_length` of the rest do not have the
    number of output tokens that was asked for.
    """

    num_requests: int
    num_errors: int
    errors: dict[str, int]
    duration_s: float
    output_tokens_per_s: float
    requests_per_s: float
    total_output_tokens: int
    total_prompt_tokens: int
    total_cached_tokens: int | None
    num_uncounted: int
    num_other_length: int
    goodput_per_s: float | None
    time_to_first_token_s: Statistics | None
    inter_token_latency_s: Statistics | None
    request_latency_s: Statistics | None
    output_tokens_per_s_per_user: Statistics | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(Row):
    """Of a run: the row of all requests, and one for each adapter (`BASE_ROW`: the base)."""

    per_adapter: dict[str, Row]


def metrics_of(record: RequestRecord) -> RequestMetrics | None:
    """The metrics of one request; None if it failed."""
    if record.error is not None:
        return None
    first_s = record.response_s[0] - record.start_s
    latency_s = record.response_s[-1] - record.start_s
    between_s = None
    if record.num_output > 1:
        between_s = (latency_s - first_s) / (record.num_output - 1)
    return RequestMetrics(
        time_to_first_token_s=first_s,
        request_latency_s=latency_s,
        inter_token_latency_s=between_s,
        output_tokens_per_s_per_user=1.0 / between_s if between_s else None,
        num_output=record.num_output,
    )


def summarize(records: Sequence[RequestRecord], goodput: Goodput | None = None) -> Summary:
    """The numbers of a run; `goodput` are the limits of a good request, if any."""
    duration_s = _duration_s(records)
    base_name = _base_name({record.adapter for record in records})
    by_adapter: dict[str, list[RequestRecord]] = {}
    for record in records:
        name = base_name if record.adapter is None else record.adapter
        by_adapter.setdefault(name, []).append(record)
    rows = {name: _row(by_adapter[name], duration_s, goodput) for name in sorted(by_adapter)}
    total = _row(records, duration_s, goodput)
    values = {field.name: getattr(total, field.name) for field in fields(Row)}
    return Summary(**values, per_adapter=rows)


def _base_name(adapters: set[str | None]) -> str:
    """`BASE_ROW`, in more brackets if an adapter has that very name."""
    name = BASE_ROW
    while name in adapters:
        name = f"({name})"
    return name


def _duration_s(records: Sequence[RequestRecord]) -> float:
    """From the first start to the last response of what succeeded; 0 if nothing did."""
    succeeded = [record for record in records if record.error is None]
    if not succeeded:
        return 0.0
    last_s = max(record.response_s[-1] for record in succeeded)
    return last_s - min(record.start_s for record in succeeded)


def _row(records: Sequence[RequestRecord], duration_s: float, goodput: Goodput | None) -> Row:
    succeeded = [record for record in records if record.error is None]
    metrics = [one for record in succeeded if (one := metrics_of(record)) is not None]
    errors = Counter(record.error for record in records if record.error is not None)
    cached = [r.cached_tokens for r in succeeded if r.cached_tokens is not None]
    num_output = sum(record.num_output for record in succeeded)
    num_good = sum(_is_good(one, goodput) for one in metrics) if goodput else None
    return Row(
        num_requests=len(records),
        num_errors=len(records) - len(succeeded),
        errors=dict(errors.most_common()),
        duration_s=duration_s,
        output_tokens_per_s=_rate(num_output, duration_s),
        requests_per_s=_rate(len(succeeded), duration_s),
        total_output_tokens=num_output,
        total_prompt_tokens=sum(record.num_prompt for record in succeeded),
        total_cached_tokens=sum(cached) if cached else None,
        num_uncounted=sum(not record.is_counted for record in succeeded),
        num_other_length=sum(
            record.is_counted and record.num_output != record.max_tokens for record in succeeded
        ),
        goodput_per_s=None if num_good is None else _rate(num_good, duration_s),
        time_to_first_token_s=Statistics.of(one.time_to_first_token_s for one in metrics),
        inter_token_latency_s=Statistics.of(one.inter_token_latency_s for one in metrics),
        request_latency_s=Statistics.of(one.request_latency_s for one in metrics),
        output_tokens_per_s_per_user=Statistics.of(
            one.output_tokens_per_s_per_user for one in metrics
        ),
    )


def _is_good(metrics: RequestMetrics, goodput: Goodput) -> bool:
    """Whether every limit is kept; a request that lacks a limited metric is not good."""
    for field in fields(Goodput):
        limit = getattr(goodput, field.name)
        value = getattr(metrics, field.name)
        if limit is not None and (value is None or value > limit):
            return False
    return True


def _rate(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
