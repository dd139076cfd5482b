"""What every peer is asked, by name: the requests, how many at a time, and what comes before them.

Made by loraswarm.bench from a seed, so that every peer gets the same requests. Knows nothing about
peers. Used by peer and run_all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from loraswarm.bench.records import PlannedRequest
from loraswarm.bench.workload import WorkloadSpec, build_requests

CONCURRENCY = 32
NUM_WARMUP_PROMPT = 16
NUM_WARMUP_OUTPUT = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """How a workload differs from the others.

    `num_requests_share` makes it shorter: one request at a time takes long, and varies little.
    `is_largest_only` leaves one adapter, the first of the highest rank.
    """

    popularity: str = "uniform"
    base_share: float = 0.0
    concurrency: int = CONCURRENCY
    num_requests_share: float = 1.0
    is_largest_only: bool = False

    @property
    def needs_adapters(self) -> bool:
        return self.base_share < 1.0


KINDS = {
    "single": Kind(base_share=1.0, concurrency=1, num_requests_share=1 / 12),
    "base": Kind(base_share=1.0),
    "one": Kind("identical", is_largest_only=True),
    "uniform": Kind("uniform"),
    "skew": Kind("skew:0.2:0.8"),
    "distinct": Kind("distinct"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the workloads have in common."""

    num_requests: int
    prompt_lengths: str
    output_lengths: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`warmup` is sent first and not counted: a short request for the base and for each adapter.

    It has those that `requests` do not ask for too: a server full of adapters has loaded them.
    """

    name: str
    concurrency: int
    requests: Sequence[PlannedRequest]
    warmup: Sequence[PlannedRequest]
    options: dict[str, object]

    @property
    def longest_tokens(self) -> int:
        return max(len(one.prompt_token_ids) + one.max_tokens for one in self.requests)


def make_workload(name: str, ranks: Mapping[str, int], vocab_size: int, sizes: Sizes) -> Workload:
    """The workload `name` of KINDS over all adapters; `ranks` by their names."""
    kind = KINDS[name]
    adapters = [max(ranks, key=ranks.__getitem__)] if kind.is_largest_only else list(ranks)
    used_ranks = sorted({ranks[adapter] for adapter in adapters}) if kind.needs_adapters else []
    spec = WorkloadSpec(
        num_requests=max(1, round(sizes.num_requests * kind.num_requests_share)),
        adapters=tuple(adapters),
        popularity=kind.popularity,
        base_share=kind.base_share,
        prompt_lengths=sizes.prompt_lengths,
        output_lengths=sizes.output_lengths,
        vocab_size=vocab_size,
        seed=sizes.seed,
    )
    requests = build_requests(spec)
    return Workload(
        name=name,
        concurrency=kind.concurrency,
        requests=requests,
        warmup=_warmup([None, *ranks], spec),
        options={"workload": name, "concurrency": kind.concurrency, "ranks": used_ranks}
        | asdict(spec),
    )


def _warmup(models: Sequence[str | None], spec: WorkloadSpec) -> list[PlannedRequest]:
    """A prompt of its own for each model, so that no cache of prefixes helps what follows."""
    short = replace(
        spec,
        num_requests=len(models),
        prompt_lengths=str(NUM_WARMUP_PROMPT),
        output_lengths=str(NUM_WARMUP_OUTPUT),
        seed=spec.seed + (1 << 32),
    )
    drawn = build_requests(short)
    return [replace(one, adapter=model) for one, model in zip(drawn, models, strict=True)]
