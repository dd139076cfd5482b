"""Decode speed of one engine: the same batch on the base and on as many distinct adapters.

    python benchmarks/decode.py --batch 32 --rank 16 --context 160

Random weights of Qwen2.5-0.5B dimensions in bfloat16. Base and adapter rounds alternate in one
process, so that a change of the machine's speed meets both; medians are printed, with the bytes a
step must read and the rate at which it read them beside the machine's own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from loraswarm.engine.engine_process import ENGINE_ENVIRONMENT

os.environ.update(ENGINE_ENVIRONMENT | os.environ)  # before torch is imported

import torch

from document import json_path, write_document
from loraswarm.config import EngineConfig
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine import Engine
from loraswarm.engine.setup import build_engine
from random_swarm import write_swarm

PREFILL_TOKENS = 256  # of a step beside a decoding batch: fewer than the engine takes


@dataclass(frozen=True)
class Measured:
    """Medians over the rounds of one case; `bytes_per_step` is what a step cannot avoid reading."""

    case: str
    step_ms: float
    tokens_per_s: float
    bytes_per_step: int
    gb_per_s: float


def max_output_tokens(batch: int, context: int, steps: int) -> int:
    """So many that no row ends before the last of `steps`, which begin when every row has started.

    A row that was prefilled first decodes while the others are prefilled, PREFILL_TOKENS of them
    or more a step.
    """
    return steps + 8 + batch * context // PREFILL_TOKENS


def engine_limits(batch: int, context: int, steps: int) -> dict[str, int]:
    """Options of an engine that can have such a batch in flight."""
    longest = context + max_output_tokens(batch, context, steps)
    return {"max_model_len": max(1024, longest), "max_num_sequences": max(128, batch)}


def full_step_s(engine: Engine, num_rows: int) -> float:
    """Seconds of one step, in which every row must get its token."""
    begin = time.perf_counter()
    num_events = len(engine.step())
    seconds = time.perf_counter() - begin
    assert num_events == num_rows, f"a step of {num_events} rows among steps of {num_rows}"
    return seconds


def start_rows(
    engine: Engine, adapters: list[str | None], num_prompt: int, max_tokens: int
) -> None:
    """Add as many requests of these lengths and step until all decode."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    for index, adapter in enumerate(adapters):
        prompt = tuple((index * 7919 + i * 31) % 4000 + 1 for i in range(num_prompt))
        engine.add(
            Request(request_id=f"r{index}", prompt_token_ids=prompt, params=params, adapter=adapter)
        )
    started: set[str] = set()
    while len(started) < len(adapters):
        started |= {event.request_id for event in engine.step()}


def run_round(engine: Engine, adapters: list[str | None], context: int, steps: int) -> float:
    """Seconds per decode step of one batch around the given context length."""
    max_tokens = max_output_tokens(len(adapters), context, steps)
    start_rows(engine, adapters, context - steps // 2, max_tokens)
    times = [full_step_s(engine, len(adapters)) for _ in range(steps)]
    engine.abort_all()
    return statistics.median(times[1:])


def read_bandwidth(num_bytes: int = 1 << 30) -> float:
    """GB/s at which this machine sums a large array, best of five."""
    data = torch.ones(num_bytes // 4)
    best = min(_timed(data.sum) for _ in range(5))
    return num_bytes / best / 1e9


def measure(engine: Engine, options: argparse.Namespace) -> list[Measured]:
    names = [f"a{i:03}" for i in range(options.batch)]
    cases: dict[str, list[str | None]] = {
        "base": [None] * options.batch,
        f"{options.batch} distinct adapters": list(names),
        "one adapter": [names[0]] * options.batch,
    }
    times: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(options.rounds + 1):
        for case, adapters in cases.items():
            times[case].append(run_round(engine, adapters, options.context, options.steps))
    rows = []
    for case, adapters in cases.items():
        seconds = statistics.median(times[case][1:])
        num_bytes = bytes_per_step(engine, adapters, options.context)
        rate = options.batch / seconds
        rows.append(Measured(case, seconds * 1e3, rate, num_bytes, num_bytes / seconds / 1e9))
    return rows


def bytes_per_step(engine: Engine, adapters: list[str | None], context: int) -> int:
    """Matrices once, each distinct adapter once, K and V of every sequence."""
    sizes = {row.name: row.num_bytes for row in engine.adapters()}
    distinct = {name for name in adapters if name is not None}
    kv_bytes = len(adapters) * context * engine.info.page_bytes // engine.info.page_tokens
    matrix_bytes = sum(weight.nbytes for weight in engine.decoder.matrices())
    return matrix_bytes + sum(sizes[name] for name in distinct) + kv_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="qwen2.5-0.5b")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    if options.steps < 2 or options.context <= options.steps // 2:
        parser.error("--steps must be 2 or more, --context more than half of it")
    with tempfile.TemporaryDirectory() as directory:
        write_swarm(Path(directory), options.size, options.batch, [options.rank])
        config = EngineConfig(
            model=f"{directory}/model",
            adapters=(f"{directory}/adapters",),
            num_threads=options.threads,
            **engine_limits(options.batch, options.context, options.steps),
        )
        engine = build_engine(config, print)
        rows = measure(engine, options)
    read_rate = read_bandwidth()
    print(f"machine reads {read_rate:.0f} GB/s with {torch.get_num_threads()} threads")
    print(f"{'case':24} {'ms/step':>8} {'tokens/s':>9} {'MB/step':>8} {'GB/s':>6} {'of base':>8}")
    for row in rows:
        share = row.tokens_per_s / rows[0].tokens_per_s
        print(
            f"{row.case:24} {row.step_ms:8.1f} {row.tokens_per_s:9.1f} "
            f"{row.bytes_per_step / 1e6:8.0f} {row.gb_per_s:6.1f} {share:8.0%}"
        )
    if options.json:
        found = {"read_gb_per_s": read_rate, "cases": [asdict(row) for row in rows]}
        write_document(options.json, options, found)


def _timed(function: object) -> float:
    begin = time.perf_counter()
    function()  # type: ignore[operator]
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
