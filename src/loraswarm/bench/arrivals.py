"""When requests are sent in an open loop: arrival processes, drawn from a seed.

Does not wait for anything; the runner does. Called by workload.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loraswarm.bench.option_text import OptionText
from loraswarm.bench.traces import Column, read_arrivals_s

MIN_RATE_PER_S, MAX_RATE_PER_S = 1e-6, 1e6
MIN_CV, MAX_CV = 0.01, 100.0
FORMS = ("closed", "poisson:PER_S", "gamma:PER_S:CV", "trace:FILE")

Seconds = NDArray[np.float64]


class Arrivals(Protocol):
    """A process of arrivals."""

    def draw(self, num: int, rng: np.random.Generator) -> Seconds:
        """The first arrivals after the run's start, ascending.

        Raises   ConfigError if a trace has fewer.
        """


def parse_arrivals(text: str, field: str = "arrivals") -> Arrivals | None:
    """Read one of `FORMS`; None for `closed`, where a request is sent when another has ended.

    `field` is what messages call it.

    Raises   ConfigError naming the field, its value and the allowed forms.
    """
    return OptionText(field, text, FORMS).parsed_by(_PARSERS)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps are independent and Gamma distributed, with a mean of 1 / `rate_per_s` seconds.

    `cv` is their deviation over their mean: 1 is a Poisson process, more comes in bursts.
    """

    rate_per_s: float
    cv: float

    def draw(self, num: int, rng: np.random.Generator) -> Seconds:
        shape = self.cv**-2
        return np.cumsum(rng.gamma(shape, 1.0 / (shape * self.rate_per_s), num))


@dataclass(frozen=True, slots=True)
class Poisson:
    """Gaps are independent and exponential, with a mean of 1 / `rate_per_s` seconds."""

    rate_per_s: float

    def draw(self, num: int, rng: np.random.Generator) -> Seconds:
        return np.cumsum(rng.exponential(1.0 / self.rate_per_s, num))


@dataclass(frozen=True, slots=True)
class TraceArrivals:
    """A trace's times, from 0 at its first request; nothing is drawn."""

    column: Column[float]

    def draw(self, num: int, rng: np.random.Generator) -> Seconds:
        return np.array(self.column.first(num), dtype=float)


def _parse_closed(option: OptionText) -> None:
    option.values(0)


def _parse_poisson(option: OptionText) -> Poisson:
    [rate] = option.values(1)
    return Poisson(_rate(option, rate))


def _parse_gamma(option: OptionText) -> Gamma:
    rate, cv = option.values(2)
    return Gamma(_rate(option, rate), option.number(cv, MIN_CV, MAX_CV))


def _rate(option: OptionText, text: str) -> float:
    return option.number(text, MIN_RATE_PER_S, MAX_RATE_PER_S)


_PARSERS: dict[str, Callable[[OptionText], Arrivals | None]] = {
    "closed": _parse_closed,
    "poisson": _parse_poisson,
    "gamma": _parse_gamma,
    "trace": lambda option: TraceArrivals(read_arrivals_s(option.file())),
}
