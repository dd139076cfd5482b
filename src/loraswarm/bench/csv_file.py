"""A result as a CSV file: a line for each run, and one for each adapter of each run.

Times are in seconds. Machine, versions and options stand in every line, so that files can be put
one below the other. Knows nothing about how a result is made.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraswarm.bench.figures import loop_of
from loraswarm.bench.reading import Result

COUNTS = (
    "num_requests",
    "num_errors",
    "total_output_tokens",
    "total_prompt_tokens",
    "total_cached_tokens",
    "num_uncounted",
    "num_other_length",
)
RATES = ("duration_s", "output_tokens_per_s", "requests_per_s", "goodput_per_s")
DISTRIBUTIONS = (
    "time_to_first_token_s",
    "inter_token_latency_s",
    "request_latency_s",
    "output_tokens_per_s_per_user",
)
STATISTICS = ("mean", "std", "min", "max", "p50", "p90", "p95", "p99")


def write_csv(result: Result, path: str | Path) -> None:
    """Write `result` to `path`, replacing a file that is there.

    `row` is "all" (a run's figures) or "adapter", whose name is in `adapter`: "(base)" for requests
    without one. What a row does not have is empty.
    """
    lines = list(_lines(result))
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _lines(result: Result) -> Iterator[dict[str, Any]]:
    about = {"target": result["target"], "created": result["created"]}
    for name in ("environment", "options"):
        about |= {f"{name}.{key}": _cell(value) for key, value in result[name].items()}
    for number, point in enumerate(result["points"]):
        loop = loop_of(point)
        run = {"run": number, "concurrency": loop.concurrency, "arrivals": loop.arrivals}
        run |= {"is_complete": loop.is_complete, "seed": point.get("seed")}
        summary = point["summary"]
        yield {**run, "row": "all", "adapter": None, **_figures(summary), **about}
        for name, row in summary["per_adapter"].items():
            yield {**run, "row": "adapter", "adapter": name, **_figures(row), **about}


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    figures = {name: row.get(name) for name in (*COUNTS, *RATES)}
    for field in DISTRIBUTIONS:
        found = row.get(field) or {}
        figures |= {f"{field}.{name}": found.get(name) for name in STATISTICS}
    return figures


def _cell(value: object) -> object:
    """Lists and the like as JSON; the rest as it is."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value
