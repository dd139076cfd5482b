"""A running request changes its replica: same tokens, one owner, whatever fails on the way."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from cluster_factory import Starter, assert_one_end, cluster, collect, request, tokens_of, until
from fake_replica import answer_of
from loraswarm.cluster.moving import MoveFailed, Mover
from loraswarm.core.request import SamplingParams
from virtual_time import run_virtually

LONG = SamplingParams(max_tokens=64, temperature=1.0, seed=9, logprobs=0, prompt_logprobs=0)
HOPS = ("freeze", "adopt", "thaw", "release")


def owners(starter, request_id="x"):
    """Replicas that compute the request now."""
    return [
        replica.replica_id
        for replica in starter.started
        if request_id in replica.running and replica.running[request_id].gate.is_set()
    ]


async def moved_at(num_tokens, fault=None, hop_s=1.0):
    """Move a request that has so many tokens; its events, what the move raised, and the starter.

    `fault` is (hop, when, kind). A thaw happens only after another failure: then the adoption fails
    first.
    """
    starter = Starter({"hold_at": num_tokens})
    async with cluster(starter, num_replicas=2, hang_s=5) as client:
        client.mover = Mover(client.fleet, client.requests, hop_s)
        task = asyncio.create_task(collect(client, request(params=LONG)))
        await until(lambda: starter.started[0].num_generated == 1)
        await until(lambda: starter.started[0].running["x"].num_tokens == num_tokens)
        starter.started[1].hold_at = None
        if fault is not None:
            hop, when, kind = fault
            place = starter.started[1 if hop == "adopt" else 0]
            place.faults[hop, when] = kind
            if hop == "thaw":
                starter.started[1].faults["adopt", "before"] = "error"
        failure = None
        try:
            await client.mover.move("x", "r1", with_kv=True)
        except MoveFailed as error:
            failure = error
        assert len(owners(starter)) <= 1
        for replica in starter.started:
            replica.go.set()
        return await task, failure, starter


async def pauses_of_a_move(with_kv):
    """What is told of the pause of a move after three tokens."""
    starter, seen = Starter({"hold_at": 3}), []
    async with cluster(starter, num_replicas=2) as client:
        client.requests.on_pause = lambda pause, seconds: seen.append((pause, seconds))
        task = asyncio.create_task(collect(client, request(params=LONG)))
        await until(lambda: starter.started[0].num_generated == 1)
        await until(lambda: starter.started[0].running["x"].num_tokens == 3)
        starter.started[1].hold_at = None
        await client.mover.move("x", "r1", with_kv)
        for replica in starter.started:
            replica.go.set()
        await task
    return seen


def test_the_pause_of_a_move_is_told_once_with_what_it_took():
    (pause, seconds), *others = run_virtually(pauses_of_a_move(True))
    assert (pause.with_kv, pause.num_tokens) == (True, len(request().prompt_token_ids) + 3)
    assert seconds >= 0.0
    assert others == []
    ((pause, _),) = run_virtually(pauses_of_a_move(False))
    assert not pause.with_kv


def test_a_move_at_any_token_leaves_no_gap_and_repeats_nothing():
    for num_tokens in range(64):
        check_move_at(num_tokens)


def check_move_at(num_tokens):
    events, failure, starter = run_virtually(moved_at(num_tokens))
    assert failure is None
    assert tokens_of(events) == answer_of(request(params=LONG))
    assert_one_end(events)
    assert [one.logprob for event in events for one in event.logprobs] == [
        -float(i) for i in range(64)
    ]
    assert sum(event.prompt_logprobs is not None for event in events) == 1
    assert sum(event.queue_s is not None for event in events) == 1
    (snapshot,) = starter.started[1].adopted
    assert len(snapshot.output_token_ids) == num_tokens
    assert snapshot.kv is not None
    assert len(starter.started) == 2


FAULTS = list(itertools.product(HOPS, ("before", "after"), ("error", "die", "hang")))


@pytest.mark.parametrize("fault", FAULTS, ids="-".join)
def test_a_fault_at_any_hop_leaves_one_owner_and_the_same_tokens(fault):
    for num_tokens in (0, 1, 33, 63):
        check_fault_at(num_tokens, fault)


def check_fault_at(num_tokens, fault):
    hop, when, kind = fault
    events, failure, starter = run_virtually(moved_at(num_tokens, fault))
    assert tokens_of(events) == answer_of(request(params=LONG))
    assert_one_end(events)
    assert sum(event.prompt_logprobs is not None for event in events) == 1
    for replica in starter.started:
        assert (hop, when) not in replica.faults, "the fault was not met"
    assert (failure is None) == (hop == "release")
    if kind == "error" and hop in ("freeze", "adopt"):
        assert len(starter.started) == 2, "nothing had to be killed"


def test_a_client_that_goes_during_a_move_leaves_nothing_behind():
    async def main(hop):
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=2) as client:
            stream = client.generate(request(params=LONG))
            await anext(stream)
            await anext(stream)
            slow = starter.started[1 if hop == "adopt" else 0]
            slow.faults[hop, "before"] = "hang"
            move = asyncio.create_task(client.mover.move("x", "r1", with_kv=False))
            await asyncio.sleep(1)
            await stream.aclose()
            slow._awake.set()
            slow._closed.clear()
            await asyncio.wait((move,))
            await asyncio.sleep(1)
            assert owners(starter) == []

    for hop in ("freeze", "adopt", "release"):
        run_virtually(main(hop))


def test_a_source_that_dies_while_its_request_is_being_adopted_leaves_one_owner():
    """The client waits for the move's outcome, and does not run the request again beside it."""

    async def main():
        starter = Starter({"hold_at": 7})
        async with cluster(starter, num_replicas=3) as client:
            starter.started[1].hold_at = None
            task = asyncio.create_task(collect(client, request(params=LONG)))
            await until(lambda: starter.started[0].num_generated == 1)
            await until(lambda: starter.started[0].running["x"].num_tokens == 7)
            starter.started[1].hang()
            move = asyncio.create_task(client.mover.move("x", "r1", with_kv=True))
            await asyncio.sleep(1)
            starter.started[0].kill()
            await asyncio.sleep(1)
            assert "x" not in starter.started[2].running
            starter.started[1]._awake.set()
            await move
            events = await task
            assert tokens_of(events) == answer_of(request(params=LONG))
            assert_one_end(events)
            assert [len(replica.adopted) for replica in starter.started] == [0, 1, 0, 0]

    run_virtually(main())


