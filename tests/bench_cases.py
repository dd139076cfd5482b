"""Results of the benchmark for tests, made of timelines whose figures are known."""

from __future__ import annotations

from collections.abc import Sequence

from loraswarm.bench.metrics import summarize
from loraswarm.bench.records import RequestRecord
from loraswarm.bench.report import Point, Result, point_of, result_of

ADAPTERS = ("sql", "pirate", None)


def record(
    index: int, first_s: float = 0.5, between_s: float = 0.1, error: str | None = None
) -> RequestRecord:
    """A request sent at `index` seconds: 5 tokens, the first after `first_s`.

    Adapters take turns in the order of ADAPTERS.
    """
    times = tuple(index + first_s + number * between_s for number in range(5))
    return RequestRecord(
        index=index,
        adapter=ADAPTERS[index % len(ADAPTERS)],
        num_prompt=7,
        max_tokens=5,
        start_s=float(index),
        response_s=times if error is None else (),
        num_output=5 if error is None else 0,
        error=error,
    )


def point(records: Sequence[RequestRecord], concurrency: int | None = 3, seed: int = 0) -> Point:
    """A run with its records."""
    return point_of(concurrency, summarize(records), records, seed)


def steady_point(first_s: float = 0.5, concurrency: int | None = 3) -> Point:
    """Seven equal requests: the last answer ends at 6 + `first_s` + 0.4 s."""
    return point([record(index, first_s) for index in range(7)], concurrency)


def result(*points: Point, target: str = "http://127.0.0.1:1", **options: object) -> Result:
    """A document of these runs."""
    return result_of(target, {"seed": 0, **options}, points)
