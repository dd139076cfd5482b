"""Tokens a second of an engine under each merge policy, for traffic from one adapter to a mix.

    python benchmarks/merge_policies.py --swarm DIR --policies never,dlora,cost --rounds 2

Closed loop: as many requests in flight as --batch, in the order that the workload says, all with
the same lengths. Policies take turns within a round, and each round reverses their order, so that a
drift of the machine's speed is seen. An engine is started anew for each measurement.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraswarm.engine.engine_process import ENGINE_ENVIRONMENT

os.environ.update(ENGINE_ENVIRONMENT | os.environ)  # before torch is imported

from document import json_path, write_document
from loraswarm.config import EngineConfig
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine import Engine
from loraswarm.engine.setup import build_engine
from random_swarm import write_swarm

Wanted = list[str | None]
NUM_ADAPTERS = 32
PERIOD = 48
"""Requests of one adapter in a row, in a square wave."""
HOT, OTHER = "a003", "a002"


def mixed(share: float) -> Callable[[random.Random, int], Wanted]:
    """So much of one adapter, the rest drawn evenly from the others."""
    others = [f"a{index:03}" for index in range(NUM_ADAPTERS) if f"a{index:03}" != HOT]

    def draw(chance: random.Random, count: int) -> Wanted:
        return [HOT if chance.random() < share else chance.choice(others) for _ in range(count)]

    return draw


WORKLOADS: dict[str, Callable[[random.Random, int], Wanted]] = {
    "one": mixed(1.0),
    "90/10": mixed(0.9),
    "50/50": mixed(0.5),
    "uniform": mixed(1.0 / NUM_ADAPTERS),
    "square": lambda _, count: [(HOT, OTHER)[index // PERIOD % 2] for index in range(count)],
}


def serve(engine: Engine, wanted: Wanted, options: argparse.Namespace, label: str) -> float:
    """Seconds to answer all, with `options.batch` in flight."""
    chance = random.Random(options.seed)
    params = SamplingParams(max_tokens=options.output, temperature=0.0, ignore_eos=True)
    waiting = [
        Request(
            request_id=f"{label}{index}",
            prompt_token_ids=tuple(chance.randrange(1, 4000) for _ in range(options.prompt)),
            params=params,
            adapter=name,
        )
        for index, name in enumerate(wanted)
    ]
    waiting.reverse()
    num_open = 0
    begin_s = time.perf_counter()
    while waiting or engine.has_work:
        while waiting and num_open < options.batch:
            engine.add(waiting.pop())
            num_open += 1
        events = engine.step()
        assert not any(event.error for event in events), [event.error for event in events]
        num_open -= sum(event.finish_reason is not None for event in events)
    return time.perf_counter() - begin_s


def measure(swarm: Path, policy: str, workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """One engine, warmed up by every adapter once."""
    config = EngineConfig(
        model=f"{swarm}/model",
        adapters=(f"{swarm}/adapters",),
        max_num_sequences=options.batch,
        prefix_caching=False,
        merge="auto",
        merge_policy=policy,
        cost_model=options.cost_model,
    )
    engine = build_engine(config, lambda line: None)
    try:
        names: Wanted = [f"a{index:03}" for index in range(NUM_ADAPTERS)]
        serve(engine, names, argparse.Namespace(**{**vars(options), "output": 4}), "warm-up-")
        assert engine.merger is not None
        before = engine.merger.num_switches
        wanted = WORKLOADS[workload](random.Random(options.seed), options.requests)
        seconds = serve(engine, wanted, options, "r")
        return {
            "workload": workload,
            "policy": policy,
            "tokens_per_s": options.output * options.requests / seconds,
            "switches": engine.merger.num_switches - before,
            "share_merged_at_end": engine.merger.share_merged,
        }
    finally:
        engine.close()
        del engine
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--swarm", type=Path, help="where random_swarm.py has written one of 32")
    parser.add_argument("--policies", default="never,dlora,cost")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost-model", help="of `loraswarm bench calibrate`")
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        swarm = options.swarm or Path(directory)
        if options.swarm is None:
            write_swarm(swarm, "qwen2.5-0.5b", NUM_ADAPTERS, [8, 16, 32, 64])
        policies = options.policies.split(",")
        for workload in options.workloads.split(","):
            for index in range(options.rounds):
                for policy in policies if index % 2 == 0 else reversed(policies):
                    rows.append(measure(swarm, policy, workload, options))
                    row = rows[-1]
                    print(
                        f"{workload:8} {policy:12} {row['tokens_per_s']:7.1f} tokens/s"
                        f"  switches {row['switches']}  merged {row['share_merged_at_end']:.2f}",
                        flush=True,
                    )
            show(workload, policies, rows)
            if options.json:
                write_document(options.json, options, rows)


def show(workload: str, policies: list[str], rows: list[dict[str, Any]]) -> None:
    """Medians of a workload, against the first policy."""
    median = {
        policy: statistics.median(
            row["tokens_per_s"]
            for row in rows
            if (row["workload"], row["policy"]) == (workload, policy)
        )
        for policy in policies
    }
    ratios = ", ".join(
        f"{policy} {value:.1f} ({value / median[policies[0]]:.2f} x)"
        for policy, value in median.items()
    )
    print(f"{workload}: {ratios}", flush=True)


if __name__ == "__main__":
    main()
