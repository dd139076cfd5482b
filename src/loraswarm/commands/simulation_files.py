"""What every simulation reads and leaves behind: columns of a trace file, a JSON document, a plot,
lines about how far it has come. Called by the commands of `loraswarm simulate`.
"""

from __future__ import annotations

import dataclasses
import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loraswarm.bench.traces import read_adapters, read_arrivals_s, read_tokens
from loraswarm.commands.bench_outputs import write_each

TraceColumns = tuple[Sequence[float], Sequence[str | None], Sequence[int], Sequence[int]]


def read_trace(path: Path) -> TraceColumns:
    """Arrivals in seconds, adapters, tokens of prompts and of outputs. Raises ConfigError."""
    return (
        read_arrivals_s(path).values,
        read_adapters(path).values,
        read_tokens(path, "prompt_tokens").values,
        read_tokens(path, "output_tokens").values,
    )


def write_results(
    options: Any, found: Sequence[Any], format_name: str, plot: Callable[[str], None]
) -> None:
    """The files that `options.json` and `options.plot` name; `found` and options are dataclasses.

    Raises   ConfigError for each that could not be written, together.
    """

    def write_json(path: str) -> None:
        document = {
            "format": format_name,
            "options": dataclasses.asdict(options),
            "runs": [dataclasses.asdict(one) for one in found],
        }
        Path(path).write_text(jsonlib.dumps(document, indent=2) + "\n", encoding="utf-8")

    writers = (("--json", options.json, write_json), ("--plot", options.plot, plot))
    write_each((name, path, write) for name, path, write in writers if path is not None)


def report(line: str) -> None:
    """Beside the table, which is standard output."""
    print(line, file=sys.stderr, flush=True)
