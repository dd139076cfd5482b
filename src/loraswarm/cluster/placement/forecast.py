"""How many tokens a second each adapter will be asked for: a fast and a slow average of the past.

Knows names, not what tokens cost. Told by the front of every request; read by the planner.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastRules:
    """Half-lives of the two averages. Below `least_rate` tokens a second in both, an adapter is
    forgotten: its next request is as if it were the first."""

    fast_half_life_s: float = 15.0
    slow_half_life_s: float = 300.0
    least_rate: float = 1e-3


class Rates(NamedTuple):
    """Tokens a second, of prompts and of answers; one row an adapter."""

    names: list[str]
    prompt_rates: Floats
    output_rates: Floats


class LoadForecast:
    """Rates of token work by adapter.

    Semantics    after dt seconds with n tokens, each average goes (1 - 2^(-dt / half-life)) of the
                 way to n / dt; the forecast is the larger one: it rises with a burst at once, and
                 falls slowly after it.

        _averages    [fast | slow, adapter, prompt | output]
    """

    def __init__(self, rules: ForecastRules | None = None, now_s: float = 0.0) -> None:
        self._rules = rules or ForecastRules()
        self._now_s = now_s
        self._rows: dict[str, int] = {}
        self._averages: Floats = np.zeros((2, 0, 2))
        self._seen: dict[str, list[float]] = {}

    def saw(self, adapters: Iterable[str], prompt_tokens: float, output_tokens: float) -> None:
        """A request for these came, with so much of each to compute."""
        for name in adapters:
            seen = self._seen.setdefault(name, [0.0, 0.0])
            seen[0] += prompt_tokens
            seen[1] += output_tokens

    def forget(self, name: str) -> None:
        """It is served no more."""
        self._seen.pop(name, None)
        row = self._rows.get(name)
        if row is not None:
            self._averages[:, row] = 0.0

    def advance(self, now_s: float) -> None:
        """Take in what came until now. Nothing happens where no time has passed."""
        elapsed_s = now_s - self._now_s
        if elapsed_s <= 0:
            return
        self._now_s = now_s
        self._add_rows([name for name in self._seen if name not in self._rows])
        rates = np.zeros(self._averages.shape[1:])
        if self._seen:
            rows = [self._rows[name] for name in self._seen]
            rates[rows] = np.array(list(self._seen.values())) / elapsed_s
            self._seen.clear()
        half_lives = self._rules.fast_half_life_s, self._rules.slow_half_life_s
        for average, half_life_s in zip(self._averages, half_lives, strict=True):
            average += (rates - average) * (1.0 - 2.0 ** (-elapsed_s / half_life_s))
        self._drop_idle()

    def rates(self) -> Rates:
        """The forecast, of every adapter that is remembered."""
        most = self._averages.max(axis=0)
        return Rates(list(self._rows), most[:, 0].copy(), most[:, 1].copy())

    def _add_rows(self, names: list[str]) -> None:
        for name in names:
            self._rows[name] = len(self._rows)
        self._averages = np.concatenate([self._averages, np.zeros((2, len(names), 2))], axis=1)

    def _drop_idle(self) -> None:
        is_kept = self._averages.sum(axis=2).max(axis=0) >= self._rules.least_rate
        if is_kept.all():
            return
        names = [name for name, kept in zip(self._rows, is_kept.tolist(), strict=True) if kept]
        self._rows = {name: row for row, name in enumerate(names)}
        self._averages = self._averages[:, is_kept]
