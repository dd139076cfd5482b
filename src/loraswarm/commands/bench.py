"""`loraswarm bench`: runs what the options say, prints a table, writes the files asked for.

Joins workload, target, runner and report of loraswarm.bench; computes no figures itself. Called by
the command line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

from loraswarm.adapters.printable import one_line
from loraswarm.bench import compare as comparison
from loraswarm.bench import plot as pictures
from loraswarm.bench.arrivals import parse_arrivals
from loraswarm.bench.csv_file import write_csv
from loraswarm.bench.figures import Loop
from loraswarm.bench.goodput import parse_goodput
from loraswarm.bench.lengths import parse_lengths
from loraswarm.bench.metrics import summarize
from loraswarm.bench.popularity import TracePopularity, parse_popularity
from loraswarm.bench.reading import Result, read_result
from loraswarm.bench.report import Point, point_of, result_of, without_records, write_json
from loraswarm.bench.runner import Progress, is_complete, run
from loraswarm.bench.table import print_table, reasons_of
from loraswarm.bench.workload import (
    WorkloadSpec,
    build_requests,
    require_in_range,
    warmup_requests,
)
from loraswarm.commands.bench_options import BenchOptions, written
from loraswarm.commands.bench_outputs import check_outputs, write_each
from loraswarm.commands.bench_target import Measured, open_endpoint, start_engine
from loraswarm.errors import ConfigError, LoRASwarmError

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
# What the command line calls the numbers of a WorkloadSpec.
NUMBERS = {
    "num_requests": "requests",
    "base_share": "base_share",
    "shared_prefix_share": "shared_prefix",
    "num_prefixes": "prefixes",
    "vocab_size": "vocab_size",
    "seed": "seed",
}
FILES = ("json", "csv", "plot")


def bench(options: BenchOptions) -> int:
    """Measure and print; the exit code is 1 if a request failed, unless that is allowed.

    Raises   ConfigError for options, files and targets that cannot work: before anything is sent,
             as far as that can be known. LoRASwarmError if every request failed.
    """
    options.check()
    check_outputs({written(name): getattr(options, name) for name in FILES})
    if options.plot is not None:
        pictures.check_plot(options.plot)
    _check_workload(options)
    runs = options.concurrencies() * options.repeats
    engine = start_engine(options) if options.offline is not None else None
    result, is_whole = asyncio.run(_measure(options, runs, engine))
    if not result["points"]:
        return INTERRUPTED
    try:
        _write(options, result)
    finally:
        print_table(result)
    return _exit_code(options, result) if is_whole else INTERRUPTED


def compare(paths: Sequence[str], plot: str | None) -> None:
    """Print how the results in the files compare, and draw them into `plot` if that is given."""
    if plot is not None:
        check_outputs({"--plot": plot})
        pictures.check_plot(plot)
    print(comparison.compare(paths))
    if plot is not None:
        pictures.plot([read_result(path) for path in paths], plot)


async def _measure(
    options: BenchOptions, runs: Sequence[int | None], engine: Measured | None
) -> tuple[Result, bool]:
    """A run for each concurrency in `runs`, and whether none was interrupted.

    Repeats are a round each, so that a slow minute of the machine is not one concurrency's alone.
    """
    measured = engine or await open_endpoint(options)
    points: list[Point] = []
    is_whole = True
    try:
        spec = _spec(options, measured.adapters)
        for number, concurrency in enumerate(runs):
            seeded = dataclasses.replace(spec, seed=options.seed + number)
            point, is_whole = await _run_once(options, measured, seeded, concurrency)
            points += [] if point is None else [point]
            if not is_whole:
                break
    finally:
        await measured.target.close()
    return result_of(measured.target.name, _recorded(options, measured), points), is_whole


async def _run_once(
    options: BenchOptions, measured: Measured, spec: WorkloadSpec, concurrency: int | None
) -> tuple[Point | None, bool]:
    """One run, and whether it came to its end; None if it was interrupted before it began."""
    requests = build_requests(spec)
    warmup = warmup_requests(spec, requests, options.warmup)
    with _progress_bar(Loop(concurrency, spec.arrivals).title) as progress:
        records = await run(
            measured.target, requests, concurrency=concurrency, warmup=warmup, progress=progress
        )
    if not records:
        return None, False
    goodput = None if options.goodput is None else parse_goodput(options.goodput)
    is_whole = is_complete(requests, records)
    summary = summarize(records, goodput)
    point = point_of(concurrency, summary, records, spec.seed, spec.arrivals, is_whole)
    return point, is_whole


def _spec(options: BenchOptions, adapters: tuple[str, ...]) -> WorkloadSpec:
    """The first run's workload; without adapters every request is for the base.

    Raises   ConfigError naming the field, or an option that means nothing without adapters.
    """
    for name in ("popularity", "base_share"):
        if not adapters and options.is_given(name):
            raise ConfigError(f"{written(name)} is given, but there are no adapters to ask for")
    return WorkloadSpec(
        num_requests=options.requests,
        adapters=adapters,
        popularity=options.popularity,
        base_share=options.base_share if adapters else 1.0,
        prompt_lengths=options.prompt_tokens,
        output_lengths=options.output_tokens,
        arrivals=options.arrivals,
        shared_prefix_share=options.shared_prefix,
        num_prefixes=options.prefixes,
        vocab_size=options.vocab_size,
        seed=options.seed,
    )


@contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[Progress], None]]:
    """A bar on standard error if that is a terminal: warm-up first, then the run."""
    with tqdm(disable=None, leave=False, file=sys.stderr, unit="request") as bar:

        def show(progress: Progress) -> None:
            if progress.num_done == 1:
                phase = f"{name}, warm-up" if progress.is_warmup else name
                bar.set_description_str(phase, refresh=False)
                bar.reset(total=progress.num_requests)
            rate = progress.num_output_tokens / max(progress.elapsed_s, 1e-9)
            bar.set_postfix_str(f"{rate:.1f} tokens/s, {progress.num_failed} failed", refresh=False)
            bar.update()

        yield show


def _check_workload(options: BenchOptions) -> None:
    """Read what can be read before an engine is started, under the options' own names."""
    for field, name in NUMBERS.items():
        require_in_range(field, getattr(options, name), written(name))
    rng = np.random.default_rng(0)
    for name in ("prompt_tokens", "output_tokens"):
        parse_lengths(getattr(options, name), written(name)).draw(options.requests, rng)
    arrivals = parse_arrivals(options.arrivals, "--arrivals")
    if arrivals is not None:
        arrivals.draw(options.requests, rng)
    popularity = parse_popularity(options.popularity, options.adapter_names, "--popularity")
    if options.adapter_names:
        popularity.draw(len(options.adapter_names), options.requests, rng)
    elif isinstance(popularity, TracePopularity):
        popularity.column.first(options.requests)
    if options.goodput is not None:
        parse_goodput(options.goodput)


def _recorded(options: BenchOptions, measured: Measured) -> dict[str, Any]:
    """The options for the result, with what was found out, without the key."""
    fields = dataclasses.asdict(options)
    del fields["api_key"]
    return fields | {"base_model": measured.base_model, "adapters": list(measured.adapters)}


def _write(options: BenchOptions, result: Result) -> None:
    kept = result if options.records else without_records(result)
    writers: dict[str, Callable[[str], None]] = {
        "json": lambda path: write_json(kept, path),
        "csv": lambda path: write_csv(result, path),
        "plot": lambda path: pictures.plot(result, path),
    }
    asked = [(written(name), getattr(options, name), writers[name]) for name in FILES]
    write_each(one for one in asked if one[1] is not None)


def _exit_code(options: BenchOptions, result: Result) -> int:
    reasons = reasons_of(result)
    num_requests = sum(point["summary"]["num_requests"] for point in result["points"])
    if reasons.total() == num_requests:
        reason, count = reasons.most_common(1)[0]
        raise LoRASwarmError(f"every request failed, {count:,} with: {one_line(reason)}")
    return int(bool(reasons) and not options.allow_errors)
