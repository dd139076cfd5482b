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
    DOUBTS,
    FIGURES,
    FIRST_TOKEN,
    LATENCY,
    OUTPUT_TOKENS,
    Loop,
    by_adapter,
    by_loop,
    last_loop,
    shown,
    total_of,
)
from loraswarm.bench.reading import Result

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
    runs = by_loop(result["points"])
    parts = [heading(result), aligned(_runs_table(runs))]
    last = last_loop(runs)
    if any(len(summary["per_adapter"]) > 1 for summary in runs[last]):
        parts.append(_adapters_part(last, runs[last]))
    parts += _doubts_part([point["summary"] for point in result["points"]])
    if not all(loop.is_complete for loop in runs):
        parts.append("INTERRUPTED: a run was cut off; it stands by itself and is in no median")
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


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Lines of equal columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(indent + GAP.join(cells).rstrip())
    return "\n".join(lines)


def _runs_table(runs: Mapping[Loop, list[dict[str, Any]]]) -> list[list[str]]:
    columns = list(runs.values())
    rows = [["requests in flight", *(one_line(loop.name) for loop in runs)]]
    if any(len(summaries) > 1 for summaries in columns):
        rows.append(["runs (medians below)", *(f"{len(summaries)}" for summaries in columns)])
    for label, count in (("requests", "num_requests"), ("failed requests", "num_errors")):
        rows.append([label, *(f"{total_of(summaries, count):,}" for summaries in columns)])
    for figure in FIGURES:
        values = [figure.median_of(summaries) for summaries in columns]
        if any(value is not None for value in values):
            rows.append([figure.label, *(shown(value) for value in values)])
    return rows


def _adapters_part(loop: Loop, summaries: Sequence[Mapping[str, Any]]) -> str:
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
    text = f"{one_line(loop.title)}, by adapter\n{aligned(lines)}"
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


def _doubts_part(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What throws doubt on the tokens of the figures."""
    num_uncounted, num_other = (total_of(summaries, name) for name in DOUBTS)
    lines = []
    if num_uncounted:
        lines.append(
            f"NOT COUNTED: {num_uncounted:,} answers came without the server's count of tokens;"
            " each part of their streams is taken for one token"
        )
    if num_other:
        lines.append(
            f"OTHER LENGTH: {num_other:,} answers have not as many tokens as were asked for"
        )
    return ["\n".join(lines)] if lines else []


def _errors_part(reasons: Counter[str]) -> list[str]:
    if not reasons:
        return []
    lines = [f"FAILED: {reasons.total():,} requests, in no figure above but the counts"]
    shown_reasons = reasons.most_common(MAX_REASONS)
    lines += [f"  {count:,} x {one_line(reason)}" for reason, count in shown_reasons]
    if len(reasons) > MAX_REASONS:
        lines.append(f"  ... and {len(reasons) - MAX_REASONS:,} other reasons (--json)")
    return ["\n".join(lines)]
