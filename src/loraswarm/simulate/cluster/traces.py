"""Traces for a cluster: arrivals, adapters, lengths and ranks, from a seed or from a file.

Each factor is drawn from a stream of its own, so that one can be changed while the others stay.
Seconds are the recorded traces' until `scaled` makes a cluster busy for a given share of them.
Knows no policies and no replicas. Called by commands/simulate_cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loraswarm.cluster.routing.costs import StepEstimates
from loraswarm.core.cost_model import CostFigures
from loraswarm.core.step_cost import ChunkWork, StepWork
from loraswarm.errors import ConfigError
from loraswarm.simulate.machine import Machine, make_info
from loraswarm.simulate.traces import (
    CODE_OUTPUT,
    CODE_PROMPT,
    CONVERSATION_OUTPUT,
    CONVERSATION_PROMPT,
    PROBABILITIES,
    TYPICAL_CONTEXT,
    TYPICAL_ROWS,
)

RANKS = (8, 16, 32, 64)
RANK_SHARES = (0.35, 0.35, 0.2, 0.1)
ZIPF = 1.1
BASE = -1

Reals = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ClusterTrace:
    """Requests in order of arrival, a row each; `adapters` are places in `names`, BASE is none.

    `ranks` and `num_bytes`, in pages, are of the adapters.
    """

    name: str
    arrivals_s: Reals
    adapters: Indices
    prompts: Indices
    outputs: Indices
    names: Sequence[str]
    ranks: Indices
    num_bytes: Indices

    @property
    def num_requests(self) -> int:
        return len(self.arrivals_s)


@dataclass(frozen=True, slots=True)
class Streams:
    """Independent random numbers for each factor of one trace."""

    num: int
    num_adapters: int
    gaps: np.random.Generator
    levels: np.random.Generator
    adapters: np.random.Generator
    prompts: np.random.Generator
    outputs: np.random.Generator
    ranks: np.random.Generator

    @classmethod
    def of(cls, num: int, num_adapters: int, seed: int, place: int) -> Streams:
        """For the trace at a place of the list; other places have other streams."""
        seeds = np.random.SeedSequence([seed, place, 1]).spawn(6)
        return cls(num, num_adapters, *(np.random.default_rng(each) for each in seeds))

    def lengths(self, prompt: Sequence[int], output: Sequence[int]) -> tuple[Indices, Indices]:
        """By the counts at `PROBABILITIES`, interpolated; none is above the last."""
        pairs = (self.prompts, prompt), (self.outputs, output)
        found = [
            np.interp(rng.random(self.num), PROBABILITIES, counts).astype(np.int64)
            for rng, counts in pairs
        ]
        return found[0], found[1]

    def zipf(self, num: int) -> Indices:
        """Places of adapters, the most popular first."""
        weights = np.arange(1, self.num_adapters + 1, dtype=np.float64) ** -ZIPF
        edges = np.cumsum(weights / weights.sum())
        found = np.searchsorted(edges, self.adapters.random(num), side="right")
        return np.minimum(found, self.num_adapters - 1).astype(np.int64)


Drawn = tuple[Reals, Indices, tuple[Indices, Indices]]


def _wandering(rng: np.random.Generator, num: int, kept: float) -> Reals:
    """`num` numbers of a normal distribution, each with `kept` of the one before: AR(1)."""
    pushes = rng.normal(size=num)
    found, value = np.empty(num), float(pushes[0])
    step = float(np.sqrt(1.0 - kept**2))
    for place in range(num):
        found[place] = value
        value = kept * value + step * float(pushes[place])
    return found


def _at_rate(units: Reals, levels: Reals, grid_s: float) -> Reals:
    """Times at which a process of varying rate has done `units` of work; the last level lasts."""
    done = np.concatenate([[0.0], np.cumsum(levels) * grid_s])
    times = np.arange(len(levels) + 1) * grid_s
    beyond = np.maximum(units - done[-1], 0.0) / max(float(levels[-1]), 1e-3)
    found: Reals = np.interp(units, done, times) + beyond
    return found


CODE_RATE = 2.57
CODE_BURST = 5.5
CODE_BURST_S = 0.5
CODE_CORRELATION_S = 36.0
"""Of what is squared to be the level: the level's is half as long. With these the counts of
requests in 1, 10 and 60 s have variances of about 13, 72 and 164 times their means."""
CONVERSATION_RATE = 5.53
CONVERSATION_SPREAD = 0.2
CONVERSATION_CORRELATION_S = 120.0
DIURNAL_SWING = 1.0 / 7.0
"""Peak over trough of 4/3, over one day, which a trace is long."""
ON_OFF_S = 60.0
ON_SHARE = 0.25
DRIFT_REQUESTS = 200


def _code(streams: Streams) -> Drawn:
    """As Azure's code trace: bursts of one adapter, of geometric size, at a rate that wanders."""
    sizes = streams.gaps.geometric(1.0 / CODE_BURST, streams.num)
    starts = np.cumsum(streams.gaps.exponential(CODE_BURST / CODE_RATE, streams.num))
    burst = np.repeat(np.arange(streams.num), sizes)[: streams.num]
    starts = starts[: burst[-1] + 1]
    num_levels = int(2.0 * starts[-1]) + 64
    kept = float(np.exp(-1.0 / CODE_CORRELATION_S))
    starts = _at_rate(starts, _wandering(streams.levels, num_levels, kept) ** 2, 1.0)
    times = starts[burst] + streams.gaps.uniform(0.0, CODE_BURST_S, streams.num)
    chosen = streams.zipf(len(starts))[burst]
    order = np.argsort(times, kind="stable")
    return times[order], chosen[order], streams.lengths(CODE_PROMPT, CODE_OUTPUT)


