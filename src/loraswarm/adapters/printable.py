"""Text that others wrote, as messages may show it: one printable line of bounded length.

A name or a value in an adapter's files may hold line breaks, terminal escapes, or megabytes. Called
wherever an AdapterError is made of such text.
"""

from __future__ import annotations

import reprlib
from typing import Any

MAX_MESSAGE_CHARACTERS = 600
_MAX_NAME_CHARACTERS = 200
_MAX_VALUE_CHARACTERS = 240
_CUT = "..."

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80
_shortened.maxlevel = 2


def one_line(text: str, max_characters: int = _MAX_NAME_CHARACTERS) -> str:
    """The text with what cannot be printed escaped, cut to a length."""
    # Escapes are longer than what they stand for, so that nothing after this is needed.
    text = text[: max_characters + 1]
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    if len(text) <= max_characters:
        return text
    return text[: max_characters - len(_CUT)] + _CUT


def quoted(name: str) -> str:
    """A name of a file's own, in quotes."""
    return one_line(repr(name[:_MAX_NAME_CHARACTERS]), _MAX_NAME_CHARACTERS + 2)


def shortened(value: Any) -> str:
    """A value of a config, as Python writes it."""
    try:
        return one_line(_shortened.repr(value), _MAX_VALUE_CHARACTERS)
    except ValueError:
        # Python refuses to write out whole numbers of more than 4,300 digits.
        return "a number of thousands of digits"
