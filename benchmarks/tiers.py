"""What it costs that an adapter is not on the device: first tokens by tier, and loads beside work.

    python benchmarks/tiers.py                 first token cold, from the host, from the device
    python benchmarks/tiers.py --cold-load     16 streams decode while a >= 200 MB adapter is loaded
    python benchmarks/tiers.py --catalog 2000  throughput of the same 32 adapters among 2,000 and 32
    python benchmarks/tiers.py --start 5000    seconds from the base's load to ready

Talks over HTTP to `loraswarm serve` with random weights of Qwen2.5-0.5B dimensions. What is
compared alternates within one run. Servers and files are gone when it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np

from document import json_path, write_document
from loraswarm.core.base_shape import BaseShape
from machine import copy_speed, forget_cached, read_file_speed
from random_swarm import write_adapter, write_checkpoint
from served import REQUEST_TIMEOUT_S, Served, served, stream_times

RANKS = (8, 16, 32, 64)
HOT_RANK = 16
PROMPT_TOKENS = 16
BIG_RANKS = {"qwen2.5-0.5b": 192, "tiny": 64}
BASE_LOADED = r" page_bytes="  # in the line that the server writes when the base is loaded
Row = dict[str, object]


class Prompts:
    """Prompts that share no prefix with any before, so that only adapters can be warm."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def next(self) -> list[int]:
        drawn: list[int] = self._rng.integers(1, 4000, PROMPT_TOKENS).tolist()
        return drawn


def tiers(directory: Path, options: argparse.Namespace) -> list[Row]:
    """Time to the first token by rank and tier, and the speed of each stage of a load."""
    shape = write_checkpoint(directory / "model", options.size)
    for rank in RANKS:
        for copy in range(options.rounds + 1):
            write_adapter(_path(directory, rank, copy), shape, rank, seed=100 * rank + copy)
    prompts = Prompts()
    with served(*_arguments(directory), "--host-cache-bytes", "6GiB") as server:
        for copy in range(2):
            _first_token_s(server, "model", prompts.next())
            _tier_times(server, _path(directory, RANKS[0], options.rounds), prompts, copy > 0)
        base_s = [_first_token_s(server, "model", prompts.next()) for _ in range(options.rounds)]
        before = server.metrics()
        times: dict[int, list[dict[str, float]]] = {rank: [] for rank in RANKS}
        for copy in range(options.rounds):
            for rank in RANKS:
                path = _path(directory, rank, copy)
                times[rank].append(_tier_times(server, path, prompts, is_known=False))
        after = server.metrics()
    print(f"first token of the base alone: {statistics.median(base_s) * 1e3:.0f} ms")
    rows: list[Row] = []
    for rank in RANKS:
        row: Row = {"rank": rank, "MB": _weight_bytes(_path(directory, rank, 0)) / 1e6}
        for tier in times[rank][0]:
            row[f"{tier} ms"] = statistics.median(one[tier] for one in times[rank]) * 1e3
        rows.append(row)
    _print(rows)
    return rows + _stages(before, after, _path(directory, RANKS[-1], 0))


def _tier_times(server: Served, path: Path, prompts: Prompts, is_known: bool) -> dict[str, float]:
    """Seconds to the first token of one adapter from its store, from the host and on the device."""
    name = path.name
    if not is_known:
        forget_cached(path)
        _expect_tier(server, name, "store")
    times = {"cold": _first_token_s(server, name, prompts.next())}
    server.unload(name)
    server.load(name, str(path))
    _expect_tier(server, name, "host")
    times["host"] = _first_token_s(server, name, prompts.next())
    _expect_tier(server, name, "device")
    times["device"] = _first_token_s(server, name, prompts.next())
    return times


def _stages(before: dict[str, float], after: dict[str, float], path: Path) -> list[Row]:
    """Speed of each stage of all loads between two looks, and what the machine does of the same."""
    speeds = {"read": read_file_speed(path), "copy": copy_speed()}
    rows: list[Row] = []
    for key in sorted(after):
        if not key.startswith("loraswarm_adapter_load_seconds_total{"):
            continue
        stage = key.split('"')[1]
        in_bytes = key.replace("_seconds_", "_bytes_")
        num_bytes = after[in_bytes] - before.get(in_bytes, 0)
        seconds = after[key] - before.get(key, 0)
        if seconds == 0:
            continue
        speed, machine = num_bytes / seconds / 1e9, speeds.get(stage, speeds["copy"])
        rows.append(
            {"stage": stage, "GB/s": speed, "machine": machine, "share %": 100 * speed / machine}
        )
    _print(rows)
    return rows


