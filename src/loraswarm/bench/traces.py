"""Trace files: when requests came, for which adapter, with how many tokens.

A file is CSV with a header or JSON lines, each row one request, in order of arrival, with any of
the columns arrival_s, adapter, prompt_tokens and output_tokens; or what benchmarks/traces writes.
Gzipped if it ends with .gz. This module reads and checks it; what a column is used for is
popularity's, lengths' and arrivals', which call it.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TextIO, TypeVar

from loraswarm.errors import ConfigError

MAX_TOKENS = 1 << 24
MAX_SECONDS = 1e12
GZIPPED = ".gz"
RECORDED_KEY = "num_adapters"  # in the first line of what benchmarks/traces writes
RECORDED_FORM = "[arrival_s, adapter, session, prompt_tokens, output_tokens]"
Value = TypeVar("Value")
Pairs = list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Column(Generic[Value]):
    """One column of a trace, a value for each request in the order of the file."""

    path: Path
    name: str
    values: tuple[Value, ...]

    def first(self, num_requests: int) -> tuple[Value, ...]:
        """The values of the first requests. Raises ConfigError if the trace has fewer."""
        if num_requests > len(self.values):
            raise ConfigError(
                f"trace {self.path} has {len(self.values):,} requests, "
                f"{num_requests:,} are asked for"
            )
        return self.values[:num_requests]


def read_adapters(path: Path) -> Column[str | None]:
    """Names of adapters; None is the base: an empty field in CSV, null in JSON.

    Raises   ConfigError naming file, line and column for what cannot be read, here and below.
    """
    return _column(path, "adapter")


def read_arrivals_s(path: Path) -> Column[float]:
    """Ascending seconds, from 0 at the first request: a slice of a longer trace starts at once."""
    arrivals = _column(path, "arrival_s")
    first_s = arrivals.values[0]
    return Column(path, "arrival_s", tuple(time_s - first_s for time_s in arrivals.values))


def read_tokens(path: Path, name: Literal["prompt_tokens", "output_tokens"]) -> Column[int]:
    """Numbers of tokens, at least 1."""
    return _column(path, name)


def _column(path: Path, name: str) -> Column[Any]:
    columns = _read(path)
    if name not in columns:
        raise ConfigError(f"trace {path} has no {name!r}; it has {', '.join(columns)}")
    return Column(path, name, tuple(columns[name]))


def _read(path: Path) -> dict[str, list[Any]]:
    """All columns, checked: every row has the same, and they ascend where they must."""
    rows_of = _ROWS.get(Path(path.name.removesuffix(GZIPPED)).suffix)
    if rows_of is None:
        raise ConfigError(f"trace {path} must be a file of {' or '.join(_ROWS)}, or .gz of one")
    columns: dict[str, list[Any]] = {}
    try:
        for num_before, (line, pairs) in enumerate(rows_of(path)):
            place = f"trace {path}, line {line}"
            row = _checked_row(place, pairs)
            if num_before and row.keys() != columns.keys():
                raise ConfigError(f"{place}: has {_listed(row)}, others {_listed(columns)}")
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
            _require_ascent(place, columns.get("arrival_s", []))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from error
    if not columns:
        raise ConfigError(f"trace {path} has no requests")
    return columns


def _open(path: Path) -> TextIO:
    """As text, line breaks as they are."""
    if path.name.endswith(GZIPPED):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _csv_rows(path: Path) -> Iterator[tuple[int, Pairs]]:
    """(line, columns and values) of each row; texts become what JSON would hold."""
    with _open(path) as file:
        reader = csv.reader(file, strict=True, skipinitialspace=True)
        header = [name.strip() for name in next(reader, [])]
        for fields in reader:
            place = f"trace {path}, line {reader.line_num}"
            if fields and len(fields) != len(header):
                raise ConfigError(f"{place}: {len(fields)} fields, the header has {len(header)}")
            if fields:
                named = zip(header, fields, strict=True)
                yield (
                    reader.line_num,
                    [(name, _from_text(place, name, text.strip())) for name, text in named],
                )


def _from_text(place: str, name: str, text: str) -> Any:
    if name == "adapter" or name not in _ALLOWED:
        return text or None
    try:
        return float(text) if name == "arrival_s" else int(text)
    except ValueError:
        raise ConfigError(f"{place}: {name} is {text!r}, not a number") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Pairs]]:
    """(line, keys and values) of each line that is not empty."""
    is_recorded, names = False, None
    for line, value in _json_lines(path):
        place = f"trace {path}, line {line}"
        if names is not None:
            yield line, _recorded_row(place, names, value)
        elif is_recorded:
            names = _recorded_names(place, value)
        elif not isinstance(value, tuple):
            raise ConfigError(f"{place}: not a JSON object")
        elif line == 1 and RECORDED_KEY in dict(value):
            is_recorded = True
        else:
            yield line, list(value)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value); a tuple of pairs is an object, which shows keys that come twice."""
    with _open(path) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                yield line, json.loads(text, object_pairs_hook=tuple)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"trace {path}, line {line}: not JSON: {error}") from error


def _recorded_names(place: str, adapters: Any) -> list[str]:
    """Of the second line of benchmarks/traces: an array for each adapter, its name first."""
    rows = adapters if isinstance(adapters, list) else []
    names = [row[0] for row in rows if isinstance(row, list) and row and isinstance(row[0], str)]
    if not names or len(names) < len(rows):
        raise ConfigError(f"{place}: not a list of adapters, each [name, ...]")
    return names


def _recorded_row(place: str, names: list[str], row: Any) -> Pairs:
    """Of the other lines: [arrival_s, index of adapter, session, prompt tokens, output tokens]."""
    if not isinstance(row, list) or len(row) != 5:
        raise ConfigError(f"{place}: not an array of {RECORDED_FORM}")
    arrival_s, index, _, num_prompt, num_output = row
    if type(index) is not int or not 0 <= index < len(names):
        raise ConfigError(f"{place}: {index!r} is no index of one of {len(names)} adapters")
    return [
        ("arrival_s", arrival_s),
        ("adapter", names[index]),
        ("prompt_tokens", num_prompt),
        ("output_tokens", num_output),
    ]


def _checked_row(place: str, pairs: Pairs) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ConfigError(f"{place}: a column comes twice in {_listed(pairs)}")
    for name, value in pairs:
        if name not in _ALLOWED:
            raise ConfigError(f"{place}: {name!r} is not known; columns are {_listed(_ALLOWED)}")
        is_allowed, allowed = _ALLOWED[name]
        if not is_allowed(value):
            raise ConfigError(f"{place}: {name} is {value!r}, it must be {allowed}")
    return row


def _require_ascent(place: str, arrivals_s: list[float]) -> None:
    if len(arrivals_s) > 1 and arrivals_s[-1] < arrivals_s[-2]:
        raise ConfigError(
            f"{place}: arrival_s is {arrivals_s[-1]}, before the {arrivals_s[-2]} above it"
        )


def _listed(names: Any) -> str:
    """Keys of a dict or of pairs, for messages."""
    return ", ".join(str(name if isinstance(name, str) else name[0]) for name in names) or "none"


def _is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < MAX_SECONDS


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TOKENS


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "arrival_s": (_is_time, "a number of seconds"),
    "adapter": (_is_name, "a name, or nothing for the base"),
    "prompt_tokens": (_is_length, f"an integer from 1 to {MAX_TOKENS:,}"),
    "output_tokens": (_is_length, f"an integer from 1 to {MAX_TOKENS:,}"),
}
_ROWS: dict[str, Callable[[Path], Iterator[tuple[int, Pairs]]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
}
