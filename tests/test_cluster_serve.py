"""Engines in processes of their own behind one front: killed, moved, loaded into."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil

import pytest

from cluster_factory import assert_one_end, collect, empty_view, tokens_of
from cluster_kills import (
    check_answers,
    check_nothing_is_left,
    engine_config,
    expected_tokens,
    kill_one,
    local_cluster,
    run_all,
    streams,
    until,
)
from engine_factory import save_swarm
from loraswarm.cluster.front import ClusterClient, FrontOptions
from loraswarm.cluster.local_replicas import local_starter
from loraswarm.cluster.moving import MoveFailed
from loraswarm.cluster.routing import make_router
from loraswarm.core.admin import LoadAdapter, UnloadAdapter
from loraswarm.core.request import Request, SamplingParams

NUM_ADAPTERS = 6


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, NUM_ADAPTERS, max_position_embeddings=1024)
    return path


@pytest.fixture(scope="module")
def cluster(swarm):
    """Two replicas for all tests of the file, and the loop that they live in."""
    with asyncio.Runner() as runner:
        manager = local_cluster(engine_config(swarm), 2)
        client = runner.run(manager.__aenter__())
        yield runner, client
        runner.run(manager.__aexit__(None, None, None))


def num_sent(client: ClusterClient) -> int:
    held = [client.requests.get(f"s{i}") for i in range(64)]
    return sum(len(one.token_ids) for one in held if one is not None)


def test_a_request_moves_to_and_fro_between_engines_while_it_is_answered(swarm, cluster):
    """By turns with its K and V and without."""
    runner, client = cluster
    params = SamplingParams(max_tokens=600, temperature=1.0, seed=3, ignore_eos=True, logprobs=0)
    request = Request(
        request_id="s0", prompt_token_ids=tuple(range(3, 40)), params=params, adapter="a003"
    )
    expected = expected_tokens(swarm, [request])

    async def main():
        events, num_moves = [], 0
        async for event in client.generate(request):
            events.append(event)
            held = client.requests.get("s0")
            if held.handover is None and num_moves < 64:
                targets = client.fleet.replicas.keys() - {held.replica_id}
                with contextlib.suppress(MoveFailed):  # the engine has come to the end already
                    await client.mover.move("s0", min(targets), with_kv=num_moves % 2 == 0)
                    num_moves += 1
        await check_nothing_is_left(client)
        return events, num_moves

    events, num_moves = runner.run(main())
    assert_one_end(events)
    assert tokens_of(events) == expected["s0"]
    assert num_moves >= 8


def test_adapters_are_loaded_and_unloaded_on_every_replica(cluster):
    runner, client = cluster

    async def main():
        state = await client.administer(UnloadAdapter("a005"))
        assert state.state == "unloaded"
        assert "a005" not in client.adapters
        state = await client.administer(LoadAdapter("a005", "a005"))
        assert state.state == "served"
        for replica in client.fleet.replicas.values():
            assert "a005" in replica.adapters
        assert (await client.stats()).num_free_pages > 0
        assert len(await client.adapter_states()) == NUM_ADAPTERS

    runner.run(main())


def test_streams_go_on_when_an_engine_is_killed_and_nothing_is_left_behind(swarm, cluster):
    runner, client = cluster
    requests = streams(12, NUM_ADAPTERS, 96)
    expected = expected_tokens(swarm, requests)

    async def main():
        answers = await run_all(client, requests)
        await until(lambda: num_sent(client) > 12 * 8)
        victim = kill_one(client)
        found = await answers
        check_answers(requests, found, expected)
        await until(lambda: len(client.fleet.replicas) == 2)
        assert victim not in client.fleet.replicas
        late = await collect(client, requests[1])
        assert tokens_of(late) == expected["s1"]
        await check_nothing_is_left(client)

    runner.run(main())


def test_answers_go_on_where_the_same_adapters_lie_in_other_files(swarm, tmp_path):
    """As on two machines: a store stamps a copy otherwise, so no move is trusted, but no answer is
    broken off when a replica dies."""
    shutil.copytree(swarm / "adapters", tmp_path / "copies")
    config = engine_config(swarm)
    copies = dataclasses.replace(config, adapters=(str(tmp_path / "copies"),))
    starters = [local_starter(one, lambda _: None) for one in (config, copies)]
    requests = streams(6, 3, 200)
    expected = expected_tokens(swarm, requests)

    async def main():
        client = ClusterClient(
            lambda replica_id: starters[int(replica_id[1:]) % 2](replica_id),
            make_router("least-loaded"),
            empty_view(),
            FrontOptions(num_replicas=2, is_one_machine=False, seed=0),
        )
        await client.open()
        try:
            answers = await run_all(client, requests)
            await until(lambda: num_sent(client) > 12)
            held = client.requests.get("s0")
            (other,) = client.fleet.replicas.keys() - {held.replica_id}
            with pytest.raises(MoveFailed, match="other contents of 'a000'"):
                await client.mover.move("s0", other, with_kv=True)
            kill_one(client)
            check_answers(requests, await answers, expected)
        finally:
            await client.close()

    asyncio.run(main())
