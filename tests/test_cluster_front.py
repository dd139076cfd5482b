"""The cluster as one engine: routing, waiting, administration and counts over fake replicas."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from cluster_factory import (
    SEEDED,
    Starter,
    assert_one_end,
    cluster,
    collect,
    request,
    tokens_of,
    until,
)
from fake_replica import answer_of
from loraswarm.core.admin import LoadAdapter, PinAdapter, UnloadAdapter
from loraswarm.core.client import served_names
from loraswarm.core.request import SamplingParams
from loraswarm.core.residency_report import ResidencyReport
from loraswarm.errors import ConfigError, EngineError, InvalidRequest, StoreError, UnknownAdapter
from virtual_time import run_virtually


def test_answers_are_those_of_one_engine_and_replicas_share_the_requests():
    async def main():
        starter = Starter({"step_s": 0.1})
        async with cluster(starter) as client:
            requests = [request(f"r{i}") for i in range(9)]
            found = await asyncio.gather(*(collect(client, one) for one in requests))
        for one, events in zip(requests, found, strict=True):
            assert tokens_of(events) == answer_of(one)
            assert_one_end(events)
        assert [replica.num_generated for replica in starter.started] == [3, 3, 3]

    run_virtually(main())


def test_a_request_without_a_seed_is_given_one_and_the_same_by_the_next_start():
    params = SamplingParams(max_tokens=8, temperature=1.0)

    async def main():
        async with cluster(Starter()) as client:
            return [tokens_of(await collect(client, request(f"r{i}", params=params))) for i in "ab"]

    first, second = run_virtually(main())
    assert first != second
    assert run_virtually(main()) == [first, second]


def test_closing_a_stream_early_aborts_the_request_on_its_replica():
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter) as client:
            stream = client.generate(request())
            await anext(stream)
            assert sum(len(replica.running) for replica in starter.started) == 1
            await stream.aclose()

    run_virtually(main())


def test_a_refusal_is_passed_on_and_not_tried_elsewhere():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            (event,) = await collect(client, request(adapter="nobody"))
            assert event.error.http_status == UnknownAdapter.http_status
            assert all(replica.is_alive for replica in starter.started)
            assert [replica.num_generated for replica in starter.started] == [0, 0, 0]

    run_virtually(main())


def test_an_id_that_is_open_is_refused():
    async def main():
        async with cluster(Starter({"hold_at": 1})) as client:
            stream = client.generate(request())
            await anext(stream)
            with pytest.raises(ValueError, match="already in use"):
                await collect(client, request())
            await stream.aclose()

    run_virtually(main())


def test_a_start_that_fails_is_raised_and_ends_the_others():
    async def main():
        starter = Starter(failures=[ConfigError("no such model")])
        with pytest.raises(ConfigError, match="no such model"):
            async with cluster(starter):
                pass
        assert starter.alive() == []

    run_virtually(main())


def test_requests_wait_for_a_replica_up_to_a_deadline():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=1, wait_s=10) as client:
            starter.start_s = 30.0
            starter.started[0].kill()
            await until(lambda: not client.is_alive)
            (early,) = await collect(client, request("early"))
            assert early.error.http_status == 503
            assert "no replica has served for 10 s" in early.error.message
            await asyncio.sleep(15)
            late = await collect(client, request("late"))
            assert tokens_of(late) == answer_of(request("late"))
            assert client.is_alive

    run_virtually(main())


def test_when_no_replica_can_be_started_any_more_the_cluster_ends_and_says_why():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=1, max_failures=3) as client:
            starter.failures = [OSError("no memory") for _ in range(9)]
            starter.started[0].kill()
            waiting = asyncio.create_task(collect(client, request()))
            await client.wait_closed()
            (event,) = await waiting
            assert "no replica can be started: no memory" in event.error.message
            assert not client.is_alive
            assert len(starter.failures) == 6

    run_virtually(main())


def test_a_load_reaches_every_replica_and_those_that_come_later():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            state = await client.administer(LoadAdapter("new", "/new"))
            assert (state.name, state.state) == ("new", "served")
            await client.administer(UnloadAdapter("b"))
            await client.administer(PinAdapter("a"))
            assert served_names(client.adapters) == ["a", "new", "poison"]
            starter.started[0].kill()
            await until(lambda: len(starter.alive()) == 3)
            await until(lambda: len(client.fleet.replicas) == 3)
            newest = starter.started[-1]
            assert sorted(newest.adapters) == ["a", "new", "poison"]
            assert newest.commands == [
                LoadAdapter("new", "/new", in_place=True),
                UnloadAdapter("b"),
                PinAdapter("a"),
            ]

    run_virtually(main())


def test_what_all_replicas_refuse_is_raised_as_one_engine_would():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            with pytest.raises(InvalidRequest, match=r"^a has already been loaded$"):
                await client.administer(LoadAdapter("a", "/a"))
            with pytest.raises(UnknownAdapter):
                await client.administer(UnloadAdapter("nobody"))
            starter.started[0].kill()
            await until(lambda: "r3" in client.fleet.replicas)
            assert starter.started[-1].commands == []

    run_virtually(main())


def test_a_load_that_fails_on_one_replica_names_it_and_is_tried_there_again():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            starter.started[1].admin_error = StoreError("the disk is gone")
            with pytest.raises(Exception, match="replica r1: the disk is gone") as raised:
                await client.administer(LoadAdapter("new", "/new"))
            assert raised.value.http_status == 503
            assert "done by r0, r2" in str(raised.value)
            assert "new" in client.adapters
            events = [await collect(client, request(f"r{i}", "new")) for i in range(4)]
            assert all(events[i][-1].finish_reason == "length" for i in range(4))
            starter.started[1].admin_error = None
            await client.administer(LoadAdapter("new", "/new"))
            assert [len(replica.commands) for replica in starter.started] == [1, 2, 1]
            with pytest.raises(InvalidRequest, match="already been loaded"):
                await client.administer(LoadAdapter("new", "/new"))

    run_virtually(main())


def test_a_replica_that_dies_of_a_command_does_not_fail_it_and_its_successor_is_told():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            starter.started[1].faults["administer", "before"] = "die"
            state = await client.administer(LoadAdapter("new", "/new"))
            assert state.name == "new"
            await until(lambda: len(client.fleet.replicas) == 3)
            assert "new" in starter.started[-1].adapters

    run_virtually(main())


def test_a_command_goes_on_if_its_caller_does_not_wait():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            starter.started[0].hang()
            load = asyncio.create_task(client.administer(LoadAdapter("new", "/new")))
            await asyncio.sleep(1)
            load.cancel()
            await asyncio.wait((load,))
            starter.started[0]._awake.set()
            await until(lambda: "new" in starter.started[0].adapters)
            starter.started[2].kill()
            await until(lambda: len(starter.started) == 4)
            await until(lambda: "new" in starter.started[3].adapters)

    run_virtually(main())


def test_counts_are_added_up_and_totals_never_fall_when_a_replica_goes():
    async def main():
        starter = Starter({"stats_totals": 7})
        async with cluster(starter) as client:
            before = await client.stats()
            assert (before.total_misses, before.num_free_pages) == (21, 24)
            assert before.running_adapters == ("r0", "r1", "r2")
            starter.started[0].kill()
            starter.options["stats_totals"] = 0
            await until(lambda: len(starter.alive()) == 3 and len(client.fleet.replicas) == 3)
            after = await client.stats()
            assert (after.total_misses, after.num_free_pages) == (21, 24)

    run_virtually(main())


def test_counts_do_not_wait_for_a_replica_that_hangs_and_totals_do_not_fall():
    async def main():
        starter = Starter({"stats_totals": 7})
        async with cluster(starter) as client:
            await client.stats()
            starter.started[0].hang()
            asked_s = asyncio.get_running_loop().time()
            stats = await client.stats()
            assert asyncio.get_running_loop().time() - asked_s <= 2
            assert (stats.total_misses, stats.num_free_pages) == (21, 16)
            assert stats.running_adapters == ("r1", "r2")

    run_virtually(main())


def test_an_adapter_that_one_replica_refuses_is_served_and_its_state_says_so():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            broken = dataclasses.replace(starter.started[0].adapters["a"], refusal="broken")
            starter.started[0].adapters["a"] = broken
            assert client.adapters["a"].refusal is None
            del starter.started[1].adapters["b"]
            names = [state.name for state in await client.adapter_states()]
            assert names == ["a", "b", "poison"]
            found = [await collect(client, request(f"r{i}", "a")) for i in range(3)]
            assert all(tokens_of(events) for events in found)
            assert starter.started[0].num_generated == 0

    run_virtually(main())


def test_a_replica_is_added_and_removed_at_run_time_without_a_request_lost():
    async def main():
        starter = Starter({"step_s": 0.1})
        async with cluster(starter, num_replicas=2) as client:
            client.fleet.add(1)
            await until(lambda: len(client.fleet.replicas) == 3)
            requests = [request(f"r{i}") for i in range(6)]
            tasks = [asyncio.create_task(collect(client, one)) for one in requests]
            await asyncio.sleep(0.35)
            assert len(starter.started[1].running) == 2
            await client.fleet.remove("r1")
            assert sorted(client.fleet.replicas) == ["r0", "r2"]
            found = await asyncio.gather(*tasks)
            for one, events in zip(requests, found, strict=True):
                assert tokens_of(events) == answer_of(one)
                assert_one_end(events)
            assert sum(len(r.adopted) for r in starter.started) == 2
            await asyncio.sleep(10)
            assert len(starter.started) == 3
            with pytest.raises(InvalidRequest, match="no replica is named 'r1'; known: r0, r2"):
                await client.fleet.remove("r1")

    run_virtually(main())


def test_a_removal_that_cannot_move_runs_what_is_left_again_elsewhere():
    async def main():
        starter = Starter({"hold_at": 5})
        async with cluster(starter, num_replicas=2, drain_s=20) as client:
            task = asyncio.create_task(collect(client, request()))
            await until(lambda: len(starter.started[0].running) == 1)
            starter.started[0].faults["freeze", "before"] = "error"
            starter.started[1].hold_at = None
            await client.fleet.remove("r0")
            events = await task
            assert tokens_of(events) == answer_of(request())
            assert_one_end(events)
            assert len(starter.started[1].adopted[0].output_token_ids) == 5
            with pytest.raises(InvalidRequest, match="last replica"):
                await client.fleet.remove("r1")

    run_virtually(main())


def test_closing_ends_open_requests_and_replicas():
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter) as client:
            task = asyncio.create_task(collect(client, request()))
            await until(lambda: sum(len(one.running) for one in starter.started) == 1)
            await client.close()
            events = await task
            assert events[-1].finish_reason == "error"
            assert starter.alive() == []
            with pytest.raises(EngineError):
                await client.stats()
            await client.close()

    run_virtually(main())


def test_queue_time_includes_waiting_for_a_replica():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=1) as client:
            starter.start_s = 4.0
            starter.started[0].kill()
            await until(lambda: not client.is_alive)
            events = await collect(client, request(params=SEEDED))
            queue_s = [event.queue_s for event in events if event.queue_s is not None]
            assert len(queue_s) == 1
            assert queue_s[0] > 4.0

    run_virtually(main())


def test_the_view_follows_reports_and_a_missing_one_is_asked_for_again():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=2) as client:
            first = starter.started[0]
            first.on_report(ResidencyReport(epoch=1, number=0, is_full=True, tiers={"a": "host"}))
            first.on_report(ResidencyReport(epoch=1, number=1, tiers={"a": "device"}))
            assert client.view.replicas["r0"].tiers == {"a": "device"}
            assert client.view.holders == {"a": {"r0"}}
            assert first.num_watches == 1
            first.on_report(ResidencyReport(epoch=1, number=3, tiers={"b": "host"}))
            assert first.num_watches == 2
            assert client.view.holders == {"a": {"r0"}}
            first.kill()
            await until(lambda: "r0" not in client.fleet.replicas)
            assert client.view.holders == {}

    run_virtually(main())


def test_memory_is_that_of_all_replicas_and_the_rest_that_of_any():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            one = starter.started[0].info
            assert client.info.num_pages == 3 * one.num_pages
            assert client.info.page_tokens == one.page_tokens
            client.fleet.add(1)
            await until(lambda: len(client.fleet.replicas) == 4)
            assert client.info.num_pages == 4 * one.num_pages

    run_virtually(main())
