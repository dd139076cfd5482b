"""A real engine over a tiny random checkpoint and random adapters, and ways to drive it.

Knows the engine's public methods only. Everything is float32 unless asked otherwise, so that greedy
tokens are stable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from adapter_factory import save_random_adapter
from device_under_test import DEVICE
from loraswarm.config import EngineConfig
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine import Engine
from loraswarm.engine.setup import Report, build_engine
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from model_factory import save_tiny_model
from tiny_tokenizers import byte_level

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
RANKS = (1, 4, 8, 16, 17, 24, 40, 64)


def save_swarm(
    path: Path,
    num_adapters: int,
    ranks: Iterable[int] = RANKS,
    has_tokenizer: bool = False,
    **overrides: Any,
) -> None:
    """`path`/model and `path`/adapters/a000 ...; ranks take turns; `overrides` go to the model."""
    if has_tokenizer:
        tokenizer = byte_level()
        save_tiny_model(path / "model", vocab_size=tokenizer.vocab_size, **overrides)
        tokenizer._loaded.save_pretrained(path / "model")
    else:
        save_tiny_model(path / "model", **overrides)
    shape = decoder_config(read_config(path / "model")).shape()
    ranks = tuple(ranks)
    for index in range(num_adapters):
        save_random_adapter(
            path / "adapters" / f"a{index:03}",
            shape,
            rank=ranks[index % len(ranks)],
            alpha=32,
            seed=index,
            std=0.2,
        )


def make_engine(path: Path, report: Report | None = None, **options: Any) -> Engine:
    """The engine of a saved swarm; small pool and context, nothing captured before it is needed,
    and no prefix cache, which would let one request answer with what another has computed, unless
    `options` say otherwise."""
    defaults = {
        "device": DEVICE.type,
        "model": str(path / "model"),
        "adapters": (str(path / "adapters"),),
        "pool_bytes": 8 << 20,
        "num_threads": 2,
        "seed": 0,
        "host_cache_bytes": 64 << 20,
        "prefix_caching": False,
        "capture_at_start": False,
    }
    config = EngineConfig.from_options(defaults | options)
    return build_engine(config, report) if report else build_engine(config)


def prompt_of(index: int, length: int) -> tuple[int, ...]:
    """A prompt that differs from others; token ids 3 to 132."""
    return tuple((index * 37 + i * i * 11 + i) % 130 + 3 for i in range(length))


def make_request(
    request_id: str,
    adapter: str | None,
    prompt: tuple[int, ...],
    params: SamplingParams = GREEDY,
) -> Request:
    return Request(request_id=request_id, prompt_token_ids=prompt, params=params, adapter=adapter)


def mixed_requests(
    adapters: Iterable[str | None], params: SamplingParams = GREEDY
) -> list[Request]:
    """One request for each adapter given, with prompts of awkward lengths."""
    lengths = (1, 3, 7, 16, 17, 33, 50)
    return [
        make_request(f"r{i}", adapter, prompt_of(i, lengths[i % len(lengths)]), params)
        for i, adapter in enumerate(adapters)
    ]


def run(
    engine: Engine,
    requests: Iterable[Request],
    before_step: Callable[[int], None] | None = None,
) -> dict[str, list[SequenceEvent]]:
    """Serve the requests together to their ends; events by request id, invariants checked."""
    events: dict[str, list[SequenceEvent]] = {}
    for request in requests:
        events[request.request_id] = []
        engine.add(request)
    step = 0
    while engine.has_work:
        if before_step:
            before_step(step)
        for event in engine.step():
            assert not any(e.finish_reason for e in events[event.request_id])
            events[event.request_id].append(event)
        engine.check()
        step += 1
    assert all(found and found[-1].finish_reason for found in events.values())
    return events


def tokens_of(events: Iterable[SequenceEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def run_tokens(engine: Engine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Serve together; the generated tokens by request id."""
    return {name: tokens_of(events) for name, events in run(engine, requests).items()}


def run_alone(engine: Engine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Serve one after the other; the generated tokens by request id."""
    found: dict[str, list[int]] = {}
    for request in requests:
        found |= run_tokens(engine, [request])
    return found
