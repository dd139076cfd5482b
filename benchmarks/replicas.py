"""Tokens a second of several replicas against one, each with the same number of threads.

    python benchmarks/replicas.py --replicas 2 --threads 2

Engines are child processes on this machine, of random weights; requests of 32 adapters by turns,
with as many in flight as all seats. Prints the ratio and the number of cores: replicas that do not
have cores of their own cannot add up, nor where one of them has the memory's rate to itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from document import json_path, write_document
from loraswarm.cluster.assembly import Cluster
from loraswarm.cluster.local_replicas import local_starter
from loraswarm.config import ClusterConfig, EngineConfig
from loraswarm.core.client import EngineClient
from loraswarm.core.request import Request, SamplingParams
from random_swarm import write_swarm

NUM_ADAPTERS = 32
RANKS = (8, 16, 32, 64)


async def answer(client: EngineClient, request: Request) -> int:
    """Tokens that came."""
    num_tokens = 0
    async for event in client.generate(request):
        assert event.error is None, event.error
        num_tokens += len(event.token_ids)
    return num_tokens


async def serve(client: EngineClient, label: str, options: argparse.Namespace, num: int) -> float:
    """Tokens a second of so many requests, with all seats taken as long as there are more."""
    chance = random.Random(options.seed)
    params = SamplingParams(max_tokens=options.output, temperature=0.0, ignore_eos=True)
    requests = [
        Request(
            request_id=f"{label}-{index}",
            prompt_token_ids=tuple(chance.randrange(1, 4096) for _ in range(options.prompt)),
            params=params,
            adapter=f"a{index % NUM_ADAPTERS:03}",
        )
        for index in range(num)
    ]
    seats = asyncio.Semaphore(options.seats * options.replicas)

    async def one(request: Request) -> int:
        async with seats:
            return await answer(client, request)

    begin_s = time.perf_counter()
    num_tokens = sum(await asyncio.gather(*(one(request) for request in requests)))
    return num_tokens / (time.perf_counter() - begin_s)


async def measure(swarm: Path, num_replicas: int, options: argparse.Namespace) -> float:
    engine = EngineConfig(
        model=f"{swarm}/model",
        adapters=(f"{swarm}/adapters",),
        num_threads=options.threads,
        max_num_sequences=options.seats,
        pool_bytes=2 << 30,
        prefix_caching=False,
    )
    config = ClusterConfig(num_replicas=num_replicas, backend="processes")
    cluster = Cluster(local_starter(engine, lambda line: None), engine, config)
    try:
        client = await cluster.open()
        await serve(client, "warm-up", options, NUM_ADAPTERS * num_replicas)
        return await serve(client, "measured", options, options.requests)
    finally:
        await cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of each replica")
    parser.add_argument("--seats", type=int, default=16, help="of each replica")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", default="qwen2.5-0.5b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--swarm", type=Path, help="where random_swarm.py has written one of 32")
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        swarm = options.swarm or Path(directory)
        if options.swarm is None:
            write_swarm(swarm, options.size, NUM_ADAPTERS, RANKS)
        for turn in range(options.rounds):
            for num in (1, options.replicas) if turn % 2 == 0 else (options.replicas, 1):
                tokens_per_s = asyncio.run(measure(swarm, num, options))
                rows.append({"replicas": num, "tokens_per_s": tokens_per_s})
                print(f"{num} replicas  {tokens_per_s:7.1f} tokens/s", flush=True)
    one, several = (
        statistics.median(row["tokens_per_s"] for row in rows if row["replicas"] == num)
        for num in (1, options.replicas)
    )
    print(
        f"{options.replicas} replicas of {options.threads} threads: {several / one:.2f} x one,"
        f" on {os.cpu_count()} cores"
    )
    if options.json:
        write_document(options.json, options, rows)


if __name__ == "__main__":
    main()
