"""The table of a session: what each peer did, and how many times that ours did.

    python benchmarks/peers/comparison.py benchmarks/results/peers-zen5-4cores.json

Reads the document that session writes; knows nothing about how it was measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Point = dict[str, Any]
FORMAT = "loraswarm-peers"
FORMAT_VERSION = 2
MEMORY = (
    "PSS is sampled every few seconds; high water adds up the largest resident size of each"
    " process. A peer that touches its room for K/V only as it is used has it all in `PSS with all"
    " K/V room`, whatever the workload needed."
)


def table(document: dict[str, Any], ours: str) -> str:
    """Medians over repeats as Markdown: one row a workload and peer, ratios to ours beside."""
    points = {_key(result): result["points"] for result in document["results"]}
    ranks = {_key(result)[0]: result["options"]["ranks"] for result in document["results"]}
    workloads = list(dict.fromkeys(workload for workload, _ in points))
    lines = [
        "| workload | ranks | peer | runs | tokens/s (least-most) | ours is | TTFT p50 / p99 s |"
        " ours p50 is | ITL p50 ms | peak PSS / high water RSS GB | ours PSS is |"
        " PSS with all K/V room GB | ours is |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for workload in workloads:
        mine = points.get((workload, ours))
        for (other, peer), theirs in points.items():
            if other == workload:
                names = [workload, ",".join(map(str, ranks[workload])) or "-", peer]
                lines.append(_row(names, theirs, None if peer == ours else mine))
    everything = [point for several in points.values() for point in several]
    shares = _shares(points, document.get("weight_bytes", 0))
    return "\n".join([*lines, "", MEMORY, _rates(everything), *shares, *_drifts(points, ours)])


def _row(names: Sequence[str], points: Sequence[Point], ours: Sequence[Point] | None) -> str:
    rates = [_rate(point) for point in points]
    cells = [
        *names,
        str(len(points)),
        f"{statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})",
        _ratio(ours, points, _rate),
        f"{_median(points, _first('p50')):.2f} / {_median(points, _first('p99')):.2f}",
        _ratio(ours, points, _first("p50")),
        f"{_median(points, _between) * 1e3:.0f}",
        f"{_median(points, _pss) / 1e9:.2f} / {_median(points, _high_water) / 1e9:.2f}",
        _ratio(ours, points, _pss),
        f"{_median(points, _full) / 1e9:.2f}",
        _ratio(ours, points, _full),
    ]
    return f"| {' | '.join(cells)} |"


def _rates(points: Sequence[Point]) -> str:
    rates = [point["read_gb_per_s"] for point in points]
    if not rates:
        return "nothing was measured"
    return (
        f"The machine read {min(rates):.0f} to {max(rates):.0f} GB/s,"
        f" median {statistics.median(rates):.0f}, before each of {len(rates)} runs."
    )


def _shares(points: dict[tuple[str, str], list[Point]], weight_bytes: int) -> list[str]:
    """At which rate each peer went through the weights between the tokens of a single stream.

    In bfloat16: a peer that widens them reads more. Nothing for a document without their bytes.
    """
    lines = []
    for (workload, peer), several in points.items():
        if workload != "single" or weight_bytes == 0 or _median(several, _between) == 0:
            continue
        rate = weight_bytes / _median(several, _between) / 1e9
        share = rate / statistics.median(point["read_gb_per_s"] for point in several)
        lines.append(
            f"{peer}, one stream: {rate:.0f} GB/s of weights, {share:.0%} of the read rate"
        )
    return lines


def _drifts(points: dict[tuple[str, str], list[Point]], ours: str) -> list[str]:
    """How much our own rate changed between the first and the last place of each turn."""
    lines = []
    for (workload, peer), several in points.items():
        first = {point["repeat"]: _rate(point) for point in several if point["position"] == 0}
        last = {point["repeat"]: _rate(point) for point in several if point["position"] > 0}
        changes = [last[repeat] / first[repeat] for repeat in first if repeat in last]
        if peer == ours and changes:
            shown = ", ".join(f"{change:.2f}" for change in changes)
            lines.append(
                f"{workload}: ours at the end of each turn over ours at its start: {shown}"
            )
    return lines


def _ratio(
    ours: Sequence[Point] | None, theirs: Sequence[Point], value: Callable[[Point], float]
) -> str:
    if not ours:
        return "-"
    return f"{_median(ours, value) / _median(theirs, value):.2f} x"


def _median(points: Sequence[Point], value: Callable[[Point], float]) -> float:
    return statistics.median(map(value, points))


def _rate(point: Point) -> float:
    return float(point["summary"]["output_tokens_per_s"])


def _first(percentile: str) -> Callable[[Point], float]:
    return lambda point: float(point["summary"]["time_to_first_token_s"][percentile])


def _between(point: Point) -> float:
    """0 where every answer is one token: there is no time between tokens then."""
    statistics_of_run = point["summary"]["inter_token_latency_s"]
    return 0.0 if statistics_of_run is None else float(statistics_of_run["p50"])


def _pss(point: Point) -> float:
    return float(point["peak_pss_bytes"])


def _full(point: Point) -> float:
    return float(point["peak_pss_bytes"] + point["untouched_room_bytes"])


def _high_water(point: Point) -> float:
    return float(point["high_water_rss_bytes"])


def _key(result: dict[str, Any]) -> tuple[str, str]:
    return result["options"]["workload"], result["options"]["peer"]


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text())
    if (read.get("format"), read.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise SystemExit(f"{sys.argv[1]} is no {FORMAT} document of version {FORMAT_VERSION}")
    print(table(read, "loraswarm"))
