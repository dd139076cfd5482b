"""Traces: requests with their arrivals, adapters and lengths, from a seed or as given.

Each factor is drawn from a stream of its own, so that one can be changed while the others stay.
Times are stretched so that a machine is busy for a given share of them. Knows no policies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraswarm.core.cost_model import CostFigures
from loraswarm.core.step_cost import ChunkWork, StepWork
from loraswarm.errors import ConfigError

RANKS = (16, 32, 8, 64)
"""Ranks of adapters in turn, so that popularity says nothing about size."""
UTILIZATION = 0.8
TYPICAL_ROWS = 16
TYPICAL_CONTEXT = 256
BASE = -1
# Counts of tokens at these probabilities: code and conversation traces of the Azure LLM inference
# dataset 2023 (CC-BY). The ends are chosen here.
PROBABILITIES = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)
CODE_PROMPT = (1, 147, 578, 1469, 2745, 5194, 7315, 7436)
CODE_OUTPUT = (1, 7, 9, 13, 24, 55, 90, 252)
CONVERSATION_PROMPT = (1, 207, 396, 1020, 1189, 2735, 4083, 4142)
CONVERSATION_OUTPUT = (1, 54, 85, 129, 395, 424, 451, 601)

Reals = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A request; adapter None is the base."""

    arrival_s: float
    adapter: str | None
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, and the rank of each adapter."""

    name: str
    requests: tuple[TraceRequest, ...]
    ranks: Mapping[str, int]

    @classmethod
    def of(cls, name: str, requests: Sequence[TraceRequest]) -> Trace:
        """Adapters get their ranks in the order of their names."""
        names = sorted({one.adapter for one in requests if one.adapter is not None})
        ranks = {adapter: RANKS[place % len(RANKS)] for place, adapter in enumerate(names)}
        return cls(name, tuple(requests), ranks)


@dataclass(frozen=True, slots=True)
class Streams:
    """Independent random numbers for each factor of one trace."""

    num: int
    gaps: np.random.Generator
    adapters: np.random.Generator
    prompts: np.random.Generator
    outputs: np.random.Generator

    @classmethod
    def of(cls, num: int, seed: int, place: int) -> Streams:
        """For the trace at a place of the list; other places have other streams."""
        seeds = np.random.SeedSequence([seed, place]).spawn(4)
        return cls(num, *(np.random.default_rng(each) for each in seeds))

    def uniform(self, low: int, high: int) -> tuple[Indices, Indices]:
        """Lengths of prompts and outputs, from `low` to below `high`."""
        return (
            self.prompts.integers(low, high, self.num),
            self.outputs.integers(low, high, self.num),
        )

    def quantiles(self, prompt: Sequence[int], output: Sequence[int]) -> tuple[Indices, Indices]:
        """Lengths by the counts at `PROBABILITIES`; none is above the last."""
        found = [
            np.interp(rng.random(self.num), PROBABILITIES, counts).astype(np.int64)
            for rng, counts in ((self.prompts, prompt), (self.outputs, output))
        ]
        return found[0], found[1]

    def zipf(self, num_adapters: int, alpha: float, num: int | None = None) -> Indices:
        weights = np.arange(1, num_adapters + 1) ** -alpha
        shares = weights / weights.sum()
        return self.adapters.choice(num_adapters, self.num if num is None else num, p=shares)

    def gamma(self, cv: float) -> Reals:
        """Arrivals of gaps with this coefficient of variation, one a second on average."""
        return np.cumsum(self.gaps.gamma(cv**-2, cv**2, self.num))


Drawn = tuple[Reals, Indices, tuple[Indices, Indices]]


def _one(streams: Streams) -> Drawn:
    """One adapter."""
    return streams.gamma(1.0), np.zeros(streams.num, dtype=np.int64), streams.uniform(32, 192)


def _mostly_one(streams: Streams) -> Drawn:
    """Nine requests of ten for one adapter, the others for eight more or the base."""
    cold = streams.adapters.integers(BASE, 8, streams.num)
    chosen = np.where(streams.adapters.random(streams.num) < 0.9, 0, np.where(cold < 0, BASE, cold))
    return streams.gamma(1.0), chosen, streams.uniform(32, 192)


def _uniform(streams: Streams) -> Drawn:
    """Thirty-two adapters alike."""
    chosen = streams.adapters.integers(0, 32, streams.num)
    return streams.gamma(1.0), chosen, streams.uniform(32, 192)


def _slora(streams: Streams) -> Drawn:
    """S-LoRA's generator: adapter floor(n * power(alpha)), Gamma gaps, lengths from 8 to 511."""
    chosen = np.floor(32 * streams.adapters.power(0.3, streams.num)).astype(np.int64)
    return streams.gamma(2.0), chosen, streams.uniform(8, 512)


