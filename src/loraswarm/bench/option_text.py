"""One option of a workload as a person wrote it: a kind and its values, `kind:value:value`.

Reads values and words the refusals; does not know what the kinds mean. Used by popularity, lengths
and arrivals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from loraswarm.errors import ConfigError

Parsed = TypeVar("Parsed")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class OptionText:
    """`field` names the option in messages, `forms` are those it may have.

    What its methods raise is always a ConfigError with field, value, what is wrong and the forms.
    """

    field: str
    text: str
    forms: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.text.partition(":")[0]

    def refusal(self, why: str) -> ConfigError:
        """The error to raise."""
        return ConfigError(f"{self.field} is {self.text!r}: {why}; give {' | '.join(self.forms)}")

    def parsed_by(self, parsers: Mapping[str, Callable[[OptionText], Parsed]]) -> Parsed:
        """What the parser of this option's kind makes of it."""
        parser = parsers.get(self.kind)
        if parser is None:
            raise self.refusal(f"{self.kind!r} is not known")
        return parser(self)

    def values(self, num_allowed: int) -> list[str]:
        """The texts after the kind, which must be that many."""
        values = self.text.split(":")[1:]
        if len(values) != num_allowed:
            raise self.refusal(f"{self.kind!r} takes {num_allowed} values, not {len(values)}")
        return values

    def file(self) -> Path:
        """All that follows the kind, as a path; it may have colons of its own."""
        name = self.text.partition(":")[2]
        if not name:
            raise self.refusal(f"{self.kind!r} needs a file")
        return Path(name)

    def integer(self, text: str, low: int, high: int) -> int:
        """A part of the option as an integer from `low` to `high`."""
        return self._read(text, int, low, high)

    def number(self, text: str, low: float, high: float) -> float:
        """A part of the option as a number from `low` to `high`, both allowed."""
        return self._read(text, float, low, high)

    def _read(self, text: str, read: Callable[[str], Number], low: Number, high: Number) -> Number:
        try:
            value = read(text)
        except ValueError:
            kind = "an integer" if read is int else "a number"
            raise self.refusal(f"{text!r} is not {kind}") from None
        if not low <= value <= high:
            raise self.refusal(f"{text!r} must be from {low:,} to {high:,}")
        return value
