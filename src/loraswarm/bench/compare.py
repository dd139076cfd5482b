"""Results side by side: the medians of each file, and their ratios to the first file's.

Points are matched by concurrency and arrivals; interrupted runs are not compared. Says where
options or machines differ, since then a ratio may mean something else. Called by `loraswarm bench
compare` and benchmarks/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraswarm.adapters.printable import one_line, shortened
from loraswarm.bench.figures import DOUBTS, FIGURES, Loop, by_loop, shown, total_of
from loraswarm.bench.reading import Result, read_result
from loraswarm.bench.table import aligned
from loraswarm.errors import ConfigError

# Options that say where to send and where to write, which do not change what is measured.
INCIDENTAL = {"url", "base_model", "csv", "json", "plot", "records", "timeout", "allow_errors"}


def compare(paths: Sequence[str | Path]) -> str:
    """Text for people about results in two or more files of `loraswarm bench --json`.

    Raises   ConfigError for fewer files, files of other formats, and no concurrency in common.
    """
    if len(paths) < 2:
        raise ConfigError(f"{len(paths)} file given; compare takes two or more")
    return compare_results([(str(path), read_result(path)) for path in paths])


def compare_results(named: Sequence[tuple[str, Result]]) -> str:
    """The same of results that are read already, each with a name."""
    runs = [by_loop(result["points"]) for _, result in named]
    common = [key for key in runs[0] if key.is_complete and any(key in other for other in runs[1:])]
    if not common:
        have = "; ".join(
            f"{one_line(name)}: {', '.join(one_line(key.title) for key in found)}"
            for (name, _), found in zip(named, runs, strict=True)
        )
        raise ConfigError(f"no file has a concurrency of the first file ({have})")
    parts = ["\n".join(_legend(named))]
    differences = [
        *_differences("options", [result["options"] for _, result in named], INCIDENTAL),
        *_differences("environment", [result["environment"] for _, result in named], set()),
    ]
    if differences:
        parts.append("\n".join(differences))
    parts += [_part(key, [found.get(key, []) for found in runs]) for key in common]
    left = sorted({one_line(key.name) for found in runs for key in found if key not in common})
    if left:
        parts.append(f"in flight, not compared: {', '.join(left)}")
    return "\n\n".join(parts)


def _legend(named: Sequence[tuple[str, Result]]) -> list[str]:
    return [
        f"[{number}] {one_line(name)}: {one_line(result['target'])}, {one_line(result['created'])}"
        for number, (name, result) in enumerate(named, 1)
    ]


def _differences(what: str, found: Sequence[Mapping[str, Any]], ignored: set[str]) -> list[str]:
    """A line for each key whose value is not the same everywhere."""
    keys = dict.fromkeys(key for one in found for key in one if key not in ignored)
    lines = []
    for key in keys:
        if all(key in one and one[key] == found[0].get(key) for one in found):
            continue
        values = [shortened(one[key]) if key in one else "absent" for one in found]
        lines.append(f"{what} differ: {one_line(key)}: {' | '.join(values)}")
    return lines


def _part(loop: Loop, columns: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """One table: a value for each file, and a ratio to the first for each but the first."""
    rows = [[one_line(loop.title), "[1]"]]
    for number in range(2, len(columns) + 1):
        rows[0] += [f"[{number}]", f"[{number}]/[1]"]
    for label, count in (("requests", "num_requests"), ("failed requests", "num_errors")):
        totals = [f"{total_of(runs, count):,}" if runs else "-" for runs in columns]
        rows.append(_row(label, totals))
    for label, count in (("answers not counted", DOUBTS[0]), ("of other length", DOUBTS[1])):
        if any(total_of(runs, count) for runs in columns):
            rows.append(_row(label, [f"{total_of(runs, count):,}" for runs in columns]))
    for figure in FIGURES:
        values = [figure.median_of(summaries) for summaries in columns]
        if any(value is not None for value in values):
            rows.append(_row(figure.label, [shown(value) for value in values], _ratios(values)))
    return aligned(rows)


def _row(label: str, values: Sequence[str], ratios: Sequence[str] | None = None) -> list[str]:
    cells = [label, values[0]]
    for number, value in enumerate(values[1:]):
        cells += [value, "" if ratios is None else ratios[number]]
    return cells


def _ratios(values: Sequence[float | None]) -> list[str]:
    """Of all but the first value, to the first."""
    unit = values[0]
    return ["-" if not unit or value is None else f"{value / unit:.2f} x" for value in values[1:]]
