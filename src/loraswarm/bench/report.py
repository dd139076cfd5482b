"""What a call of the benchmark found, as one JSON document: made and written.

Knows nothing about servers, nor how the figures are shown: table, csv_file, compare and plot take
what `result_of` makes, or what bench/reading has read. Called by the command line and benchmarks/.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraswarm.bench.csv_file import write_csv
from loraswarm.bench.environment import environment
from loraswarm.bench.reading import FORMAT, FORMAT_VERSION, Point, Result, read_result

if TYPE_CHECKING:
    from loraswarm.bench.metrics import Summary
    from loraswarm.bench.records import RequestRecord

__all__ = [
    "Point",
    "Result",
    "point_of",
    "read_result",
    "result_of",
    "without_records",
    "write_csv",
    "write_json",
]


def point_of(
    concurrency: int | None,
    summary: Summary,
    records: Sequence[RequestRecord] = (),
    seed: int | None = None,
    arrivals: str | None = None,
    is_complete: bool = True,
) -> Point:
    """One run: `concurrency` is None where nothing bounds it; `seed` made its workload.

    `records` are every request of the run; plots of distributions need them. `arrivals` as the
    workload has them; None: a closed loop, or an open one if nothing bounds it. A run that is not
    `is_complete` was interrupted.
    """
    point: Point = {"concurrency": concurrency, "is_complete": is_complete}
    if arrivals is not None:
        point["arrivals"] = arrivals
    point["summary"] = dataclasses.asdict(summary)
    if seed is not None:
        point["seed"] = seed
    if records:
        point["records"] = [dataclasses.asdict(record) for record in records]
    return point


def result_of(target_name: str, options: Mapping[str, Any], points: Iterable[Point]) -> Result:
    """The document of one call of the benchmark; `options` as they were given, without secrets.

    Several points of one concurrency are repeats: tables and plots show their medians.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "target": target_name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "options": dict(options),
        "points": list(points),
    }


def without_records(result: Result) -> Result:
    """The same result with its figures alone; `result` stays as it is."""
    points = [{k: v for k, v in point.items() if k != "records"} for point in result["points"]]
    return {**result, "points": points}


def write_json(result: Result, path: str | Path) -> None:
    """Write `result` to `path`, replacing a file that is there."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")