def test_a_client_that_goes_after_a_move_it_has_not_read_of_ends_the_request_there():
    async def main():
        starter = Starter({"hold_at": 20})
        async with cluster(starter, num_replicas=2) as client:
            stream = client.generate(request(params=LONG))
            await anext(stream)
            await until(lambda: starter.started[0].running["x"].num_tokens == 20)
            await client.mover.move("x", "r1", with_kv=True)
            assert "x" in starter.started[1].running
            await stream.aclose()
            assert starter.started[1].running == {}

    run_virtually(main())


def test_a_client_that_reads_late_gets_the_sources_events_first():
    async def main():
        starter = Starter({"hold_at": 20})
        async with cluster(starter, num_replicas=2) as client:
            starter.started[1].hold_at = None
            stream = client.generate(request(params=LONG))
            events = [await anext(stream)]
            await until(lambda: starter.started[0].running["x"].num_tokens == 20)
            await client.mover.move("x", "r1", with_kv=True)
            assert starter.started[0].running == {}
            await asyncio.sleep(1)
            events += [event async for event in stream]
            assert tokens_of(events) == answer_of(request(params=LONG))
            assert_one_end(events)

    run_virtually(main())


def test_a_request_moves_on_and_back_and_the_view_follows():
    async def main():
        starter = Starter({"step_s": 0.1})
        async with cluster(starter, num_replicas=2) as client:
            task = asyncio.create_task(collect(client, request(params=LONG)))
            await asyncio.sleep(0.55)
            for turn in range(6):
                target = f"r{1 - turn % 2}"
                await client.mover.move("x", target, with_kv=turn % 3 == 0)
                assert owners(starter) == [target]
                (view,) = [view for view in client.view.replicas.values() if view.requests]
                assert view.replica_id == target
                assert view.requests["x"].prefill_tokens == 0
                await asyncio.sleep(0.35)
            events = await task
            assert tokens_of(events) == answer_of(request(params=LONG))
            assert_one_end(events)

    run_virtually(main())


def test_what_cannot_be_moved_is_refused_and_goes_on():
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=2) as client:
            task = asyncio.create_task(collect(client, request()))
            await until(lambda: len(starter.started[0].running) == 1)
            for request_id, target in (("x", "r0"), ("x", "r9"), ("y", "r1")):
                with pytest.raises(MoveFailed):
                    await client.mover.move(request_id, target, with_kv=True)
            first = asyncio.create_task(client.mover.move("x", "r1", with_kv=True))
            await asyncio.sleep(0)
            with pytest.raises(MoveFailed, match="is being moved"):
                await client.mover.move("x", "r1", with_kv=True)
            await first
            starter.started[1].go.set()
            assert tokens_of(await task) == answer_of(request())

    run_virtually(main())


def test_a_move_is_brought_to_its_end_though_its_caller_stops_waiting():
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=2) as client:
            starter.started[1].hold_at = None
            task = asyncio.create_task(collect(client, request()))
            await until(lambda: len(starter.started[0].running) == 1)
            await asyncio.sleep(1)
            starter.started[1].hang()
            move = asyncio.create_task(client.mover.move("x", "r1", with_kv=True))
            await asyncio.sleep(1)
            move.cancel()
            await asyncio.sleep(1)
            starter.started[1]._awake.set()
            assert tokens_of(await task) == answer_of(request())
            assert starter.started[1].adopted

    run_virtually(main())
