"""Reads what bench/report wrote, and refuses what it did not write.

Everything that tables, comparisons and plots rely on is checked here, so that they need not. Knows
the shape of a result, nothing about what its numbers mean.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from loraswarm.adapters.printable import one_line, shortened
from loraswarm.bench.figures import CLOSED, COUNTS, DOUBTS, FIGURES
from loraswarm.errors import ConfigError

FORMAT = "loraswarm-bench"
FORMAT_VERSION = 1
TEXTS = ("target", "created")
OBJECTS = ("environment", "options")

Point = dict[str, Any]
Result = dict[str, Any]


def read_result(path: str | Path) -> Result:
    """The result in a file of `loraswarm bench --json`.

    Raises   ConfigError naming the file and the field, for anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(_not_ours(path, "it is no text")) from None
    try:
        result = json.loads(text, parse_constant=_refuse_constant)
        _check_result(result)
    except (ValueError, RecursionError) as error:
        raise ConfigError(_not_ours(path, one_line(str(error)))) from None
    return result  # type: ignore[no-any-return]


def _not_ours(path: str | Path, reason: str) -> str:
    return f"{str(path)!r} is no result of `loraswarm bench --json`: {reason}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which is no JSON")


def _check_result(result: object) -> None:
    """Raise ValueError saying which part of `result` is not as bench/report writes it."""
    fields = _object(result, "the document")
    found = fields.get("format"), fields.get("format_version")
    if found[0] != FORMAT:
        raise ValueError(f"format is {shortened(found[0])}, not {FORMAT!r}")
    if found[1] != FORMAT_VERSION:
        raise ValueError(f"format_version is {shortened(found[1])}; this reads {FORMAT_VERSION}")
    for name in TEXTS:
        if not isinstance(fields.get(name), str):
            raise ValueError(f"{name} is {shortened(fields.get(name))}, not a text")
    for name in OBJECTS:
        _object(fields.get(name), name)
    points = _list(fields.get("points"), "points")
    if not points:
        raise ValueError("points is empty")
    for number, point in enumerate(points):
        _check_point(point, f"points[{number}]")


def _check_point(point: object, where: str) -> None:
    fields = _object(point, where)
    concurrency = fields.get("concurrency", 0)
    if concurrency is not None:
        _check_number(concurrency, f"{where}.concurrency", is_count=True)
        if concurrency < 1:
            raise ValueError(f"{where}.concurrency is missing or 0")
    _check_loop(fields, where)
    summary = _object(fields.get("summary"), f"{where}.summary")
    _check_row(summary, f"{where}.summary")
    rows = _object(summary.get("per_adapter"), f"{where}.summary.per_adapter")
    for name, row in rows.items():
        place = f"{where}.summary.per_adapter[{shortened(name)}]"
        _check_row(_object(row, place), place)
    for number, record in enumerate(_list(fields.get("records", []), f"{where}.records")):
        _check_record(record, f"{where}.records[{number}]")


def _check_loop(fields: dict[str, Any], where: str) -> None:
    """How requests came and how the run ended; older results tell neither."""
    arrivals = fields.get("arrivals", "")
    if not isinstance(arrivals, str):
        raise ValueError(f"{where}.arrivals is {shortened(arrivals)}, not a text")
    if arrivals == CLOSED and fields["concurrency"] is None:
        raise ValueError(f"{where}.concurrency is None, but arrivals is {CLOSED!r}")
    is_complete = fields.get("is_complete", True)
    if not isinstance(is_complete, bool):
        raise ValueError(f"{where}.is_complete is {shortened(is_complete)}, not true or false")


def _check_row(row: dict[str, Any], where: str) -> None:
    for name in COUNTS:
        _check_number(row.get(name), f"{where}.{name}", is_count=True)
    for name in DOUBTS:
        _check_number(row.get(name, 0), f"{where}.{name}", is_count=True)
    for reason, count in _object(row.get("errors"), f"{where}.errors").items():
        _check_number(count, f"{where}.errors[{shortened(reason)}]", is_count=True)
    for figure in FIGURES:
        place = f"{where}.{figure.field}"
        if figure.field not in row:
            raise ValueError(f"{place} is missing")
        value = row[figure.field]
        if figure.statistic is not None and value is not None:
            place = f"{place}.{figure.statistic}"
            value = _object(value, f"{where}.{figure.field}").get(figure.statistic, "missing")
        if value is not None:
            _check_number(value, place)


def _check_record(record: object, where: str) -> None:
    """What distributions are drawn from."""
    fields = _object(record, where)
    _check_number(fields.get("start_s"), f"{where}.start_s")
    times = _list(fields.get("response_s"), f"{where}.response_s")
    for number, time in enumerate(times):
        _check_number(time, f"{where}.response_s[{number}]")
    _check_number(fields.get("num_output"), f"{where}.num_output", is_count=True)
    error = fields.get("error", 0)
    if not isinstance(error, str | None):
        raise ValueError(f"{where}.error is {shortened(error)}, neither a text nor null")
    if error is None and not times:
        raise ValueError(f"{where} has no error and no response_s")


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shortened(value)}, not an object")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {shortened(value)}, not a list")
    return value


def _check_number(value: object, where: str, is_count: bool = False) -> None:
    """A number that is not below 0 and that a float can hold."""
    kinds = (int,) if is_count else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(
            f"{where} is {shortened(value)}, not a {'count' if is_count else 'number'}"
        )
    if not 0 <= value < 2**63 or not math.isfinite(value):
        raise ValueError(f"{where} is {shortened(value)}, out of range")
