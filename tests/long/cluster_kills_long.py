"""Streams over engines of which one is killed every few seconds: all answers are right.

    python tests/long/cluster_kills_long.py [--replicas 3] [--streams 48] [--adapters 24]
        [--kills 5] [--every 4] [--tokens 160] [--moves] [--router marginal]

So many streams are open at all times until the last kill; with `--moves` requests are moved between
the replicas meanwhile, with and without their K and V. Each answer must be that of one engine which
nothing happens to, and at the end no page, pin or request may be left anywhere.
tests/test_cluster_serve.py runs a slice.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster_factory import collect
from cluster_kills import (
    check_answers,
    check_nothing_is_left,
    engine_config,
    expected_tokens,
    kill_one,
    local_cluster,
    streams,
    until,
)
from engine_factory import save_swarm
from loraswarm.cluster.front import ClusterClient
from loraswarm.cluster.moving import MoveFailed
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request

MOVE_EVERY_S = 0.05
Answer = tuple[Request, list[SequenceEvent]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("replicas", 3), ("streams", 48), ("adapters", 24), ("kills", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--every", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--moves", action="store_true")
    parser.add_argument("--router", default="marginal")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        save_swarm(path, options.adapters, max_position_embeddings=1024)
        requests = streams(options.streams, options.adapters, options.tokens)
        expected = expected_tokens(path, requests)
        asyncio.run(run(path, options, requests, expected))


async def run(
    path: Path,
    options: argparse.Namespace,
    requests: list[Request],
    expected: dict[str, list[int]],
) -> None:
    config = engine_config(path, prefix_caching=True)
    async with local_cluster(config, options.replicas, options.router) as client:
        stop = asyncio.Event()
        started_s = time.monotonic()
        workers = [asyncio.create_task(worker(client, one, stop)) for one in requests]
        moves = asyncio.create_task(mover(client, options.moves, stop))
        for _ in range(options.kills):
            await asyncio.sleep(options.every)
            # Starts take longer than that on a machine that has other things to do.
            await until(lambda: any(one.num_requests for one in client.view.replicas.values()))
            victim = kill_one(client)
            print(f"{time.monotonic() - started_s:.1f} s: killed {victim}", flush=True)
            await until(lambda gone=victim: gone not in client.fleet.replicas)
        await asyncio.sleep(options.every)
        stop.set()
        answers = [answer for found in await asyncio.gather(*workers) for answer in found]
        for request, events in answers:
            name, _, _ = request.request_id.partition("-")
            check_answers([request], [events], {request.request_id: expected[name]})
        await until(lambda: len(client.fleet.replicas) == options.replicas)
        await check_nothing_is_left(client)
        print(
            f"{len(answers)} answers of {options.streams} streams, {options.kills} kills,"
            f" {await moves} moves, {time.monotonic() - started_s:.1f} s: all right, nothing left"
        )


async def worker(client: ClusterClient, request: Request, stop: asyncio.Event) -> list[Answer]:
    """One request after the other until it is told to stop."""
    found: list[Answer] = []
    while not found or not stop.is_set():
        name = f"{request.request_id}-{len(found)}"
        one = dataclasses.replace(request, request_id=name)
        found.append((one, await collect(client, one)))
    return found


async def mover(client: ClusterClient, is_wanted: bool, stop: asyncio.Event) -> int:
    """Moves any open request anywhere; how many moves were carried out."""
    chance, num_moves = random.Random(0), 0
    while is_wanted and not stop.is_set():
        await asyncio.sleep(MOVE_EVERY_S)
        placed = [one for view in client.view.replicas.values() for one in view.requests]
        if placed and len(client.fleet.replicas) > 1:
            target = chance.choice(sorted(client.fleet.replicas))
            try:
                await client.mover.move(chance.choice(placed), target, chance.random() < 0.5)
                num_moves += 1
            except MoveFailed:
                continue
    return num_moves


if __name__ == "__main__":
    main()