def _conversation(streams: Streams) -> Drawn:
    """As Azure's conversation trace: Poisson, at a rate that wanders and follows the day."""
    units = np.cumsum(streams.gaps.exponential(1.0 / CONVERSATION_RATE, streams.num))
    num_levels = int(1.5 * units[-1]) + 16
    kept = float(np.exp(-1.0 / CONVERSATION_CORRELATION_S))
    levels = np.exp(CONVERSATION_SPREAD * _wandering(streams.levels, num_levels, kept))
    day = np.sin(2.0 * np.pi * np.arange(num_levels) / max(float(units[-1]), 1.0))
    times = _at_rate(units, levels * (1.0 + DIURNAL_SWING * day), 1.0)
    lengths = streams.lengths(CONVERSATION_PROMPT, CONVERSATION_OUTPUT)
    return times, streams.zipf(streams.num), lengths


def _on_off(streams: Streams) -> Drawn:
    """Each adapter is on for a minute on average, off for three, and Poisson while it is on."""
    chosen = streams.zipf(streams.num)
    order = np.argsort(chosen, kind="stable")
    _, counts = np.unique(chosen, return_counts=True)
    horizon_s = streams.num / CONVERSATION_RATE
    times = np.empty(streams.num)
    begin = 0
    for count in counts.tolist():
        found = _on_times(streams, count, horizon_s)
        times[order[begin : begin + count]] = found
        begin += count
    by_time = np.argsort(times, kind="stable")
    lengths = streams.lengths(CONVERSATION_PROMPT, CONVERSATION_OUTPUT)
    return times[by_time], chosen[by_time], lengths


def _on_times(streams: Streams, num: int, horizon_s: float) -> Reals:
    """`num` times, anywhere in those of the horizon in which one adapter is on."""
    num_cycles = int(2.0 * horizon_s * ON_SHARE / ON_OFF_S) + 4
    on_s = streams.levels.exponential(ON_OFF_S, num_cycles)
    off_s = streams.levels.exponential(ON_OFF_S * (1.0 / ON_SHARE - 1.0), num_cycles)
    starts = np.cumsum(on_s + off_s) - on_s
    shift = streams.levels.uniform(0.0, ON_OFF_S / ON_SHARE)
    within = np.minimum(on_s, np.maximum(horizon_s + shift - starts, 0.0))
    done = np.cumsum(within)
    at = streams.gaps.uniform(0.0, float(done[-1]), num)
    cycle = np.minimum(np.searchsorted(done, at, side="right"), num_cycles - 1)
    found: Reals = starts[cycle] + within[cycle] - (done[cycle] - at)
    return found


def _drifting_zipf(streams: Streams) -> Drawn:
    """Poisson; popularity moves on by one adapter after every DRIFT_REQUESTS requests."""
    shift = np.arange(streams.num) // DRIFT_REQUESTS
    chosen = (streams.zipf(streams.num) + shift) % streams.num_adapters
    times = np.cumsum(streams.gaps.exponential(1.0, streams.num))
    return times, chosen, streams.lengths(CONVERSATION_PROMPT, CONVERSATION_OUTPUT)