def _bursts(streams: Streams) -> Drawn:
    """As Azure's code trace: bursts of one adapter, of geometric size with a mean of ten."""
    sizes = streams.gaps.geometric(0.1, streams.num)
    starts = np.cumsum(streams.gaps.exponential(10.0, streams.num))
    burst = np.repeat(np.arange(streams.num), sizes)[: streams.num]
    times = starts[burst] + streams.gaps.uniform(0.0, 1.0, streams.num)
    chosen = streams.zipf(8, 1.1)[burst]
    order = np.argsort(times, kind="stable")
    return times[order], chosen[order], streams.quantiles(CODE_PROMPT, CODE_OUTPUT)


def _conversation(streams: Streams) -> Drawn:
    """As Azure's conversation trace: a rate that wanders, a few adapters and the base."""
    level, gaps = 0.0, []
    for gap, push in zip(
        streams.gaps.exponential(1.0, streams.num),
        streams.gaps.normal(size=streams.num),
        strict=True,
    ):
        level = 0.95 * level + 0.2 * push
        gaps.append(gap / np.exp(level))
    chosen = streams.zipf(9, 1.1) + BASE + 1
    chosen = np.where(chosen == 8, BASE, chosen)
    lengths = streams.quantiles(CONVERSATION_PROMPT, CONVERSATION_OUTPUT)
    return np.cumsum(gaps), chosen, lengths


def _phases(streams: Streams, num_requests: int) -> Drawn:
    chosen = np.arange(streams.num) // num_requests % 2
    return streams.gamma(1.0), chosen, streams.uniform(32, 192)


def _square(streams: Streams) -> Drawn:
    """Two adapters by turns, fifty requests each."""
    return _phases(streams, 50)


def _flapping(streams: Streams) -> Drawn:
    """Two adapters by turns, six requests each: hardly longer than a switch pays."""
    return _phases(streams, 6)


def _drifting_zipf(streams: Streams) -> Drawn:
    """Zipf 1.5 over sixteen adapters whose ranks move on by one after every forty requests."""
    shift = np.arange(streams.num) // 40
    return streams.gamma(1.0), (streams.zipf(16, 1.5) + shift) % 16, streams.uniform(32, 192)


_GENERATORS: Mapping[str, Callable[[Streams], Drawn]] = {
    "one": _one,
    "mostly-one": _mostly_one,
    "uniform": _uniform,
    "slora": _slora,
    "bursts": _bursts,
    "conversation": _conversation,
    "square": _square,
    "flapping": _flapping,
    "drifting-zipf": _drifting_zipf,
}
NAMES = tuple(_GENERATORS)


def make_trace(name: str, figures: CostFigures, num_requests: int, seed: int) -> Trace:
    """One of `NAMES` with so many requests, at `UTILIZATION` of the machine of `figures`.

    Raises   ConfigError naming the traces there are.
    """
    if name not in _GENERATORS:
        raise ConfigError(f"trace is {name!r}; it must be a file or one of {', '.join(NAMES)}")
    streams = Streams.of(num_requests, seed, NAMES.index(name))
    times, chosen, (prompts, outputs) = _GENERATORS[name](streams)
    names = [None if index == BASE else f"a{index:02d}" for index in chosen]
    requests = [
        TraceRequest(float(time), adapter, int(prompt), int(output))
        for time, adapter, prompt, output in zip(times, names, prompts, outputs, strict=True)
    ]
    return Trace.of(name, stretched(requests, figures))


def stretched(requests: Sequence[TraceRequest], figures: CostFigures) -> list[TraceRequest]:
    """The same from 0 on, with the gaps that make the machine busy for `UTILIZATION` of the time.

    A request is taken to cost its prompt, and its rows of decode steps of `TYPICAL_ROWS`.
    """
    first_s, last_s = requests[0].arrival_s, requests[-1].arrival_s
    busy_s = sum(request_s(one, figures) for one in requests)
    factor = busy_s / UTILIZATION / max(last_s - first_s, 1e-9)
    return [
        TraceRequest(
            factor * (one.arrival_s - first_s), one.adapter, one.prompt_tokens, one.output_tokens
        )
        for one in requests
    ]


def request_s(request: TraceRequest, figures: CostFigures) -> float:
    """Seconds of a machine that a request takes, without its adapter."""
    decode = ChunkWork(num_tokens=1, num_computed=TYPICAL_CONTEXT)
    decodes = StepWork.of([decode] * TYPICAL_ROWS, figures.kv_token_bytes)
    prompt = ChunkWork(num_tokens=request.prompt_tokens, num_computed=0)
    prompt_s = figures.step_s(StepWork.of([prompt], figures.kv_token_bytes)) - figures.step.fixed_s
    return prompt_s + request.output_tokens * figures.step_s(decodes) / TYPICAL_ROWS
