"""A replica that refuses to go on with what another has begun: the answer is not broken off."""

from __future__ import annotations

import asyncio
import logging

import pytest

from cluster_factory import Starter, assert_one_end, cluster, collect, request, tokens_of, until
from fake_replica import answer_of
from loraswarm.cluster.moving import MoveFailed, Mover
from loraswarm.core.events import ErrorInfo, SequenceEvent
from loraswarm.errors import InvalidRequest
from virtual_time import run_virtually


def serve_other_contents(replica, refusal, name="a"):
    replica.refusal = refusal
    old = replica.adapters[name]
    replica.adapters[name] = type(old)(name=name, path=old.path, digest="other")


def begun(client, starter, one, num_tokens=2):
    """A request that has so many tokens at the first replica; the others do not hold."""
    task = asyncio.create_task(collect(client, one))

    async def wait():
        await until(lambda: starter.started[0].num_generated == 1)
        await until(lambda: starter.started[0].running["x"].num_tokens == num_tokens)
        for replica in starter.started[1:]:
            replica.hold_at = None

    return task, wait()


@pytest.mark.parametrize("refusal", ["at once", "late"])
def test_on_one_machine_an_answer_whose_contents_nobody_has_ends_and_is_not_mixed(refusal):
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=3) as client:
            task, has_begun = begun(client, starter, request())
            await has_begun
            for replica in starter.started[1:]:
                serve_other_contents(replica, refusal)
            starter.start_s = 1000.0  # nobody comes in its place
            starter.started[0].kill()
            events = await task
            assert_one_end(events, "error")
            assert events[-1].error.http_status == 503
            assert "send it again" in events[-1].error.message
            assert tokens_of(events) == answer_of(request())[:2]

    run_virtually(main())


@pytest.mark.parametrize("refusal", ["at once", "late"])
def test_on_several_an_answer_goes_on_with_what_is_served_if_nobody_has_what_it_had(
    refusal, caplog
):
    async def main():
        starter = Starter({"hold_at": 2}, is_one_machine=False)
        async with cluster(starter, num_replicas=3) as client:
            task, has_begun = begun(client, starter, request())
            await has_begun
            for replica in starter.started[1:]:
                serve_other_contents(replica, refusal)
            starter.start_s = 1000.0  # nobody comes in its place
            starter.started[0].kill()
            events = await task
            assert tokens_of(events) == answer_of(request())
            assert_one_end(events)
            assert all(replica.is_alive for replica in starter.started[1:])
            return [one.adapter_digests for each in starter.started[1:] for one in each.adopted]

    with caplog.at_level(logging.WARNING):
        adopted = run_virtually(main())
    assert sorted(adopted, key=str) == [("d-a",), ("d-a",), None]
    assert "goes on with what its adapters are now" in caplog.text


def test_after_a_death_a_replica_with_the_same_contents_is_preferred(caplog):
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=3) as client:
            task, has_begun = begun(client, starter, request())
            await has_begun
            serve_other_contents(starter.started[1], "late")
            starter.start_s = 1000.0  # nobody comes in its place
            starter.started[0].kill()
            events = await task
            assert tokens_of(events) == answer_of(request())
            assert [len(replica.adopted) for replica in starter.started[:3]] == [0, 0, 1]

    run_virtually(main())
    assert "goes on with" not in caplog.text


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_move_that_is_refused_after_the_hand_over_is_made_good_elsewhere(num_tokens):
    async def main():
        starter = Starter({"hold_at": num_tokens})
        async with cluster(starter, num_replicas=3) as client:
            task, has_begun = begun(client, starter, request(), num_tokens)
            await has_begun
            starter.started[1].refusal = "late"
            starter.started[1]._refuses = lambda snapshot: True
            await client.mover.move("x", "r1", with_kv=True)
            await until(lambda: "x" in starter.started[2].running or starter.started[0].running)
            starter.started[0].go.set()
            events = await task
            assert tokens_of(events) == answer_of(request())
            assert_one_end(events)
            assert len(starter.started[1].adopted) == 1

    run_virtually(main())


def test_a_target_that_has_refused_is_not_tried_again():
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=2) as client:
            task, has_begun = begun(client, starter, request())
            await has_begun
            serve_other_contents(starter.started[1], "always")
            with pytest.raises(MoveFailed, match="stays where it is: r1 does not go on"):
                await client.mover.move("x", "r1", with_kv=True)
            with pytest.raises(MoveFailed, match="has refused"):
                await client.mover.move("x", "r1", with_kv=True)
            assert len(starter.started[1].adopted) == 1
            starter.started[0].go.set()
            assert tokens_of(await task) == answer_of(request())

    run_virtually(main())


def test_what_nobody_goes_on_with_ends_with_one_error():
    base = request(adapter=None)

    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=3) as client:
            task, has_begun = begun(client, starter, base)
            await has_begun
            starter.change = lambda replica: setattr(replica, "refusal", "always")
            for replica in starter.started[1:]:
                replica.refusal = "always"
            starter.start_s = 1000.0  # nobody comes in its place
            starter.started[0].kill()
            events = await task
            assert_one_end(events, "error")
            assert "does not go on with it" in events[-1].error.message
            assert tokens_of(events) == answer_of(base)[:2]

    run_virtually(main())


def test_a_live_replica_that_ends_a_stream_goes_on_serving():
    """Else a late answer to an aborted adoption would take a replica out for good."""

    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=2) as client:
            task, has_begun = begun(client, starter, request())
            await has_begun
            starter.started[0].hold_at = None
            one = starter.started[0].running["x"]
            one.events.put_nowait(SequenceEvent(request_id="x", finish_reason="abort"))
            events = await task
            assert tokens_of(events) == answer_of(request())
            assert all(view.accepts for view in client.view.replicas.values())
            assert len(starter.started) == 2

    run_virtually(main())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_bug_in_an_adoption_leaves_the_request_where_it_is(when):
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=2) as client:
            client.mover = Mover(client.fleet, client.requests, 1.0)
            task, has_begun = begun(client, starter, request())
            await has_begun
            starter.started[1].faults["adopt", when] = "bug"
            with pytest.raises(MoveFailed, match="a bug"):
                await client.mover.move("x", "r1", with_kv=True)
            assert starter.started[0].num_frozen == 0
            starter.started[0].go.set()
            assert tokens_of(await task) == answer_of(request())

    run_virtually(main())


def test_an_error_after_the_first_token_there_is_the_requests_own():
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=3) as client:
            task, has_begun = begun(client, starter, request())
            await has_begun
            starter.started[1].hold_at = 4
            await client.mover.move("x", "r1", with_kv=True)
            await until(lambda: starter.started[1].running["x"].num_tokens == 4)
            await asyncio.sleep(1)
            error = ErrorInfo.of(InvalidRequest("no more of this"))
            event = SequenceEvent(request_id="x", finish_reason="error", error=error)
            starter.started[1].running["x"].events.put_nowait(event)
            events = await task
            assert_one_end(events, "error")
            assert tokens_of(events) == answer_of(request())[:4]
            assert starter.started[2].adopted == []

    run_virtually(main())