def _slora(streams: Streams) -> Drawn:
    """S-LoRA's generator: adapter floor(n * power(alpha)), Gamma gaps, lengths from 8 to 511."""
    chosen = np.floor(streams.num_adapters * streams.adapters.power(0.3, streams.num))
    lengths = tuple(
        each.integers(8, 512, streams.num) for each in (streams.prompts, streams.outputs)
    )
    times = np.cumsum(streams.gaps.gamma(0.25, 4.0, streams.num))
    return times, chosen.astype(np.int64), (lengths[0], lengths[1])


_GENERATORS: Mapping[str, Callable[[Streams], Drawn]] = {
    "code": _code,
    "conversation": _conversation,
    "on-off": _on_off,
    "drifting-zipf": _drifting_zipf,
    "slora": _slora,
}
NAMES = tuple(_GENERATORS)


def make_trace(
    name: str, machine: Machine, num_requests: int, num_adapters: int, seed: int
) -> ClusterTrace:
    """One of `NAMES`, from second 0 on, in its own seconds.

    Raises   ConfigError naming the traces there are.
    """
    if name not in _GENERATORS:
        raise ConfigError(f"trace is {name!r}; it must be a file or one of {', '.join(NAMES)}")
    streams = Streams.of(num_requests, num_adapters, seed, NAMES.index(name))
    times, chosen, (prompts, outputs) = _GENERATORS[name](streams)
    names = [f"a{place}" for place in range(num_adapters)]
    ranks = streams.ranks.choice(RANKS, num_adapters, p=RANK_SHARES)
    return ClusterTrace(
        name, times - times[0], chosen, prompts, outputs, names, ranks, bytes_of(machine, ranks)
    )


def of_columns(
    name: str,
    columns: tuple[Sequence[float], Sequence[str | None], Sequence[int], Sequence[int]],
    machine: Machine,
    seed: int,
) -> ClusterTrace:
    """From arrivals, adapters (None: the base), prompts and outputs; ranks are drawn."""
    times, adapters, prompts, outputs = columns
    names = sorted({each for each in adapters if each is not None})
    place = {name: row for row, name in enumerate(names)} | {None: BASE}
    streams = Streams.of(len(times), len(names), seed, len(NAMES))
    ranks = streams.ranks.choice(RANKS, len(names), p=RANK_SHARES)
    return ClusterTrace(
        name,
        np.array(times, dtype=np.float64),
        np.array([place[each] for each in adapters], dtype=np.int64),
        np.array(prompts, dtype=np.int64),
        np.array(outputs, dtype=np.int64),
        names,
        ranks,
        bytes_of(machine, ranks),
    )


def bytes_of(machine: Machine, ranks: Indices) -> Indices:
    """What LoRAs of these ranks on all linears take in pages."""
    of_rank = {rank: machine.bytes_of(make_info("one", rank)) for rank in RANKS}
    return np.array([of_rank[int(rank)] for rank in ranks], dtype=np.int64)


def busy_s(trace: ClusterTrace, figures: CostFigures, max_step_tokens: int) -> Reals:
    """Seconds of a replica that each request takes: its prompt in full steps, its answer in rows of
    decode steps of TYPICAL_ROWS, its adapter's products. Reading tiles, which rows share, and what
    is computed twice are not in it."""
    steps, step = StepEstimates(figures), figures.step
    sizes = np.append(trace.num_bytes, 0).astype(np.float64)[trace.adapters]
    own_s = np.where(trace.adapters == BASE, 0.0, step.adapted_token_s)
    own_s += step.lora_product_s * sizes
    decode = ChunkWork(num_tokens=1, num_computed=TYPICAL_CONTEXT)
    decodes = StepWork.of([decode] * TYPICAL_ROWS, figures.kv_token_bytes)
    row_s = figures.step_s(decodes) / TYPICAL_ROWS
    prompt_s = trace.prompts * steps.queued_prefill_s(1, max_step_tokens)
    pairs_s = step.attention_pair_s * trace.prompts.astype(np.float64) ** 2 / 2
    products_s = own_s * (trace.prompts + trace.outputs)
    found: Reals = prompt_s + pairs_s + trace.outputs * row_s + products_s
    return found


def scaled(
    trace: ClusterTrace, figures: CostFigures, num_replicas: int, share: float, step_tokens: int
) -> ClusterTrace:
    """The same with all gaps longer or shorter, so that replicas are busy for `share` of it."""
    total_s = float(busy_s(trace, figures, step_tokens).sum())
    span_s = max(float(trace.arrivals_s[-1] - trace.arrivals_s[0]), 1e-9)
    factor = total_s / num_replicas / share / span_s
    return replace(trace, arrivals_s=(trace.arrivals_s - trace.arrivals_s[0]) * factor)
