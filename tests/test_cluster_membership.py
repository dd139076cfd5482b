"""Which replicas there are, when removals, starts and commands come at a bad moment."""

from __future__ import annotations

import asyncio

import pytest

from cluster_factory import (
    Starter,
    assert_one_end,
    cluster,
    collect,
    empty_view,
    request,
    tokens_of,
    until,
)
from fake_replica import answer_of
from loraswarm.cluster.assembly import UNKNOWN_ADAPTER_BYTES, AdapterBytes
from loraswarm.cluster.front import ClusterClient, FrontOptions
from loraswarm.cluster.routing import make_router
from loraswarm.core.admin import LoadAdapter, UnloadAdapter
from loraswarm.core.client import AdapterSummary
from loraswarm.core.residency_report import ResidencyReport
from loraswarm.errors import InvalidRequest, StoreError
from virtual_time import run_virtually


def test_the_last_that_serves_is_not_removed_while_others_only_start():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=1) as client:
            starter.start_s = 30.0
            client.fleet.add(1)
            with pytest.raises(InvalidRequest, match=r"no other replica serves now \(1 are"):
                await client.fleet.remove("r0")
            assert client.is_alive
            await until(lambda: len(client.fleet.replicas) == 2)
            await client.fleet.remove("r0")
            assert list(client.fleet.replicas) == ["r1"]

    run_virtually(main())


def test_very_many_replicas_are_refused():
    async def main():
        async with cluster(Starter(), num_replicas=1) as client:
            for count in (0, -1, 65, 10**6):
                with pytest.raises(InvalidRequest, match="at least 1 and at most 64"):
                    client.fleet.add(count)
            assert client.fleet.num_starting == 0

    run_virtually(main())


def test_one_that_dies_while_others_still_start_is_replaced():
    async def main():
        starter = Starter()

        async def start(replica_id):
            starter.start_s = 0.0 if replica_id == "r0" else 5.0
            replica = await starter(replica_id)
            if replica_id == "r0":
                asyncio.get_running_loop().call_later(1.0, replica.kill)
            return replica

        front = FrontOptions(num_replicas=2)
        client = ClusterClient(start, make_router("least-loaded"), empty_view(), front)
        await client.open()
        try:
            assert list(client.fleet.replicas) == ["r1"]
            await until(lambda: len(client.fleet.replicas) == 2)
            assert sorted(client.fleet.replicas) == ["r1", "r2"]
        finally:
            await client.close()

    run_virtually(main())


def test_one_that_is_being_ended_is_not_reopened():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=2) as client:
            going = starter.started[0]
            may_end = asyncio.Event()
            close = going.close

            async def close_slowly():
                await may_end.wait()
                await close()

            going.close = close_slowly
            removal = asyncio.create_task(client.fleet.remove("r0"))
            await asyncio.sleep(1)
            assert client.fleet.leaving == frozenset()
            client.fleet.reopen("r0")
            assert not client.view.replicas["r0"].accepts
            may_end.set()
            await removal
            assert list(client.fleet.replicas) == ["r1"]
            assert client.fleet.wanted == 1
            assert client.fleet._ending == client.fleet._leaving == set()

    run_virtually(main())


def test_a_removal_says_that_the_replica_was_kept():
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=2) as client:
            task = asyncio.create_task(collect(client, request()))
            await until(lambda: len(starter.started[0].running) == 1)
            starter.started[0].faults["freeze", "before"] = "error"
            removal = asyncio.create_task(client.fleet.remove("r0"))
            await asyncio.sleep(1)
            client.fleet.reopen("r0")
            with pytest.raises(InvalidRequest, match="'r0' was reopened while it drained"):
                await removal
            assert client.view.replicas["r0"].accepts
            starter.started[0].go.set()
            events = await task
            assert tokens_of(events) == answer_of(request())
            assert_one_end(events)

    run_virtually(main())


async def load_that_fails_on_r1(client, starter):
    starter.started[1].admin_error = StoreError("the disk is gone")
    with pytest.raises(Exception, match="replica r1: the disk is gone"):
        await client.administer(LoadAdapter("new", "/new"))


@pytest.mark.parametrize("has_come", [False, True])
def test_a_load_is_whole_when_those_that_failed_are_gone_or_replaced(has_come):
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            await load_that_fails_on_r1(client, starter)
            starter.start_s = 5.0
            starter.started[1].kill()
            await until(lambda: len(client.fleet.replicas) == (3 if has_come else 2))
            with pytest.raises(InvalidRequest, match=r"^new has already been loaded$"):
                await client.administer(LoadAdapter("new", "/new"))
            await until(lambda: len(client.fleet.replicas) == 3)
            assert all("new" in replica.adapters for replica in starter.alive())

    run_virtually(main())


def test_a_load_that_failed_is_sent_again_to_those_that_failed_and_to_nobody_who_came_since():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            await load_that_fails_on_r1(client, starter)
            starter.started[2].kill()
            await until(lambda: "r3" in client.fleet.replicas)
            starter.started[1].admin_error = None
            state = await client.administer(LoadAdapter("new", "/new"))
            assert state.state == "served"
            assert all("new" in replica.adapters for replica in starter.alive())

    run_virtually(main())


def test_one_that_is_to_be_killed_gets_no_more_requests_though_it_takes_a_while():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=2) as client:
            starter.started[0].kill, kill = lambda: None, starter.started[0].kill
            client.fleet.kill("r0")
            for i in range(3):
                assert_one_end(await collect(client, request(f"r{i}")))
            assert [replica.num_generated for replica in starter.started] == [0, 3]
            kill()

    run_virtually(main())


def test_a_load_that_failed_on_some_can_be_undone_on_all():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            await load_that_fails_on_r1(client, starter)
            starter.started[1].admin_error = None
            state = await client.administer(UnloadAdapter("new"))
            assert state.state == "unloaded"
            assert not any("new" in replica.adapters for replica in starter.alive())

    run_virtually(main())


def test_an_adapters_bytes_are_those_that_any_replica_knows():
    starter = Starter()

    async def main():
        async with cluster(starter, num_replicas=2) as client:
            starter.started[1].adapters["b"] = AdapterSummary(name="b", path="/b", num_bytes=77)
            sizes = AdapterBytes(client.adapters, client.fleet.replicas)
            assert sizes["b"] == 77
            assert sizes["a"] == sizes["nobody"] == UNKNOWN_ADAPTER_BYTES

    run_virtually(main())


def test_a_front_that_has_done_much_holds_no_more_than_one_that_has_not():
    async def main():
        starter = Starter()
        async with cluster(starter) as client:
            for turn in range(40):
                await collect(client, request(f"r{turn}"))
                await client.administer(LoadAdapter(f"n{turn}", "/n"))
                await client.administer(UnloadAdapter(f"n{turn}"))
                if turn % 10 == 5:
                    report = ResidencyReport(epoch=1, number=0, is_full=True, tiers={"a": "host"})
                    starter.alive()[0].on_report(report)
                    assert len(client._residency._lines) == 1
                    starter.alive()[0].kill()
                    await asyncio.sleep(1)
            await client.stats()
            ids = client.fleet.replicas.keys()
            assert client.view.replicas.keys() == client._last_stats.keys() == ids
            assert len(client._administration._turns) == 0
            assert (client._residency._lines, client.view.holders) == ({}, {})
            assert len(client.fleet._tasks) == 2 * len(ids)
            assert client.fleet.leaving == frozenset()

    run_virtually(main())