def cold_load(directory: Path, options: argparse.Namespace) -> list[Row]:
    """Gaps between tokens of decoding streams, with and without a load, in turns."""
    shape = write_checkpoint(directory / "model", options.size)
    for index in range(options.streams):
        write_adapter(directory / "adapters" / f"hot{index}", shape, HOT_RANK, seed=index)
    big = directory / "adapters" / "big"
    write_adapter(big, shape, BIG_RANKS[options.size], seed=1000)
    num_bytes = _weight_bytes(big)
    names = [f"hot{index}" for index in range(options.streams)]
    with served(*_arguments(directory), "--host-cache-bytes", "2GiB") as server:
        server.unload("big")

        def load() -> None:
            server.load("big", str(big))
            server.post("/v1/adapters/big/prefetch")

        def idle() -> None:
            pass

        def settle() -> None:
            with contextlib.suppress(RuntimeError):
                server.unload("big")
            forget_cached(big)

        work = {"quiet": idle, "loading": load}
        gaps = asyncio.run(_gaps_beside(server.url, names, work, settle, options))
    print(f"{options.streams} streams; the load is {num_bytes / 1e6:.0f} MB")
    rows: list[Row] = []
    p99s: list[float] = []
    for label, values_s in gaps.items():
        p50, p99 = (float(np.percentile(values_s, q)) * 1e3 for q in (50, 99))
        rows.append({"window": label, "gaps": len(values_s), "p50 ms": p50, "p99 ms": p99})
        p99s.append(p99)
    _print(rows)
    print(f"p99 while loading is {p99s[1] / p99s[0] - 1:+.1%} of the quiet one (target: <= +20 %)")
    return rows


async def _gaps_beside(
    url: str,
    names: list[str],
    work: dict[str, Callable[[], None]],
    settle: Callable[[], None],
    options: argparse.Namespace,
) -> dict[str, list[float]]:
    """Windows in turns; a window is over when its work is done and at least `window_s` are."""
    windows: list[tuple[str, float, float]] = []
    async with _streaming(url, names) as (arrivals, check):
        await asyncio.sleep(options.warm_up_s)
        for _ in range(options.rounds):
            for label, act in work.items():
                await asyncio.to_thread(settle)
                await asyncio.sleep(0.5)
                begin = time.monotonic()
                await asyncio.to_thread(act)
                done = time.monotonic()
                is_short = label != "quiet"
                await asyncio.sleep(0 if is_short else options.window_s)
                windows.append((label, begin, done if is_short else time.monotonic()))
                check()
    gaps: dict[str, list[float]] = {label: [] for label in work}
    for label, begin, end in windows:
        for times in arrivals:
            gaps[label] += [b - a for a, b in pairwise(times) if a < end and b > begin]
    return gaps


def catalog(directory: Path, options: argparse.Namespace) -> list[Row]:
    """Tokens a second of the same hot adapters, in a small catalog and a large one, in turns."""
    shape = write_checkpoint(directory / "model", options.size)
    names = [f"hot{index:02}" for index in range(options.hot)]
    for index, name in enumerate(names):
        write_adapter(directory / "adapters" / name, shape, HOT_RANK, seed=index)
    large = directory / "large"
    for name in names:
        _link(directory / "adapters" / name, large / name)
    _fill_store(directory, large, shape, options.catalog - options.hot)
    tokens = asyncio.run(_rates_in_turns(directory, large, names, options))
    rows: list[Row] = [
        {"catalog": label, "tokens/s": statistics.median(rates)} for label, rates in tokens.items()
    ]
    _print(rows)
    shares = [large / small for small, large in zip(*tokens.values(), strict=True)]
    print(f"large / small catalog: {statistics.median(shares):.1%} (target: >= 95 %)")
    return rows


