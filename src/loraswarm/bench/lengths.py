"""How long prompts and outputs are: distributions of a number of tokens, drawn from a seed.

Does not know what the tokens are, nor which of prompt and output it draws. Called by workload.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from loraswarm.bench.option_text import OptionText
from loraswarm.bench.quantiles import TABLES, Quantiles, read_quantiles, table
from loraswarm.bench.traces import MAX_TOKENS, Column, read_tokens

MAX_SIGMA = 10.0
FORMS = (
    "N",
    "uniform:LOW:HIGH",
    "normal:MEAN:DEVIATION",
    "lognormal:MEDIAN:SIGMA",
    "quantiles:FILE",
    "trace-prompt:FILE",
    "trace-output:FILE",
)

Counts = NDArray[np.int64]
Reals = NDArray[np.float64]


class Lengths(Protocol):
    """A distribution of lengths in tokens."""

    def draw(self, num: int, rng: np.random.Generator) -> Counts:
        """That many lengths from 1 to `MAX_TOKENS`.

        Raises   ConfigError if a trace has fewer.
        """


def parse_lengths(text: str, field: str = "lengths") -> Lengths:
    """Read one of `FORMS` or the name of one of `TABLES`; `field` is what messages call it.

    Raises   ConfigError naming the field, its value and the allowed forms.
    """
    option = OptionText(field, text, (*FORMS, *TABLES))
    if text.isascii() and text.isdigit():
        return Fixed(option.integer(text, 1, MAX_TOKENS))
    return option.parsed_by(_PARSERS)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    length: int

    def draw(self, num: int, rng: np.random.Generator) -> Counts:
        return np.full(num, self.length, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Each length from `low` to `high`, both allowed, with the same probability."""

    low: int
    high: int

    def draw(self, num: int, rng: np.random.Generator) -> Counts:
        return rng.integers(self.low, self.high, num, dtype=np.int64, endpoint=True)


@dataclass(frozen=True, slots=True)
class Normal:
    """Rounded draws of a normal distribution; those below 1 are drawn anew, not raised to 1."""

    mean: float
    deviation: float

    def draw(self, num: int, rng: np.random.Generator) -> Counts:
        return _draw_allowed(lambda size: rng.normal(self.mean, self.deviation, size), num)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Rounded draws whose logarithm is normal about log(`median`); those below 1 are drawn anew.

    `sigma` is the deviation of the natural logarithm.
    """

    median: float
    sigma: float

    def draw(self, num: int, rng: np.random.Generator) -> Counts:
        log_median = np.log(self.median)
        return _draw_allowed(lambda size: rng.lognormal(log_median, self.sigma, size), num)


@dataclass(frozen=True, slots=True)
class TraceLengths:
    """A trace's lengths in their order; nothing is drawn."""

    column: Column[int]

    def draw(self, num: int, rng: np.random.Generator) -> Counts:
        return np.array(self.column.first(num), dtype=np.int64)


def _draw_allowed(draw: Callable[[int], Reals], num: int) -> Counts:
    """Rounded draws within 1 to `MAX_TOKENS`. The parsers see to it that many of them are."""
    lengths = np.empty(0, dtype=np.int64)
    while len(lengths) < num:
        drawn = np.rint(draw(num - len(lengths)))
        allowed = drawn[(drawn >= 1) & (drawn <= MAX_TOKENS)]
        lengths = np.concatenate([lengths, allowed.astype(np.int64)])
    return lengths


def _parse_uniform(option: OptionText) -> Uniform:
    low_text, high_text = option.values(2)
    low = option.integer(low_text, 1, MAX_TOKENS)
    return Uniform(low, option.integer(high_text, low, MAX_TOKENS))


def _parse_normal(option: OptionText) -> Normal:
    mean, deviation = option.values(2)
    # From a mean of 1 on, more than a third of the draws are allowed, whatever the deviation.
    return Normal(option.number(mean, 1.0, MAX_TOKENS), option.number(deviation, 0.0, MAX_TOKENS))


def _parse_lognormal(option: OptionText) -> Lognormal:
    median, sigma = option.values(2)
    return Lognormal(option.number(median, 1.0, MAX_TOKENS), option.number(sigma, 0.0, MAX_SIGMA))


def _parse_trace(
    name: Literal["prompt_tokens", "output_tokens"], option: OptionText
) -> TraceLengths:
    return TraceLengths(read_tokens(option.file(), name))


def _parse_table(option: OptionText) -> Quantiles:
    option.values(0)
    return table(option.kind)


_PARSERS: dict[str, Callable[[OptionText], Lengths]] = {
    "uniform": _parse_uniform,
    "normal": _parse_normal,
    "lognormal": _parse_lognormal,
    "quantiles": lambda option: read_quantiles(option.file()),
    "trace-prompt": partial(_parse_trace, "prompt_tokens"),
    "trace-output": partial(_parse_trace, "output_tokens"),
    **dict.fromkeys(TABLES, _parse_table),
}
