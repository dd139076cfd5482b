"""A scheduler without a model: made-up adapters and a rule for the next token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

from loraswarm.adapters.adapter import AdapterInfo, ModuleInfo
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.sequence import Sequence
from loraswarm.engine.policies import FirstComeFirstServed
from loraswarm.engine.scheduler import Scheduler, StepLimits
from loraswarm.engine.step import ChunkResult, Step
from loraswarm.engine.supply import EverythingAtHand
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.memory import Memory, MemoryOptions

SHAPE = BaseShape(
    num_layers=2,
    num_kv_heads=2,
    head_size=16,
    vocab_size=997,
    target_sizes=((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)),
)
GEOMETRY = page_geometry(SHAPE, element_bytes=4)


def make_info(name: str, rank: int = 8, num_sites: int = SHAPE.num_linears) -> AdapterInfo:
    """An adapter of one rank on the first linears; nothing is on disk."""
    modules = tuple(ModuleInfo(site, rank, 1.0) for site in range(num_sites))
    return AdapterInfo(
        name=name,
        path=Path("nowhere"),
        digest="0",
        method="lora",
        modules=modules,
        num_bytes=0,
    )


def make_odd_info(name: str, sites: list[int], rng: Random) -> AdapterInfo:
    """An adapter of small ranks on some linears; most of it fills no page."""
    modules = tuple(ModuleInfo(site, rng.choice([1, 2, 3, 5, 8]), 1.0) for site in sites)
    return replace(make_info(name), modules=modules)


def make_sequence(
    request_id: str, num_prompt: int, max_tokens: int, *infos: AdapterInfo
) -> Sequence:
    """A sequence whose prompt is recognisable; token 0 ends it."""
    base = sum(request_id.encode())
    prompt = tuple((base + i) % 996 + 1 for i in range(num_prompt))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    request = Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=params,
        adapters=tuple((info.name, 0.5) for info in infos),
    )
    return Sequence(
        request=request,
        mix=tuple((info.key, 0.5) for info in infos),
        seed=0,
        max_tokens=max_tokens,
        end_token_ids=frozenset({0}),
    )


class InstantCopies(Scheduler):
    """A scheduler whose adapters are copied into their pages at once."""

    def plan(self) -> Step:
        step = super().plan()
        if not step.loads:
            return step
        for load in step.loads:
            self._adapters.finish_load(load.info.key)
        after = super().plan()
        return Step(after.chunks, step.loads + after.loads, step.dropped + after.dropped)


def make_scheduler(
    num_pages: int, max_num_sequences: int = 8, max_step_tokens: int = 32, kind=InstantCopies
) -> tuple[Scheduler, Memory]:
    """A scheduler over a pool of `num_pages` pages, without a prefix cache."""
    options = MemoryOptions(policy="lru", has_prefix_cache=False)
    memory = Memory.of_pages(num_pages, SHAPE, GEOMETRY, options)
    limits = StepLimits(max_num_sequences, max_step_tokens)
    return kind(memory, FirstComeFirstServed(), EverythingAtHand(), limits), memory


def next_token(token_ids: list[int]) -> int:
    """A stand-in for the model: depends on every token, is never the end token."""
    value = 7
    for token in token_ids:
        value = (value * 31 + token) % 1_000_003
    return value % 996 + 1


def results_of(step: Step) -> list[ChunkResult]:
    """What the stand-in model says about a step."""
    return [
        ChunkResult(next_token(chunk.sequence.token_ids) if chunk.samples else None)
        for chunk in step.chunks
    ]


def expected_output(sequence: Sequence) -> list[int]:
    """The answer the sequence gets when nothing disturbs it."""
    tokens = list(sequence.request.prompt_token_ids)
    for _ in range(sequence.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[sequence.num_prompt :]
