"""What merging costs and what it saves, on one engine of random weights.

    python benchmarks/merging.py --batch 32 --rank 16

Prints the seconds to merge each kind of linear and its share of the rate at which torch copies one,
the time of decode steps on the base, with one adapter unmerged, merged, and with other rows beside
it, and the longest steps while the engine switches under its own budget.
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

import numpy as np
import torch

from decode import engine_limits, full_step_s, max_output_tokens, start_rows
from document import json_path, write_document
from loraswarm.config import EngineConfig
from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.engine import Engine
from loraswarm.engine.merging import Merger
from loraswarm.engine.setup import build_engine
from random_swarm import write_swarm

TARGETS = ("qkv", "o", "gate_up", "down")
REPEATS = 5
RESTING_STEPS = 8


@dataclass(frozen=True)
class Merged:
    """One kind of linear: the best of REPEATS, and torch's copy of as many bytes."""

    linear: str
    num_bytes: int
    merge_us: float
    copy_us: float


@dataclass(frozen=True)
class Steps:
    """Decode steps of one case, in milliseconds."""

    case: str
    median_ms: float
    p99_ms: float
    num_steps: int


def key_of(engine: Engine, merger: Merger, name: str) -> AdapterKey:
    """The content of an adapter, once the engine has read it."""
    while (key := merger.holds.key_of(name)) is None:
        engine.step(may_wait=False)
        engine.wait(0.01)
    return key


def merge_wholly(engine: Engine, merger: Merger, key: AdapterKey | None) -> float:
    """Seconds to merge an adapter that is in pages into all linears, without steps between."""
    merger.set_target(key)
    begin = time.perf_counter()
    while not merger.is_settled:
        engine.step(may_wait=False)
        merger.advance(float("inf"))
    return time.perf_counter() - begin


def linear_rates(engine: Engine, key: AdapterKey) -> list[Merged]:
    """Each linear of the first layers, whose copies do not stay in caches."""
    runner = engine._runner
    table = runner._tiles.own_table(key)
    assert table is not None
    layers = engine.decoder.layers
    rows = []
    for index, name in enumerate(TARGETS):
        linears = [layer.linears()[index] for layer in layers]
        copies = [linear.start_merging() for linear in linears]
        for copy in copies:
            copy.extend(copy.num_rows, runner._buffer.pool, table)
        again = [copy.weight for copy in copies]
        merges, copying = [], []
        num_bytes = linears[0].weight.nbytes
        blocks = [torch.ones(num_bytes, dtype=torch.uint8) for _ in linears]
        target = [torch.ones_like(block) for block in blocks]
        for _ in range(REPEATS):
            for linear, spare in zip(linears, again, strict=True):
                begin = time.perf_counter()
                copy = linear.start_merging(spare)
                copy.extend(copy.num_rows, runner._buffer.pool, table)
                merges.append(time.perf_counter() - begin)
            for to, source in zip(target, blocks, strict=True):
                begin = time.perf_counter()
                to.copy_(source)
                copying.append(time.perf_counter() - begin)
        rows.append(Merged(name, num_bytes, min(merges) * 1e6, min(copying) * 1e6))
    return rows


def steps_of(
    engine: Engine, case: str, adapters: list[str | None], options: argparse.Namespace
) -> Steps:
    """Decode steps while nothing is switched."""
    max_tokens = max_output_tokens(len(adapters), options.context, options.steps)
    start_rows(engine, adapters, options.context, max_tokens)
    engine.abort_all()  # every adapter is in the pool now
    start_rows(engine, adapters, options.context, max_tokens)
    times = [full_step_s(engine, len(adapters)) for _ in range(options.steps)][1:]
    engine.abort_all()
    return summary(case, times)


