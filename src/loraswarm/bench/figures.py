"""Which figures of a run are shown, in what unit, and their medians over repeats.

One list for tables, comparisons and CSV files. Reads rows of a result's JSON form (bench/report);
knows no files and no layout.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

PERCENTILES = ("p50", "p90", "p95", "p99")
CLOSED = "closed"
OPEN_LOOP = "open loop"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of a row: `field`, or `statistic` of the distribution in `field`.

    What is stored is in seconds or per second; `scale` times that is what people are shown.
    """

    label: str
    field: str
    statistic: str | None = None
    scale: float = 1.0

    def value_in(self, row: Mapping[str, Any]) -> float | None:
        """The number as people are shown it; None if the row has none."""
        value = row[self.field]
        if self.statistic is not None and value is not None:
            value = value[self.statistic]
        return None if value is None else value * self.scale

    def median_of(self, rows: Iterable[Mapping[str, Any]]) -> float | None:
        """The median over the rows that have the number; None if no row has it."""
        values = [value for row in rows if (value := self.value_in(row)) is not None]
        return statistics.median(values) if values else None


def percentiles(label: str, field: str, scale: float = 1.0) -> tuple[Figure, ...]:
    """A figure for each percentile that is shown."""
    return tuple(Figure(f"{label} {name}", field, name, scale) for name in PERCENTILES)


OUTPUT_TOKENS = Figure("output tokens/s", "output_tokens_per_s")
RATES = (
    OUTPUT_TOKENS,
    Figure("requests/s", "requests_per_s"),
    Figure("good requests/s", "goodput_per_s"),
    Figure("tokens/s per user p50", "output_tokens_per_s_per_user", "p50"),
)
FIRST_TOKEN = percentiles("TTFT, ms", "time_to_first_token_s", 1000.0)
BETWEEN_TOKENS = percentiles("ITL, ms", "inter_token_latency_s", 1000.0)
LATENCY = percentiles("latency, s", "request_latency_s")
FIGURES = (*RATES, *FIRST_TOKEN, *BETWEEN_TOKENS, *LATENCY)
COUNTS = ("num_requests", "num_errors", "total_output_tokens", "total_prompt_tokens")
DOUBTS = ("num_uncounted", "num_other_length")


class Loop(NamedTuple):
    """What makes runs repeats of each other. Interrupted ones are repeats of none that ended.

    `arrivals` is `CLOSED`, or how requests arrive in an open loop; `concurrency` bounds what is in
    flight, None: nothing does.
    """

    concurrency: int | None
    arrivals: str = CLOSED
    is_complete: bool = True

    @property
    def is_open(self) -> bool:
        return self.arrivals != CLOSED

    @property
    def name(self) -> str:
        """How many requests are in flight, for the head of a column."""
        name = self.arrivals if self.is_open else f"{self.concurrency:,}"
        if self.is_open and self.concurrency is not None:
            name += f", at most {self.concurrency:,}"
        return name if self.is_complete else f"{name} (interrupted)"

    @property
    def title(self) -> str:
        """The same to stand alone."""
        if not self.is_open:
            return f"{self.concurrency:,} in flight" + self.name.removeprefix(
                f"{self.concurrency:,}"
            )
        return self.name if self.name.startswith(OPEN_LOOP) else f"{OPEN_LOOP}, {self.name}"


def loop_of(point: Mapping[str, Any]) -> Loop:
    """Of a run in its JSON form. What does not tell its arrivals is open if nothing bounds it."""
    concurrency = point["concurrency"]
    arrivals = point.get("arrivals", OPEN_LOOP if concurrency is None else CLOSED)
    return Loop(concurrency, arrivals, point.get("is_complete", True))


def by_loop(points: Iterable[Mapping[str, Any]]) -> dict[Loop, list[dict[str, Any]]]:
    """The summaries of a result's points; repeats of one loop together, in their order."""
    grouped: dict[Loop, list[dict[str, Any]]] = {}
    for point in points:
        grouped.setdefault(loop_of(point), []).append(point["summary"])
    return grouped


def last_loop(loops: Iterable[Loop]) -> Loop:
    """The last that was not interrupted, if there is one."""
    return max(enumerate(loops), key=lambda one: (one[1].is_complete, one[0]))[1]


def by_adapter(summaries: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each adapter in runs of one concurrency; those with most requests first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        for name, row in summary["per_adapter"].items():
            rows.setdefault(name, []).append(row)
    return dict(sorted(rows.items(), key=lambda one: (-total_of(one[1], "num_requests"), one[0])))


def total_of(rows: Sequence[Mapping[str, Any]], count: str) -> int:
    """The sum of a count over rows: a failure in one repeat must not vanish in a median."""
    return sum(row.get(count, 0) for row in rows)


def shown(value: float | None) -> str:
    """A number with three or four digits that mean something; `-` for None."""
    if value is None:
        return "-"
    # The bounds are where rounding carries to one digit more.
    num_decimals = 0 if value >= 99.95 or value == 0 else 1
    if 0 < value < 9.995:
        num_decimals = 2 if value >= 0.9995 else 3
    return f"{value:,.{num_decimals}f}"
