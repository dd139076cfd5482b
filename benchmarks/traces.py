"""Request traces: who asks which adapter when, with which prompt, in a file that can be replayed.

    python benchmarks/traces.py benchmarks/traces/zipf-drift.jsonl.gz

Popularity of adapters is Zipf's and drifts; sessions of several turns arrive as a Poisson process,
and each turn's prompt is its adapter's system prompt and all that was said before. Made from a
seed; no torch. Read by benchmarks/eviction.
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

RANKS = (8, 16, 32, 64)
RANK_WEIGHTS = (0.35, 0.35, 0.2, 0.1)
MIN_SYSTEM_TOKENS, MAX_SYSTEM_TOKENS = 64, 512
MIN_TURN_TOKENS, MAX_TURN_TOKENS = 4, 512
VOCABULARY = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What a trace is made from; equal options give equal traces.

    The adapter of popularity rank i is asked with probability ~ i ** -alpha. Every `drift_requests`
    requests, `drift_share` of the adapters, drawn evenly, swap their popularity ranks.
    """

    num_requests: int = 9000
    num_adapters: int = 2000
    alpha: float = 1.1
    drift_requests: int = 500
    drift_share: float = 0.05
    requests_per_s: float = 3.5
    session_turns: int = 3
    think_s: float = 8.0
    question_tokens: int = 60
    answer_tokens: int = 60
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TraceAdapter:
    name: str
    rank: int
    num_system_tokens: int


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One turn of a session; `adapter` is an index into `Trace.adapters`."""

    arrival_s: float
    adapter: int
    session: int
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Adapters and their requests in order of arrival."""

    options: TraceOptions
    adapters: tuple[TraceAdapter, ...]
    requests: tuple[TraceRequest, ...]

    def token_ids(self, request: TraceRequest) -> tuple[int, ...]:
        """Prompt and answer: the adapter's system prompt, then the beginning of the session's text.

        Two turns of a session agree as far as the shorter goes, two sessions of an adapter in the
        system prompt alone.
        """
        num_system = self.adapters[request.adapter].num_system_tokens
        num_said = request.num_prompt_tokens + request.num_output_tokens - num_system
        system = _stream(1, request.adapter, MAX_SYSTEM_TOKENS)[:num_system]
        said = _stream(2, request.session, num_said)
        return (*system, *said)

    def save(self, path: Path) -> None:
        """JSON lines: options, adapters, then an array per request; gzipped for `.gz`."""
        lines = [json.dumps(asdict(self.options))]
        lines.append(json.dumps([[a.name, a.rank, a.num_system_tokens] for a in self.adapters]))
        for request in self.requests:
            row = list(asdict(request).values())
            lines.append(json.dumps(row, separators=(",", ":")))
        data = ("\n".join(lines) + "\n").encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)

    @classmethod
    def load(cls, path: Path) -> Trace:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        options, adapters, *requests = map(json.loads, data.decode().splitlines())
        return cls(
            TraceOptions(**options),
            tuple(TraceAdapter(*row) for row in adapters),
            tuple(TraceRequest(*row) for row in requests),
        )


def make_trace(options: TraceOptions) -> Trace:
    """A trace of exactly `num_requests` requests; the last sessions may be cut short."""
    rng = np.random.default_rng([options.seed, 0])
    adapters = _make_adapters(options, rng)
    num_sessions = -(-options.num_requests // options.session_turns)
    gap_s = options.session_turns / options.requests_per_s
    starts_s = np.cumsum(rng.exponential(gap_s, num_sessions))
    popularity = _Popularity(options)
    requests: list[TraceRequest] = []
    for session, start_s in enumerate(starts_s):
        adapter = popularity.draw(session * options.session_turns)
        num_system = adapters[adapter].num_system_tokens
        requests += _session(options, rng, (float(start_s), adapter, session, num_system))
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(options, adapters, tuple(requests[: options.num_requests]))


class _Popularity:
    """Draws adapters; which adapter has which popularity rank changes as requests go by."""

    def __init__(self, options: TraceOptions) -> None:
        self._options = options
        self._rng = np.random.default_rng([options.seed, 1])
        weights = np.arange(1, options.num_adapters + 1, dtype=float) ** -options.alpha
        self._cumulative = np.cumsum(weights / weights.sum())
        self._adapter_of = self._rng.permutation(options.num_adapters)
        self._num_drifts = 0

    def draw(self, num_requests_before: int) -> int:
        while (self._num_drifts + 1) * self._options.drift_requests <= num_requests_before:
            self._drift()
        rank = int(np.searchsorted(self._cumulative, self._rng.random() * self._cumulative[-1]))
        return int(self._adapter_of[rank])

    def _drift(self) -> None:
        num_moved = round(self._options.drift_share * self._options.num_adapters)
        moved = self._rng.choice(self._options.num_adapters, num_moved, replace=False)
        self._adapter_of[moved] = self._adapter_of[self._rng.permutation(moved)]
        self._num_drifts += 1


def _make_adapters(options: TraceOptions, rng: np.random.Generator) -> tuple[TraceAdapter, ...]:
    ranks = rng.choice(RANKS, options.num_adapters, p=RANK_WEIGHTS)
    low, high = np.log(MIN_SYSTEM_TOKENS), np.log(MAX_SYSTEM_TOKENS)
    sizes = np.exp(rng.uniform(low, high, options.num_adapters)).round()
    return tuple(
        TraceAdapter(f"a{index:04}", int(rank), int(size))
        for index, (rank, size) in enumerate(zip(ranks, sizes, strict=True))
    )


def _session(
    options: TraceOptions, rng: np.random.Generator, place: tuple[float, int, int, int]
) -> list[TraceRequest]:
    """The turns of one session: what was said so far is part of the next prompt."""
    arrival_s, adapter, session, num_tokens = place
    turns = []
    for _ in range(options.session_turns):
        num_tokens += _turn_tokens(rng, options.question_tokens)
        num_output = _turn_tokens(rng, options.answer_tokens)
        turns.append(TraceRequest(round(arrival_s, 3), adapter, session, num_tokens, num_output))
        num_tokens += num_output
        arrival_s += float(rng.lognormal(np.log(options.think_s), 0.7))
    return turns


def _turn_tokens(rng: np.random.Generator, median: int) -> int:
    drawn = int(rng.lognormal(np.log(median), 0.8))
    return min(max(drawn, MIN_TURN_TOKENS), MAX_TURN_TOKENS)


def _stream(kind: int, index: int, num_tokens: int) -> list[int]:
    """The first tokens of an endless text that depends on its kind and index alone."""
    rng = np.random.default_rng([kind, index])
    tokens: list[int] = rng.integers(1, VOCABULARY, num_tokens).tolist()
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path)
    defaults = TraceOptions()
    for name in ("num_requests", "num_adapters", "alpha", "drift_requests", "seed"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    path = options.pop("path")
    trace = make_trace(TraceOptions(**options))
    trace.save(path)
    asked = {request.adapter for request in trace.requests}
    print(f"{len(trace.requests)} requests for {len(asked)} adapters in {path}")


if __name__ == "__main__":
    main()
