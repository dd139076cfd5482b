"""A replica that dies or hangs: its requests go on elsewhere, and end exactly once."""

from __future__ import annotations

import asyncio

import pytest

from cluster_factory import (
    ADAPTERS,
    Starter,
    assert_one_end,
    cluster,
    collect,
    request,
    tokens_of,
    until,
)
from fake_replica import POISON, answer_of
from loraswarm.core.admin import LoadAdapter
from loraswarm.core.request import SamplingParams
from virtual_time import run_virtually

LOGGED = SamplingParams(max_tokens=9, temperature=1.0, seed=5, logprobs=0, prompt_logprobs=0)


@pytest.mark.parametrize("num_before", range(10))
def test_a_death_at_any_token_leaves_no_gap_and_repeats_nothing(num_before):
    async def main():
        starter = Starter({"hold_at": num_before})
        async with cluster(starter, num_replicas=2) as client:
            task = asyncio.create_task(collect(client, request(params=LOGGED)))
            await until(lambda: starter.started[0].num_generated == 1)
            await asyncio.sleep(1)
            starter.started[1].hold_at = None
            starter.started[0].kill()
            return await task, starter.started[1]

    events, heir = run_virtually(main())
    assert tokens_of(events) == answer_of(request(params=LOGGED))
    assert_one_end(events)
    logprobs = [one.logprob for event in events for one in event.logprobs]
    assert logprobs == [-float(i) for i in range(9)]
    assert [event.prompt_logprobs is not None for event in events] == [True] + [False] * 8
    assert [event.queue_s is not None for event in events] == [True] + [False] * 8
    if 0 < num_before < 9:
        (snapshot,) = heir.adopted
        assert snapshot.output_token_ids == tuple(tokens_of(events)[:num_before])
        assert snapshot.request.params.seed == 5
        assert snapshot.adapter_digests == ("d-a",)
        assert snapshot.kv is None
    else:
        assert heir.adopted == []


def test_many_deaths_under_load_lose_nothing():
    async def main():
        starter = Starter({"step_s": 0.1})
        params = SamplingParams(max_tokens=200, temperature=1.0, seed=3)
        async with cluster(starter) as client:
            requests = [request(f"r{i}", ADAPTERS[i % 2], params) for i in range(48)]
            tasks = [asyncio.create_task(collect(client, one)) for one in requests]
            for _ in range(5):
                await asyncio.sleep(2)
                starter.alive()[0].kill()
            found = await asyncio.gather(*tasks)
            for one, events in zip(requests, found, strict=True):
                assert tokens_of(events) == answer_of(one)
                assert_one_end(events)
            assert len(starter.started) == 8
            assert len(starter.alive()) == 3

    run_virtually(main())


def test_a_hung_replica_is_killed_and_replaced_and_its_requests_go_on():
    async def main():
        starter = Starter({"step_s": 0.1})
        async with cluster(starter, num_replicas=2, hang_s=5, ping_s=1) as client:
            loop = asyncio.get_running_loop()
            requests = [request(f"r{i}") for i in range(4)]
            tasks = [asyncio.create_task(collect(client, one)) for one in requests]
            await asyncio.sleep(0.35)
            starter.started[0].hang()
            hung_s = loop.time()
            found = await asyncio.gather(*tasks)
            assert 5 <= loop.time() - hung_s <= 10
            for one, events in zip(requests, found, strict=True):
                assert tokens_of(events) == answer_of(one)
            assert not starter.started[0].is_alive
            await until(lambda: len(client.fleet.replicas) == 2)

    run_virtually(main())


def test_a_replica_that_hangs_while_it_is_idle_is_replaced_and_commands_reach_its_successor():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=2, hang_s=5, idle_ping_s=10) as client:
            starter.started[0].hang()
            state = await client.administer(LoadAdapter("new", "/new"))
            assert state.state == "served"
            assert not starter.started[0].is_alive
            await until(lambda: len(client.fleet.replicas) == 2)
            assert "new" in starter.started[2].adapters

    run_virtually(main())


def test_an_idle_replica_and_one_that_answers_are_not_killed():
    async def main():
        starter = Starter({"hold_at": 3})
        async with cluster(starter, num_replicas=2, hang_s=5, ping_s=1) as client:
            task = asyncio.create_task(collect(client, request()))
            await asyncio.sleep(60)
            assert len(starter.alive()) == 2
            assert len(starter.started) == 2
            starter.started[0].go.set()
            assert_one_end(await task)

    run_virtually(main())


def test_a_request_that_kills_replicas_ends_with_an_error_and_those_beside_it_do_not():
    async def main():
        starter = Starter({"hold_at": 3})
        starter.change = lambda replica: replica.go.set() if starter.started else None
        async with cluster(starter, num_replicas=2) as client:
            tasks = [asyncio.create_task(collect(client, request(f"r{i}"))) for i in range(6)]
            poison = asyncio.create_task(collect(client, request("poison", POISON)))
            await asyncio.sleep(1)
            starter.started[0].go.set()
            events = await poison
            found = await asyncio.gather(*tasks)
            for i, answer in enumerate(found):
                assert tokens_of(answer) == answer_of(request(f"r{i}"))
                assert_one_end(answer)
            assert_one_end(events, "error")
            assert "3 engines in turn have ended" in events[-1].error.message
            assert events[-1].error.http_status == 500
            assert tokens_of(events) == answer_of(request("poison", POISON))[:3]
            await until(lambda: len(client.fleet.replicas) == 2)
            assert len(starter.started) == 5

    run_virtually(main())


def test_requests_that_wait_behind_a_poisonous_one_are_not_blamed():
    """It kills before any of them has a token, so all are suspected; one at a time is on trial."""

    async def main():
        starter = Starter({"dies_at": 0, "step_s": 0.1})
        async with cluster(starter, num_replicas=1) as client:
            poison = asyncio.create_task(collect(client, request("poison", POISON)))
            tasks = [asyncio.create_task(collect(client, request(f"r{i}"))) for i in range(6)]
            found = await asyncio.gather(*tasks)
            for i, answer in enumerate(found):
                assert tokens_of(answer) == answer_of(request(f"r{i}"))
            assert_one_end(await poison, "error")
            assert len(starter.started) <= 5

    run_virtually(main())


def test_starts_that_fail_are_tried_again_later_and_later():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=2, retry_s=1, max_retry_s=4) as client:
            starter.failures = [OSError("no memory") for _ in range(4)]
            loop = asyncio.get_running_loop()
            died_s = loop.time()
            starter.started[0].kill()
            await until(lambda: len(client.fleet.replicas) == 1)
            await until(lambda: len(client.fleet.replicas) == 2)
            assert 1 + 2 + 4 + 4 <= loop.time() - died_s < 13

    run_virtually(main())


def test_an_adapter_that_was_replaced_meanwhile_is_named_with_the_contents_it_had():
    """The adopting engine compares: what it gets are the contents that made the first tokens."""

    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=2) as client:
            task = asyncio.create_task(collect(client, request()))
            await asyncio.sleep(1)
            starter.started[1].hold_at = None
            for replica in starter.started:
                old = replica.adapters["a"]
                replica.adapters["a"] = type(old)(name="a", path="/a", digest="other")
            starter.started[0].kill()
            await task
            return starter.started[1].adopted[0].adapter_digests

    assert run_virtually(main()) == ("d-a",)
