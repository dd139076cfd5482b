"""Which adapter each request asks for: popularity mixes, drawn from a seed.

Knows adapters as indices only; the order in which they are listed is the order of popularity.
Which requests go to the base is `workload`'s. Called by workload.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loraswarm.bench.option_text import OptionText
from loraswarm.bench.traces import Column, read_adapters
from loraswarm.errors import ConfigError

BASE = -1
DRIFT_REQUESTS = 100
MAX_ALPHA = 20.0
RENAMED = ":renamed"
FORMS = (
    "uniform",
    "round-robin",
    "zipf:ALPHA",
    "zipf:ALPHA:drift=SHARE",
    "skew:SHARE_OF_ADAPTERS:SHARE_OF_REQUESTS",
    "distinct",
    "identical",
    "trace:FILE",
    "trace:FILE:renamed",
)

Indices = NDArray[np.int64]


class Popularity(Protocol):
    """A way to choose an adapter for every request."""

    def draw(self, num_adapters: int, num_requests: int, rng: np.random.Generator) -> Indices:
        """Indices below `num_adapters`, one a request; `BASE` where a trace asks for the base.

        Raises   ConfigError if the mix cannot be had with that many adapters or requests.
        """


def parse_popularity(
    text: str, adapters: Sequence[str] = (), field: str = "popularity"
) -> Popularity:
    """Read one of `FORMS`.

    A trace's names must be among `adapters`, the names in the order of the indices; with `renamed`
    the k-th distinct name of the file stands for the k-th adapter, whatever it is called. `field`
    is what messages call the option.

    Raises   ConfigError naming the field, its value and the allowed forms.
    """
    option = OptionText(field, text, FORMS)
    popularity = option.parsed_by(_PARSERS)
    if isinstance(popularity, TracePopularity):
        return replace(popularity, adapters=tuple(adapters))
    return popularity


@dataclass(frozen=True, slots=True)
class Uniform:
    """Each adapter with the same probability, each request for itself."""

    def draw(self, num_adapters: int, num_requests: int, rng: np.random.Generator) -> Indices:
        return rng.integers(0, num_adapters, num_requests, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """One adapter after the other in the order in which they are listed."""

    def draw(self, num_adapters: int, num_requests: int, rng: np.random.Generator) -> Indices:
        return np.arange(num_requests, dtype=np.int64) % num_adapters


@dataclass(frozen=True, slots=True)
class Distinct:
    """One adapter after the other in an order drawn once: no two of `num_adapters` requests in
    succession ask for the same, and neighbours in the list are not neighbours in time.
    """

    def draw(self, num_adapters: int, num_requests: int, rng: np.random.Generator) -> Indices:
        order = rng.permutation(num_adapters).astype(np.int64)
        return order[np.arange(num_requests) % num_adapters]


@dataclass(frozen=True, slots=True)
class Identical:
    """Every request asks for the first adapter."""

    def draw(self, num_adapters: int, num_requests: int, rng: np.random.Generator) -> Indices:
        return np.zeros(num_requests, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Zipf:
    """The adapter of popularity rank k (from 1) with a probability in proportion to k ** -alpha.

    At first adapter i has rank i + 1. After every `DRIFT_REQUESTS` requests, `drift_share` of the
    adapters (at least two of them, unless the share is 0 or there is only one) are drawn evenly and
    pass their ranks on in a circle, so that each of them has another rank than before and all
    others keep theirs.
    """

    alpha: float
    drift_share: float = 0.0

    def draw(self, num_adapters: int, num_requests: int, rng: np.random.Generator) -> Indices:
        weights = np.arange(1, num_adapters + 1, dtype=float) ** -self.alpha
        # Ranks are drawn first, so that they are the same with and without drift.
        ranks = _draw_by_weight(weights, num_requests, rng)
        adapter_of = np.arange(num_adapters, dtype=np.int64)
        drawn = np.empty(num_requests, dtype=np.int64)
        for start in range(0, num_requests, DRIFT_REQUESTS):
            if start:
                self._drift_(adapter_of, rng)
            stop = start + DRIFT_REQUESTS
            drawn[start:stop] = adapter_of[ranks[start:stop]]
        return drawn

    def _drift_(self, adapter_of: Indices, rng: np.random.Generator) -> None:
        if self.drift_share == 0.0 or len(adapter_of) == 1:
            return
        num_moved = max(2, round(self.drift_share * len(adapter_of)))
        moved = rng.choice(len(adapter_of), num_moved, replace=False)
        adapter_of[moved] = adapter_of[np.roll(moved, 1)]


@dataclass(frozen=True, slots=True)
class Skew:
    """The first `adapter_share` of the adapters get `request_share` of the requests, evenly among
    them; the others get the rest, evenly.

    The number of the first is rounded, and is at least one and not all; a single adapter gets every
    request.
    """

    adapter_share: float
    request_share: float

    def draw(self, num_adapters: int, num_requests: int, rng: np.random.Generator) -> Indices:
        num_hot = max(1, min(round(self.adapter_share * num_adapters), num_adapters - 1))
        weights = np.full(num_adapters, self.request_share / num_hot)
        if num_adapters > num_hot:
            weights[num_hot:] = (1.0 - self.request_share) / (num_adapters - num_hot)
        return _draw_by_weight(weights, num_requests, rng)


@dataclass(frozen=True, slots=True)
class TracePopularity:
    """The adapters of a trace's rows in their order; `BASE` where a row names none.

    `adapters` are the served names in the order of the indices; without them a trace can be drawn
    from only if it is `renamed`.
    """

    column: Column[str | None]
    renamed: bool
    adapters: tuple[str, ...] = ()

    def draw(self, num_adapters: int, num_requests: int, rng: np.random.Generator) -> Indices:
        asked = self.column.first(num_requests)
        names = list(dict.fromkeys(name for name in asked if name is not None))
        served = names if self.renamed else self.adapters
        self._require_served(names, served, num_adapters)
        index_of = {name: index for index, name in enumerate(served)}
        indices = [BASE if name is None else index_of[name] for name in asked]
        return np.array(indices, dtype=np.int64)

    def _require_served(
        self, names: Sequence[str], served: Sequence[str], num_adapters: int
    ) -> None:
        trace = f"popularity: trace {self.column.path}"
        if len(served) > num_adapters:
            raise ConfigError(f"{trace} asks for {len(served)} adapters, there are {num_adapters}")
        missing = sorted(set(names).difference(served))
        if missing:
            raise ConfigError(
                f"{trace} asks for {missing[0]!r} and {len(missing) - 1} other names that are not "
                f"among the adapters; append {RENAMED!r} to let its names stand for them in order"
            )


def _draw_by_weight(weights: NDArray[np.float64], num: int, rng: np.random.Generator) -> Indices:
    cumulative = np.cumsum(weights)
    drawn: Indices = np.searchsorted(cumulative, rng.random(num) * cumulative[-1], side="right")
    return drawn


def _parse_zipf(option: OptionText) -> Zipf:
    alpha, *drift = option.text.split(":")[1:] or [""]
    if len(drift) > 1 or (drift and not drift[0].startswith("drift=")):
        raise option.refusal("only drift=SHARE may follow the exponent")
    share = option.number(drift[0].removeprefix("drift="), 0.0, 1.0) if drift else 0.0
    return Zipf(option.number(alpha, 0.0, MAX_ALPHA), share)


def _parse_skew(option: OptionText) -> Skew:
    adapters, requests = option.values(2)
    return Skew(option.number(adapters, 0.0, 1.0), option.number(requests, 0.0, 1.0))


def _parse_trace(option: OptionText) -> TracePopularity:
    renamed = option.text.endswith(RENAMED)
    path = Path(str(option.file()).removesuffix(RENAMED))
    return TracePopularity(read_adapters(path), renamed)


def _without_arguments(popularity: Popularity) -> Callable[[OptionText], Popularity]:
    def parse(option: OptionText) -> Popularity:
        option.values(0)
        return popularity

    return parse


_PARSERS: dict[str, Callable[[OptionText], Popularity]] = {
    "uniform": _without_arguments(Uniform()),
    "round-robin": _without_arguments(RoundRobin()),
    "distinct": _without_arguments(Distinct()),
    "identical": _without_arguments(Identical()),
    "zipf": _parse_zipf,
    "skew": _parse_skew,
    "trace": _parse_trace,
}