async def _rates_in_turns(
    directory: Path, large: Path, names: list[str], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Two servers, of which one at a time has work."""
    model = str(directory / "model")
    rates: dict[str, list[float]] = {str(options.hot): [], str(options.catalog): []}
    with (
        served(model, str(directory / "adapters")) as small_server,
        served(model, str(large)) as large_server,
    ):
        for number in range(options.rounds + 1):
            for label, server in zip(rates, (small_server, large_server), strict=True):
                rate = await _rate(server.url, names, options)
                if number > 0:
                    rates[label].append(rate)
    return rates


async def _rate(url: str, names: list[str], options: argparse.Namespace) -> float:
    """Tokens a second of one stream for each name, from when all have begun."""
    async with _streaming(url, names) as (arrivals, check):
        while not all(arrivals):
            await asyncio.sleep(0.05)
            check()
        await asyncio.sleep(options.warm_up_s)
        begin, num_before = time.monotonic(), sum(map(len, arrivals))
        await asyncio.sleep(options.window_s)
        check()
        return (sum(map(len, arrivals)) - num_before) / (time.monotonic() - begin)


def start(directory: Path, options: argparse.Namespace) -> list[Row]:
    """Seconds from the base's load to ready with many adapters in the store."""
    shape = write_checkpoint(directory / "model", options.size)
    _fill_store(directory, directory / "adapters", shape, options.start)
    with served(*_arguments(directory)) as server:
        after_base_s = server.ready_s - server.time_of(BASE_LOADED)
        begin = time.monotonic()
        num_models = len(server.get("/v1/models").json()["data"])
        listing_s = time.monotonic() - begin
    row: Row = {
        "adapters": options.start,
        "ready after base s": after_base_s,
        "listed models": num_models,
        "listing ms": listing_s * 1e3,
    }
    _print([row])
    if num_models != options.start + 1:
        raise SystemExit(f"/v1/models lists {num_models}, not {options.start} and the base")
    return [row]


@contextlib.asynccontextmanager
async def _streaming(
    url: str, names: list[str]
) -> AsyncIterator[tuple[list[list[float]], Callable[[], None]]]:
    """One endless stream for each name: the times of its tokens, and a check that none has ended
    with an error (which it raises)."""
    arrivals: list[list[float]] = [[] for _ in names]
    limits = httpx.Limits(max_connections=len(names))
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
        tasks = [
            asyncio.create_task(_stream_on(client, name, [7 * index + 1] * PROMPT_TOKENS, times))
            for index, (name, times) in enumerate(zip(names, arrivals, strict=True))
        ]

        def check() -> None:
            for task in tasks:
                if task.done():
                    task.result()

        try:
            yield arrivals, check
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _stream_on(
    client: httpx.AsyncClient, name: str, prompt: list[int], times: list[float]
) -> None:
    """Ask again whenever an answer ends."""
    while True:
        async for time_s in stream_times(client, name, prompt, max_tokens=1500):
            times.append(time_s)


def _first_token_s(server: Served, name: str, prompt: list[int]) -> float:
    async def first() -> float:
        async with httpx.AsyncClient(base_url=server.url, timeout=REQUEST_TIMEOUT_S) as client:
            begin = time.monotonic()
            times = [time_s async for time_s in stream_times(client, name, prompt, max_tokens=2)]
            return times[0] - begin

    return asyncio.run(first())


def _expect_tier(server: Served, name: str, tier: str) -> None:
    row = server.adapter(name)
    if row["tier"] != tier:
        raise RuntimeError(f"{name} should be in tier {tier!r}: {row}")


def _fill_store(directory: Path, store: Path, shape: BaseShape, count: int) -> None:
    """Adapters of one content under many names: only their names take room."""
    original = directory / "original"
    write_adapter(original, shape, RANKS[0], seed=5000)
    for index in range(count):
        _link(original, store / f"cold{index:05}")


def _link(original: Path, copy: Path) -> None:
    copy.mkdir(parents=True)
    for file in original.iterdir():
        os.link(file, copy / file.name)


def _path(directory: Path, rank: int, copy: int) -> Path:
    return directory / "adapters" / f"r{rank}-{copy}"


def _weight_bytes(path: Path) -> int:
    return (path / "adapter_model.safetensors").stat().st_size


def _arguments(directory: Path) -> tuple[str, str]:
    return str(directory / "model"), str(directory / "adapters")


def _print(rows: list[Row]) -> None:
    """A table whose heading is the names of the first row's values."""
    if not rows:
        return
    cells = [[f"{v:.1f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    columns = list(zip(rows[0], *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--cold-load", action="store_true")
    mode.add_argument("--catalog", type=int, help="adapters in the large catalog")
    mode.add_argument("--start", type=int, help="adapters in the store")
    parser.add_argument("--size", choices=sorted(BIG_RANKS), default="qwen2.5-0.5b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--hot", type=int, default=32)
    parser.add_argument("--window-s", type=float, default=4.0)
    parser.add_argument("--warm-up-s", type=float, default=3.0)
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    measure = tiers
    for name, function in (("cold_load", cold_load), ("catalog", catalog), ("start", start)):
        if getattr(options, name):
            measure = function
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Path(directory), options)
    if options.json:
        write_document(options.json, options, rows)


if __name__ == "__main__":
    main()
