"""The JSON document of a benchmark: its rows, and what they were measured with and on.

Knows nothing about what the rows say. Used by every script here that has --json.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraswarm.bench.environment import environment
from loraswarm.commands.bench_outputs import check_outputs
from loraswarm.errors import ConfigError


def json_path(text: str) -> Path:
    """For argparse: a file that can be written, said before anything is measured.

    Raises   argparse.ArgumentTypeError naming what is in the way; no file is made or changed.
    """
    try:
        check_outputs({"--json": text})
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def write_document(path: Path, options: argparse.Namespace, rows: object) -> None:
    """`rows` beside the options, the commit, the versions and the machine."""
    document = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "options": {name: _plain(value) for name, value in vars(options).items()},
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
