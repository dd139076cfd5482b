"""Measure one server with AIPerf and with `loraswarm.bench`, and print how far they agree.

    python -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf
    python benchmarks/aiperf_agreement.py --aiperf /tmp/aiperf/bin/aiperf --out agreement.json

The server is tests/bench_server.py, whose delays depend on a request's number alone; each tool gets
one of its own, as many requests, tokens and requests in flight. The medians of the repeats must be
within `LIMIT` of each other, else the exit code is 1. `--url` measures another server with both,
one after the other: then prompts differ, and the same number of tokens is asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraswarm.bench.environment import environment
from loraswarm.bench.http_target import HttpTarget
from loraswarm.bench.metrics import Statistics, Summary, summarize
from loraswarm.bench.records import PlannedRequest
from loraswarm.bench.runner import run

ROOT = Path(__file__).parent.parent
LIMIT = 0.03
TIMEOUT_S = 600.0
MS_PER_S = 1e3
STATISTICS = ("avg", "p50", "p90", "p95", "p99", "std")
# AIPerf's name, its units per second, ours
REQUEST_METRICS = (
    ("time_to_first_token", MS_PER_S, "time_to_first_token_s"),
    ("inter_token_latency", MS_PER_S, "inter_token_latency_s"),
    ("request_latency", MS_PER_S, "request_latency_s"),
    ("output_token_throughput_per_user", 1.0, "output_tokens_per_s_per_user"),
)
RUN_METRICS = (
    ("output_token_throughput", "output_tokens_per_s"),
    ("request_throughput", "requests_per_s"),
    ("benchmark_duration", "duration_s"),
)


@contextlib.contextmanager
def fake_server() -> Iterator[str]:
    """The URL of a fresh server, which ends with the block."""
    command = [sys.executable, str(ROOT / "tests" / "bench_server.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def measure_aiperf(url: str, options: argparse.Namespace, folder: str) -> dict[str, float]:
    """AIPerf's numbers, in seconds, by metric and statistic."""
    command = [options.aiperf, "profile", "--model-names", options.model, "--url", url]
    command += ["--endpoint-type", "completions", "--streaming", "--use-server-token-count"]
    command += ["--use-legacy-max-tokens", "--tokenizer", options.tokenizer]
    command += ["--extra-inputs", '{"stream_options": {"include_usage": true}}']
    command += ["--extra-inputs", '{"ignore_eos": true, "temperature": 0}']
    command += ["--request-count", str(options.requests), "--num-conversations"]
    command += [str(options.requests), "--concurrency", str(options.concurrency)]
    command += ["--isl", str(options.prompt), "--isl-stddev", "0"]
    command += ["--osl", str(options.output), "--osl-stddev", "0", "--random-seed", "1"]
    command += ["--artifact-dir", folder, "--ui", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"AIPerf failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return aiperf_numbers(json.loads(Path(folder, "profile_export_aiperf.json").read_text()))


def aiperf_numbers(export: Mapping[str, Any]) -> dict[str, float]:
    """What both tools tell, from AIPerf's JSON."""
    numbers = {
        f"{name} {which}": export[name][which] / per_s
        for name, per_s, _ in REQUEST_METRICS
        for which in STATISTICS
    }
    numbers |= {name: export[name]["avg"] for name, _ in RUN_METRICS}
    numbers["requests"] = export["request_count"]["avg"]
    return numbers


async def measure_ours(url: str, options: argparse.Namespace) -> Summary:
    """The same requests by our client."""
    requests = [
        PlannedRequest(
            index=index,
            adapter=None,
            prompt_token_ids=tuple(5 + (index * 31 + i * 7) % 90 for i in range(options.prompt)),
            max_tokens=options.output,
        )
        for index in range(options.requests)
    ]
    target = HttpTarget(url, options.model)
    try:
        return summarize(await run(target, requests, concurrency=options.concurrency))
    finally:
        await target.close()


def our_numbers(summary: Summary) -> dict[str, float]:
    """What both tools tell, under AIPerf's names."""
    numbers: dict[str, float] = {}
    for name, _, ours in REQUEST_METRICS:
        found: Statistics | None = getattr(summary, ours)
        if found is None:
            raise RuntimeError(f"nothing was measured: {summary.errors}")
        for which in STATISTICS:
            numbers[f"{name} {which}"] = getattr(found, "mean" if which == "avg" else which)
    numbers |= {name: getattr(summary, ours) for name, ours in RUN_METRICS}
    numbers["requests"] = summary.num_requests - summary.num_errors
    return numbers


def measure_both(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """AIPerf's numbers and ours, medians over the repeats, which take turns."""
    theirs, ours = [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder, server(options) as url:
            theirs.append(measure_aiperf(url, options, folder))
        with server(options) as url:
            ours.append(our_numbers(asyncio.run(measure_ours(url, options))))
    return medians(theirs), medians(ours)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def server(options: argparse.Namespace) -> contextlib.AbstractContextManager[str]:
    """The server that was named, or a fresh fake one."""
    return contextlib.nullcontext(options.url) if options.url else fake_server()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aiperf", default="aiperf", help="AIPerf's executable")
    parser.add_argument("--url", help="a server to measure instead of the fake one")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--tokenizer", default=str(ROOT / "src/loraswarm/demo/base"))
    parser.add_argument("--requests", type=int, default=133)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--output", type=int, default=32, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    return parser.parse_args()


def main() -> int:
    """Print both columns and their ratio; 1 if a ratio is beyond the limit."""
    options = parse_arguments()
    theirs, ours = measure_both(options)
    worst = 0.0
    print(f"{'':44}{'AIPerf':>12}{'ours':>12}{'ratio':>9}")
    for name, value in theirs.items():
        ratio = ours[name] / value
        worst = max(worst, abs(ratio - 1.0))
        print(f"{name:44}{value:12.5g}{ours[name]:12.5g}{ratio:9.4f}")
    print(f"largest difference {worst:.2%}, limit {LIMIT:.0%}")
    if options.out is not None:
        settings = {name: str(value) for name, value in vars(options).items()}
        found = {"aiperf": theirs, "ours": ours, "largest_difference": worst, "options": settings}
        options.out.write_text(json.dumps(found | {"environment": environment()}, indent=1))
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
