"""What every peer is asked, by name: the requests, how many at a time, and what comes before them.

Made by loraswarm.bench from a seed, so that every peer gets the same requests. Knows nothing about
peers. Used by peer and run_all.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    popularity: str = "uniform"
    base_share: float = 0.0
    concurrency: int = CONCURRENCY
    num_requests_share: float = 1.0

    @property
    def needs_adapters(self) -> bool:
        return self.base_share < 1.0


KINDS = {
    "single": Kind(base_share=1.0, concurrency=1, num_requests_share=1 / 12),
    "base": Kind(base_share=1.0),
    "one": Kind("identical"),
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
    """`warmup` is sent first and not counted: one short request for each model of `requests`."""

    name: str
    concurrency: int
    requests: Sequence[PlannedRequest]
    warmup: Sequence[PlannedRequest]
    options: dict[str, object]

    @property
    def longest_tokens(self) -> int:
        return max(len(one.prompt_token_ids) + one.max_tokens for one in self.requests)


def make_workload(name: str, adapters: Sequence[str], vocab_size: int, sizes: Sizes) -> Workload:
    """The workload `name` of KINDS over all of `adapters`."""
    kind = KINDS[name]
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
        warmup=_warmup(requests, spec),
        options={"workload": name, "concurrency": kind.concurrency} | asdict(spec),
    )


def _warmup(requests: Sequence[PlannedRequest], spec: WorkloadSpec) -> list[PlannedRequest]:
    """A prompt of its own for each model, so that no cache of prefixes helps what follows."""
    models = list(dict.fromkeys(request.adapter for request in requests))
    short = replace(
        spec,
        num_requests=len(models),
        prompt_lengths=str(NUM_WARMUP_PROMPT),
        output_lengths=str(NUM_WARMUP_OUTPUT),
        seed=spec.seed + (1 << 32),
    )
    drawn = build_requests(short)
    return [replace(one, adapter=model) for one, model in zip(drawn, models, strict=True)]
