"""A workload: what is asked of which adapter when, made from its options and a seed.

Equal options give equal requests under one version of numpy. Each factor (adapters, base or not,
lengths of prompts and outputs, arrivals, prefixes, tokens) has a random stream of its own, so that
changing one leaves the others as they were. Called by commands/bench and benchmarks/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from loraswarm.bench.arrivals import parse_arrivals
from loraswarm.bench.lengths import parse_lengths
from loraswarm.bench.popularity import BASE, parse_popularity
from loraswarm.bench.records import PlannedRequest
from loraswarm.errors import ConfigError

# Lower ids are often special: unknown, begin and end of a text.
FIRST_TOKEN_ID = 3
MAX_REQUESTS = 10_000_000
MIN_WARMUP = 8
# A warm-up's prompts must not be among those of a later run, or prefixes would be cached.
WARMUP_SEEDS = 1 << 62
RANGES: dict[str, tuple[float, float]] = {
    "num_requests": (1, MAX_REQUESTS),
    "base_share": (0.0, 1.0),
    "shared_prefix_share": (0.0, 1.0),
    "num_prefixes": (1, MAX_REQUESTS),
    "vocab_size": (FIRST_TOKEN_ID + 2, 1 << 31),
    "seed": (0, (1 << 63) - 1),
}

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """What a workload is made from; the options that are text go into results as they are.

    `adapters` are in order of popularity. `base_share` of the requests, rounded to a whole number,
    ask for the base instead of the adapter that was drawn for them. `shared_prefix_share` of each
    prompt, rounded to tokens, is the beginning of one of `num_prefixes` texts of its adapter, drawn
    evenly; the rest of it is the request's own. Token ids are from `FIRST_TOKEN_ID` to below
    `vocab_size`.

    Raises   ConfigError naming the field, its value and what is allowed.
    """

    num_requests: int
    adapters: tuple[str, ...] = ()
    popularity: str = "uniform"
    base_share: float = 0.0
    prompt_lengths: str = "128"
    output_lengths: str = "64"
    arrivals: str = "closed"
    shared_prefix_share: float = 0.0
    num_prefixes: int = 1
    vocab_size: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        for field in RANGES:
            require_in_range(field, getattr(self, field))
        twice = [name for name, count in Counter(self.adapters).items() if count > 1]
        if twice:
            raise ConfigError(f"adapters: {twice[0]!r} is listed twice")
        if not self.adapters and self.base_share < 1.0:
            raise ConfigError(
                f"base_share is {self.base_share} and there are no adapters for the other requests;"
                " name adapters, or give 1"
            )


@dataclass(frozen=True, slots=True)
class _Streams:
    """One independent source of randomness a factor. New ones go last: they leave these alone."""

    base: np.random.SeedSequence
    popularity: np.random.SeedSequence
    prompt_lengths: np.random.SeedSequence
    output_lengths: np.random.SeedSequence
    arrivals: np.random.SeedSequence
    prefixes: np.random.SeedSequence
    prefix_texts: np.random.SeedSequence
    own_texts: np.random.SeedSequence


def build_requests(spec: WorkloadSpec) -> list[PlannedRequest]:
    """The requests in order; `arrival_s` is None in a closed loop.

    Raises   ConfigError if an option cannot be read or had with these adapters and requests.
    """
    streams = _Streams(*np.random.SeedSequence(spec.seed).spawn(len(fields(_Streams))))
    num = spec.num_requests
    adapters = _draw_adapters(spec, streams)
    prompt_lengths = parse_lengths(spec.prompt_lengths, "prompt_lengths").draw(
        num, np.random.default_rng(streams.prompt_lengths)
    )
    output_lengths = parse_lengths(spec.output_lengths, "output_lengths").draw(
        num, np.random.default_rng(streams.output_lengths)
    )
    arrivals = parse_arrivals(spec.arrivals)
    arrivals_s: Sequence[float | None] = [None] * num
    if arrivals is not None:
        arrivals_s = arrivals.draw(num, np.random.default_rng(streams.arrivals)).tolist()
    prompts = _make_prompts(spec, streams, adapters, prompt_lengths)
    return [
        PlannedRequest(
            index=index,
            adapter=None if adapters[index] == BASE else spec.adapters[adapters[index]],
            prompt_token_ids=prompts[index],
            max_tokens=int(output_lengths[index]),
            arrival_s=arrivals_s[index],
        )
        for index in range(num)
    ]


def warmup_requests(
    spec: WorkloadSpec, requests: Sequence[PlannedRequest], num: int | None
) -> list[PlannedRequest]:
    """Requests to send before those of `spec`: each model that they ask for in turn, the first
    asked for first, with prompts of their own. `num` None: one for each model, at least
    `MIN_WARMUP`.

    Lengths are drawn as for the run; where a trace has fewer of them than `num`, they come again.
    """
    models = list(dict.fromkeys(request.adapter for request in requests))
    num = max(MIN_WARMUP, len(models)) if num is None else num
    if num == 0:
        return []
    drawn = build_requests(
        replace(
            spec,
            num_requests=min(num, spec.num_requests),
            popularity="uniform",
            arrivals="closed",
            seed=(spec.seed + WARMUP_SEEDS) % (1 << 63),
        )
    )
    return [
        replace(drawn[index % len(drawn)], index=index, adapter=models[index % len(models)])
        for index in range(num)
    ]


def _draw_adapters(spec: WorkloadSpec, streams: _Streams) -> Indices:
    """An index of `spec.adapters` or BASE for each request."""
    popularity = parse_popularity(spec.popularity, spec.adapters)
    if not spec.adapters:
        return np.full(spec.num_requests, BASE, dtype=np.int64)
    rng = np.random.default_rng(streams.popularity)
    drawn = popularity.draw(len(spec.adapters), spec.num_requests, rng)
    if spec.base_share > 0.0 and BASE in drawn:
        raise ConfigError(
            f"base_share is {spec.base_share}, but {spec.popularity!r} says itself which requests "
            "are for the base; give 0"
        )
    order = np.random.default_rng(streams.base).permutation(spec.num_requests)
    drawn[order[: round(spec.base_share * spec.num_requests)]] = BASE
    return drawn


def _make_prompts(
    spec: WorkloadSpec, streams: _Streams, adapters: Indices, lengths: Indices
) -> list[tuple[int, ...]]:
    """Token ids of each prompt: the beginning of a prefix, then tokens of its own."""
    rng = np.random.default_rng(streams.prefixes)
    prefixes = rng.integers(0, spec.num_prefixes, spec.num_requests).tolist()
    prompts = []
    for index, (adapter, length) in enumerate(
        zip(adapters.tolist(), lengths.tolist(), strict=True)
    ):
        num_shared = round(spec.shared_prefix_share * length)
        prefix = (adapter - BASE, prefixes[index])
        shared = _tokens(streams.prefix_texts, prefix, num_shared, spec.vocab_size)
        own = _tokens(streams.own_texts, (index,), length - num_shared, spec.vocab_size)
        prompts.append((*shared, *own))
    return prompts


def _tokens(
    stream: np.random.SeedSequence, key: tuple[int, ...], num_tokens: int, vocab_size: int
) -> list[int]:
    """The first tokens of an endless text that depends on the stream and the key alone."""
    if num_tokens == 0:
        return []
    seed = np.random.SeedSequence(stream.entropy, spawn_key=(*stream.spawn_key, *key))
    tokens: list[int] = (
        np.random.default_rng(seed).integers(FIRST_TOKEN_ID, vocab_size, num_tokens).tolist()
    )
    return tokens


def require_in_range(field: str, value: float, name: str | None = None) -> None:
    """Refuse a number that a WorkloadSpec cannot have; `name` is what the message calls it.

    Raises   ConfigError.
    """
    low, high = RANGES[field]
    if isinstance(low, int) and type(value) is not int:
        raise ConfigError(f"{name or field} is {value!r}, it must be an integer")
    if not low <= value <= high:
        raise ConfigError(f"{name or field} is {value}, it must be from {low:,} to {high:,}")
