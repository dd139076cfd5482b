"""A result as tables for people: a column for each concurrency, then a row for each adapter.

Shows medians over repeats and sums of counts; every failed request is seen here. Knows nothing
about how a result is made. Called by commands/bench and benchmarks/.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loraswarm.adapters.printable import one_line
from loraswarm.bench.figures import (
    BETWEEN_TOKENS,
    FIGURES,
    FIRST_TOKEN,
    LATENCY,
    OUTPUT_TOKENS,
    by_adapter,
    by_concurrency,
    shown,
    total_of,
)
from loraswarm.bench.reading import Result

OPEN_LOOP = "open loop"
GAP = "  "
MAX_ADAPTERS = 20
MAX_NAME = 60
MAX_REASONS = 5
ADAPTER_FIGURES = (
    OUTPUT_TOKENS,
    FIRST_TOKEN[0],
    FIRST_TOKEN[-1],
    BETWEEN_TOKENS[0],
    BETWEEN_TOKENS[-1],
    LATENCY[0],
)


def table(result: Result) -> str:
    """All that people are shown of a result: several lines, no line break at the end."""
    runs = by_concurrency(result["points"])
    parts = [heading(result), aligned(_runs_table(runs))]
    concurrency, last = list(runs.items())[-1]
    if any(len(summary["per_adapter"]) > 1 for summary in last):
        parts.append(_adapters_part(name_of(concurrency), last))
    parts += _errors_part(reasons_of(result))
    return "\n\n".join(parts)


def print_table(result: Result) -> None:
    """Print `table(result)` on standard output."""
    print(table(result), flush=True)


def heading(result: Result) -> str:
    """The target and the machine, in two lines."""
    found = result["environment"]
    commit = found.get("commit")
    facts = [
        found.get("cpu"),
        f"{found.get('num_cores')} cores",
        f"loraswarm {found.get('loraswarm')}",
        f"torch {found.get('torch')}",
        None if commit is None else f"commit {str(commit)[:10]}",
        result["created"],
    ]
    machine = ", ".join(one_line(str(fact)) for fact in facts if fact is not None)
    return f"{one_line(result['target'])}\n{machine}"


def name_of(concurrency: int | None) -> str:
    """How many requests were in flight."""
    return OPEN_LOOP if concurrency is None else f"{concurrency:,}"


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Lines of equal columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(indent + GAP.join(cells).rstrip())
    return "\n".join(lines)


def _runs_table(runs: Mapping[int | None, list[dict[str, Any]]]) -> list[list[str]]:
    columns = list(runs.values())
    rows = [["requests in flight", *(name_of(concurrency) for concurrency in runs)]]
    if any(len(summaries) > 1 for summaries in columns):
        rows.append(["runs (medians below)", *(f"{len(summaries)}" for summaries in columns)])
    for label, count in (("requests", "num_requests"), ("failed requests", "num_errors")):
        rows.append([label, *(f"{total_of(summaries, count):,}" for summaries in columns)])
    for figure in FIGURES:
        values = [figure.median_of(summaries) for summaries in columns]
        if any(value is not None for value in values):
            rows.append([figure.label, *(shown(value) for value in values)])
    return rows


def _adapters_part(concurrency: str, summaries: Sequence[Mapping[str, Any]]) -> str:
    rows_of = by_adapter(summaries)
    lines = [
        [
            "adapter",
            "requests",
            "failed",
            *(figure.label.replace("output ", "") for figure in ADAPTER_FIGURES),
        ]
    ]
    for name, rows in itertools.islice(rows_of.items(), MAX_ADAPTERS):
        counts = [f"{total_of(rows, count):,}" for count in ("num_requests", "num_errors")]
        figures = [shown(figure.median_of(rows)) for figure in ADAPTER_FIGURES]
        lines.append([one_line(name, MAX_NAME), *counts, *figures])
    text = f"{concurrency} in flight, by adapter\n" if concurrency != OPEN_LOOP else "by adapter\n"
    text += aligned(lines)
    if len(rows_of) > MAX_ADAPTERS:
        text += (
            f"\n... and {len(rows_of) - MAX_ADAPTERS:,} more with fewer requests (--json, --csv)"
        )
    return text


def reasons_of(result: Result) -> Counter[str]:
    """How often requests failed, by reason."""
    reasons: Counter[str] = Counter()
    for point in result["points"]:
        reasons.update(point["summary"]["errors"])
    return reasons


def _errors_part(reasons: Counter[str]) -> list[str]:
    if not reasons:
        return []
    lines = [f"FAILED: {reasons.total():,} requests, in no figure above but the counts"]
    shown_reasons = reasons.most_common(MAX_REASONS)
    lines += [f"  {count:,} x {one_line(reason)}" for reason, count in shown_reasons]
    if len(reasons) > MAX_REASONS:
        lines.append(f"  ... and {len(reasons) - MAX_REASONS:,} other reasons (--json)")
    return ["\n".join(lines)]
