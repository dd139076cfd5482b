"""Where each millisecond of a step goes, against what the machine could do.

    python benchmarks/step_profile.py --batch 32 --adapters 32 --context 128

Runs an engine on random weights (benchmarks/random_swarm.py), prints the time of each kind of
kernel operation in prefill and in decode, what is between programs (Python, sampling, scheduling),
and two bounds measured in the same process: bytes over the read rate, products over the rate of the
machine's best matrix product.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from loraswarm.engine.engine_process import ENGINE_ENVIRONMENT

os.environ.update(ENGINE_ENVIRONMENT | os.environ)  # before torch is imported

import torch

from decode import (
    bytes_per_step,
    engine_limits,
    full_step_s,
    max_output_tokens,
    read_bandwidth,
)
from document import json_path, write_document
from loraswarm.config import EngineConfig
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine import Engine
from loraswarm.engine.setup import build_engine
from loraswarm.kernels import cpu
from loraswarm.kernels.cpu import operations
from loraswarm.kernels.cpu.program import Profile, programs
from random_swarm import write_swarm

KINDS = {
    number: name.lower()
    for name, number in vars(operations).items()
    if name.isupper() and isinstance(number, int)
}


def product_rate(num_rows: int = 512, size: int = 4096) -> float:
    """GFLOP/s of a large bfloat16 product with a packed weight, best of five."""
    weight_OI = torch.randn(size, size).bfloat16()
    packed = cpu.pack_linear(weight_OI)
    x_TI = torch.randn(num_rows, size).bfloat16()
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        if packed is not None:
            cpu.linear(x_TI, packed, None)
        else:
            torch.nn.functional.linear(x_TI, weight_OI)
        best = min(best, time.perf_counter() - begin)
    return 2 * num_rows * size * size / best / 1e9


def add_requests(engine: Engine, options: argparse.Namespace, label: str) -> None:
    max_tokens = max_output_tokens(options.batch, options.context, options.steps)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    for index in range(options.batch):
        prompt = tuple((index * 7919 + i * 31) % 4000 + 1 for i in range(options.context))
        adapter = f"a{index % options.adapters:03}" if options.adapters else None
        engine.add(
            Request(
                request_id=f"{label}{index}",
                prompt_token_ids=prompt,
                params=params,
                adapter=adapter,
            )
        )


def profiled_steps(engine: Engine, num_steps: int, num_rows: int) -> tuple[list[float], Profile]:
    """Seconds of each step, and the profile of all."""
    programs.profile = profile = Profile()
    times = [full_step_s(engine, num_rows) for _ in range(num_steps)]
    programs.profile = None
    return times, profile


def prefill(engine: Engine, num_requests: int) -> tuple[float, int, Profile]:
    """Seconds and steps until every request has its first token."""
    programs.profile = profile = Profile()
    begin, num_steps, started = time.perf_counter(), 0, set()
    while len(started) < num_requests:
        started |= {event.request_id for event in engine.step()}
        num_steps += 1
    programs.profile = None
    return time.perf_counter() - begin, num_steps, profile


def part(wall_s: float, num_steps: int, profile: Profile) -> dict[str, Any]:
    """What `show` prints, as plain values."""
    inside_s = sum(profile.seconds.values())
    kinds = profile.seconds.most_common()
    return {
        "num_steps": num_steps,
        "step_ms": wall_s * 1e3 / num_steps,
        "between_programs_ms": (wall_s - inside_s) * 1e3 / num_steps,
        "num_programs": profile.num_programs,
        "num_unseen_programs": profile.num_unseen,
        "operations_ms": {KINDS[kind]: s * 1e3 / num_steps for kind, s in kinds},
        "num_operations": {KINDS[kind]: profile.counts[kind] / num_steps for kind, _ in kinds},
    }


def show(title: str, wall_s: float, num_steps: int, profile: Profile) -> None:
    inside_s = sum(profile.seconds.values())
    print(f"{title}: {wall_s * 1e3 / num_steps:.2f} ms a step")
    for kind, seconds in profile.seconds.most_common():
        count = profile.counts[kind]
        print(
            f"  {KINDS[kind]:16} {seconds * 1e3 / num_steps:8.2f} ms {count / num_steps:7.0f} x"
            f" {seconds / count * 1e6:8.1f} us"
        )
    print(f"  {'between programs':16} {(wall_s - inside_s) * 1e3 / num_steps:8.2f} ms")
    if profile.num_unseen:
        print(f"  {profile.num_unseen} of {profile.num_programs} programs are not in the times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=0, help="distinct adapters; 0: the base")
    parser.add_argument("--ranks", default="8,16,32,64")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="qwen2.5-0.5b")
    parser.add_argument("--swarm", type=Path, help="where random_swarm.py has written one")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        swarm = options.swarm or Path(directory)
        if options.swarm is None:
            ranks = [int(rank) for rank in options.ranks.split(",")]
            write_swarm(swarm, options.size, max(options.adapters, 1), ranks)
        config = EngineConfig(
            model=f"{swarm}/model",
            adapters=(f"{swarm}/adapters",),
            num_threads=options.threads,
            prefix_caching=False,
            **engine_limits(options.batch, options.context, options.steps),
        )
        engine = build_engine(config, lambda line: None)
        found = measure(engine, options)
    if options.json:
        write_document(options.json, options, found)


def measure(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Print everything; the same as plain values, in ms a step."""
    medians = []
    add_requests(engine, options, "loading-")
    prefill(engine, options.batch)
    engine.abort_all()  # every adapter is in the pool now
    for round_ in range(options.rounds):
        add_requests(engine, options, f"round{round_}-")
        prefill_s, num_prefills, prefill_profile = prefill(engine, options.batch)
        times, profile = profiled_steps(engine, options.steps, options.batch)
        medians.append(statistics.median(times))
        engine.abort_all()
    num_tokens = options.batch * options.context
    show("prefill", prefill_s, num_prefills, prefill_profile)
    print(f"  {num_tokens / prefill_s:.0f} tokens/s")
    show("decode", sum(times), len(times), profile)
    step_s = statistics.median(medians)
    print(f"  median step {step_s * 1e3:.2f} ms, {options.batch / step_s:.1f} tokens/s")
    names = [
        f"a{index % options.adapters:03}" if options.adapters else None
        for index in range(options.batch)
    ]
    num_bytes = bytes_per_step(engine, names, options.context)
    gb_per_s, gflop_per_s = read_bandwidth(), product_rate()
    matrices = engine.decoder.matrices()
    gflop = 2e-9 * options.batch * sum(weight.nbytes // 2 for weight in matrices)
    print(
        f"bounds of decode: {num_bytes / 1e6:.0f} MB at {gb_per_s:.0f} GB/s in"
        f" {num_bytes / gb_per_s / 1e6:.1f} ms; {gflop:.1f} GFLOP at {gflop_per_s:.0f} GFLOP/s in"
        f" {gflop / gflop_per_s * 1e3:.1f} ms"
    )
    return {
        "prefill": part(prefill_s, num_prefills, prefill_profile),
        "prefill_tokens_per_s": num_tokens / prefill_s,
        "decode": part(sum(times), len(times), profile),
        "decode_median_step_ms": step_s * 1e3,
        "decode_tokens_per_s": options.batch / step_s,
        "decode_bytes_per_step": num_bytes,
        "decode_gflop_per_step": gflop,
        "read_gb_per_s": gb_per_s,
        "gflop_per_s": gflop_per_s,
    }


if __name__ == "__main__":
    main()
