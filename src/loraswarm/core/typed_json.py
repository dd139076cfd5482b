"""Makes frozen dataclasses of plain JSON values, exactly: nothing missing, unknown or out of range.

Knows annotations of plain data: numbers, texts, tuples of one kind, mappings, other dataclasses. A
number is never negative. Used for files that people keep and may edit.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

MAX_NUMBER = 2**63
T = TypeVar("T")


def from_json(kind: type[T], value: object) -> T:
    """A `kind`, which is a dataclass, from what json.loads gave.

    Raises   ValueError naming the field, as in `step.token_s[2]`, its value and what is allowed.
    """
    made: T = _object(kind, value, "")
    return made


def refuse(where: str, value: object, allowed: str) -> NoReturn:
    """Raise ValueError for a field's value."""
    raise ValueError(f"{where} is {reprlib.repr(value)}; it must be {allowed}")


def _value(kind: Any, value: object, where: str) -> Any:
    """`value` as an annotation of these dataclasses says, or ValueError naming `where`."""
    if is_dataclass(kind):
        return _object(kind, value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            refuse(where, value, "a list")
        element = get_args(kind)[0]
        return tuple(_value(element, each, f"{where}[{i}]") for i, each in enumerate(value))
    if get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            refuse(where, value, "an object")
        return value
    if NoneType in get_args(kind):
        if value is None:
            return None
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
        if kind is str and not isinstance(value, str):
            refuse(where, value, "a text or null")
    if kind is str:
        if not isinstance(value, str):
            refuse(where, value, "a text")
        return value
    return _number(kind, value, where)


def _object(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        refuse(where or "the document", value, "an object")
    prefix = f"{where}." if where else ""
    types = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    for name in value:
        if name not in names:
            raise ValueError(f"{prefix}{reprlib.repr(name)[1:-1]} is not known")
    for name in names:
        if name not in value:
            raise ValueError(f"{prefix}{name} is missing")
    return kind(**{name: _value(types[name], value[name], prefix + name) for name in names})


def _number(kind: type, value: object, where: str) -> int | float:
    is_number = isinstance(value, int if kind is int else int | float)
    if not is_number or isinstance(value, bool):
        refuse(where, value, "a whole number" if kind is int else "a number")
    assert isinstance(value, int | float)
    if not 0 <= value < MAX_NUMBER:  # NaN is neither
        refuse(where, value, "finite and >= 0")
    return value if kind is int else float(value)