def switching_steps(
    engine: Engine, key: AdapterKey, adapters: list[str | None], options: argparse.Namespace
) -> list[Steps]:
    """Steps of one adapter's rows beside which the engine merges it under its own budget, and those
    between, merged and unmerged: each time it is merged it is restored after some steps."""
    merger = engine.merger
    assert merger is not None
    max_tokens = max_output_tokens(len(adapters), options.context, 6 * options.steps)
    start_rows(engine, adapters, options.context, max_tokens)
    times: dict[str, list[float]] = {
        "between, unmerged": [],
        "switching": [],
        "between, merged": [],
    }
    for _ in range(6 * options.steps):
        if len(times["between, unmerged"]) > len(times["between, merged"]) + RESTING_STEPS:
            merger.set_target(key)
        elif len(times["between, merged"]) > len(times["between, unmerged"]) + RESTING_STEPS:
            merger.set_target(None)
        is_switching = not merger.is_settled
        seconds = full_step_s(engine, len(adapters))
        case = "merged" if merger.num_merged else "unmerged"
        times["switching" if is_switching else f"between, {case}"].append(seconds)
    engine.abort_all()
    return [summary(case, found) for case, found in times.items()]


def summary(case: str, times: list[float]) -> Steps:
    times = times or [float("nan")]
    return Steps(
        case, statistics.median(times) * 1e3, float(np.quantile(times, 0.99)) * 1e3, len(times)
    )


def measure(engine: Engine, options: argparse.Namespace) -> tuple[list[Merged], list[Steps]]:
    merger = engine.merger
    assert merger is not None
    names = [f"a{i:03}" for i in range(options.batch)]
    keys = [key_of(engine, merger, name) for name in names[:2]]
    hot: list[str | None] = [names[0]] * options.batch
    base: list[str | None] = [None] * options.batch
    mixed = hot[: options.batch * 9 // 10]
    mixed += names[1 : 1 + options.batch - len(mixed)]
    steps = [steps_of(engine, "base", base, options)]
    steps += [steps_of(engine, "one adapter, unmerged", hot, options)]
    steps += [steps_of(engine, "90/10, unmerged", mixed, options)]
    seconds = [merge_wholly(engine, merger, keys[turn % 2]) for turn in range(4)]
    print(f"all {merger.num_merged} linears merged in {[f'{s * 1e3:.0f} ms' for s in seconds]}")
    merge_wholly(engine, merger, keys[0])
    steps += [steps_of(engine, "one adapter, merged", hot, options)]
    steps += [steps_of(engine, "90/10, merged", mixed, options)]
    rates = linear_rates(engine, keys[0])
    merge_wholly(engine, merger, None)
    steps += switching_steps(engine, keys[0], hot, options)
    return rates, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--size", default="qwen2.5-0.5b")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_swarm(Path(directory), options.size, max(options.batch, 2), [options.rank])
        config = EngineConfig(
            model=f"{directory}/model",
            adapters=(f"{directory}/adapters",),
            num_threads=options.threads,
            merge="auto",
            merge_policy="never",
            **engine_limits(options.batch, options.context, 6 * options.steps),
        )
        engine = build_engine(config, print)
        rates, steps = measure(engine, options)
    print(f"{'linear':10} {'bytes':>11} {'merge us':>9} {'copy us':>8} {'of copy':>8}")
    for row in rates:
        share = row.copy_us / row.merge_us
        print(
            f"{row.linear:10} {row.num_bytes:11,} {row.merge_us:9.0f} {row.copy_us:8.0f}"
            f" {share:8.0%}"
        )
    print(f"{'case':24} {'ms/step':>8} {'p99':>8} {'of base':>8} {'steps':>6}")
    for case in steps:
        print(
            f"{case.case:24} {case.median_ms:8.1f} {case.p99_ms:8.1f}"
            f" {case.median_ms / steps[0].median_ms:8.0%} {case.num_steps:6}"
        )
    if options.json:
        found = {
            "linears": [asdict(row) for row in rates],
            "steps": [asdict(case) for case in steps],
        }
        write_document(options.json, options, found)


if __name__ == "__main__":
    main()
