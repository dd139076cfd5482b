"""Logit error and speed of a base in integers against the same base in bfloat16.

    python benchmarks/quantization.py                        random weights, and the demo's base
    python benchmarks/quantization.py --model DIR            a checkpoint

Prints, for int8 and int4: the largest and mean difference of logits over the standard deviation of
bfloat16's, how often the likeliest token is the same, the weights' bytes, and milliseconds per
decode step of some streams and of a prefill, beside bfloat16's. Rounds of the three engines
alternate, so that a change of the machine's speed meets all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from document import json_path, write_document
from loraswarm.engine.engine_process import ENGINE_ENVIRONMENT

os.environ.update(ENGINE_ENVIRONMENT | os.environ)  # before torch is imported

import torch

from decode import run_round
from loraswarm.config import EngineConfig
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine import Engine
from loraswarm.engine.setup import build_engine
from loraswarm.models.source import read_config
from random_swarm import SIZES, write_checkpoint

METHODS: tuple[Any, ...] = (None, "int8", "int4")
STREAMS = (1, 8, 32)
PREFILL_TOKENS = 256
PROMPT_TOKENS = 32
CONTEXT_TOKENS = 32
STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One method on one model. Errors are of logits less their row's mean, over the standard
    deviation of bfloat16's; `ms` by case, `speed` as multiples of bfloat16's."""

    model: str
    method: str
    weight_bytes: int
    max_error: float
    mean_error: float
    top1_agreement: float
    ms: dict[str, float]
    speed: dict[str, float]


def build(path: Path, method: Any, threads: int | None) -> Engine:
    config = EngineConfig(
        model=str(path),
        dtype="bfloat16",
        quantize=method,
        max_model_len=PREFILL_TOKENS + 8,
        pool_bytes=256 << 20,
        prefix_caching=False,
        num_threads=threads,
    )
    return build_engine(config, lambda line: print(f"  {line}") if "quantized" in line else None)


def logits_of(engine: Engine, prompts: list[tuple[int, ...]]) -> torch.Tensor:
    """Logits after each prompt: [prompts, V] float32."""
    rows: list[torch.Tensor] = []
    run = engine._runner.run

    def kept(prepared: Any) -> torch.Tensor:
        logits_ZV = run(prepared)
        rows.append(logits_ZV.clone())
        return logits_ZV

    engine._runner.run = kept  # type: ignore[method-assign]
    for prompt in prompts:
        serve_prompt(engine, prompt)
    engine._runner.run = run  # type: ignore[method-assign]
    return torch.cat(rows)


def serve_prompt(engine: Engine, prompt: tuple[int, ...]) -> float:
    """Seconds of one prefill and its token."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    engine.add(Request(request_id="r", prompt_token_ids=prompt, params=params))
    begin = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begin


def one_round(engine: Engine, vocab_size: int) -> dict[str, float]:
    """Milliseconds by case."""
    found = {
        f"{num} streams": run_round(engine, [None] * num, CONTEXT_TOKENS, STEPS) * 1e3
        for num in STREAMS
    }
    (prompt,) = random_prompts(vocab_size, 1, PREFILL_TOKENS)
    found[f"{PREFILL_TOKENS} prefill"] = serve_prompt(engine, prompt) * 1e3
    return found


def measure(name: str, path: Path, options: argparse.Namespace) -> list[Measured]:
    vocab_size = int(read_config(path)["vocab_size"])
    prompts = random_prompts(vocab_size, options.prompts, PROMPT_TOKENS)
    engines = {method or "bfloat16": build(path, method, options.threads) for method in METHODS}
    times: dict[str, list[dict[str, float]]] = {label: [] for label in engines}
    for round_ in range(options.rounds + 1):
        for label, engine in engines.items():
            found = one_round(engine, vocab_size)
            if round_:
                times[label].append(found)
    logits = {label: logits_of(engine, prompts) for label, engine in engines.items()}
    expected = logits["bfloat16"] - logits["bfloat16"].mean(1, keepdim=True)
    base_ms = _medians(times["bfloat16"])
    rows = []
    for label, engine in engines.items():
        centred = logits[label] - logits[label].mean(1, keepdim=True)
        errors = (centred - expected).abs() / expected.std()
        same = centred.argmax(1) == expected.argmax(1)
        ms = _medians(times[label])
        rows.append(
            Measured(
                model=name,
                method=label,
                weight_bytes=engine.info.weight_bytes,
                max_error=float(errors.max()),
                mean_error=float(errors.mean()),
                top1_agreement=float(same.float().mean()),
                ms=ms,
                speed={case: base_ms[case] / ms[case] for case in ms},
            )
        )
    return rows


def models(options: argparse.Namespace, directory: Path) -> Iterator[tuple[str, Path]]:
    if options.model:
        yield options.model.name, options.model
        return
    from loraswarm.demo import base_path

    write_checkpoint(directory / "model", options.size)
    yield f"random {options.size}", directory / "model"
    yield "demo base", Path(base_path())


def random_prompts(vocab_size: int, count: int, length: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (count, length), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def print_row(row: Measured) -> None:
    times = " ".join(f"{row.ms[case]:8.1f} ({row.speed[case]:4.2f})" for case in row.ms)
    print(
        f"{row.model:22} {row.method:9} {row.weight_bytes / 1e6:7.1f} {row.max_error:7.3f}"
        f" {row.mean_error:7.4f} {row.top1_agreement:6.1%} {times}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--size", default="qwen2.5-0.5b", choices=sorted(SIZES))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory() as directory:
        for name, path in models(options, Path(directory)):
            rows += measure(name, path, options)
    cases = " ".join(f"{f'{case} ms (x)':>15}" for case in rows[0].ms)
    print(f"{'model':22} {'method':9} {'MB':>7} {'max':>7} {'mean':>7} {'top-1':>6} {cases}")
    for row in rows:
        print_row(row)
    if options.json:
        write_document(options.json, options, [asdict(row) for row in rows])


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {case: statistics.median(found[case] for found in rounds) for case in rounds[0]}


if __name__ == "__main__":
    main()
