"""What a cluster does by itself: its failures cost no request."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass
from typing import Literal

from cluster_factory import Starter, assert_one_end, cluster, collect, request, tokens_of, until
from fake_replica import answer_of
from loraswarm.cluster.controller import Controller, Duties
from loraswarm.cluster.scaling import Drain, Reopen, Start
from loraswarm.core.admin import PrefetchAdapter
from virtual_time import run_virtually


@dataclass(frozen=True)
class Move:
    request_id: str
    target: str
    how: Literal["kv", "prefill"]


@dataclass(frozen=True)
class Prefetch:
    replica_id: str
    adapter: str


def test_planned_moves_are_carried_out_by_their_means_and_others_do_not_matter():
    async def main():
        starter = Starter({"hold_at": 2})
        async with cluster(starter, num_replicas=2) as client:
            tasks = [asyncio.create_task(collect(client, request(name))) for name in "abcd"]
            await until(lambda: all(len(one.running) == 2 for one in starter.started))
            moves = [Move("a", "r1", "kv"), Move("c", "r1", "prefill"), Move("gone", "r1", "kv")]
            await Controller(client, Duties()).move(lambda view: lambda: moves)
            adopted = {one.request_id: one.kv is not None for one in starter.started[1].adopted}
            assert adopted == {"a": True, "c": False}
            for replica in starter.started:
                replica.go.set()
            for name, events in zip("abcd", await asyncio.gather(*tasks), strict=True):
                assert tokens_of(events) == answer_of(request(name))
                assert_one_end(events)

    asyncio.run(main())


def test_a_solver_does_not_hold_up_the_event_loop():
    async def main():
        solving, may_end = threading.Event(), threading.Event()

        def solve():
            solving.set()
            assert may_end.wait(60)
            return []

        starter = Starter()
        async with cluster(starter, num_replicas=2) as client:
            work = asyncio.create_task(
                Controller(client, Duties()).move(lambda view: solve),
            )
            await until(solving.is_set)
            events = await collect(client, request())
            assert tokens_of(events) == answer_of(request())
            assert not work.done()
            may_end.set()
            await work

    asyncio.run(main())


def test_a_duty_that_fails_is_logged_and_tried_again_and_requests_go_on(caplog):
    calls = []

    def plan(view):
        calls.append(view)
        raise ZeroDivisionError("a bug of the planner")

    async def main():
        async with cluster(Starter({"step_s": 1.0})) as client:
            controller = Controller(client, Duties(moves=plan, moves_every_s=2))
            controller.start()
            events = await collect(client, request())
            assert tokens_of(events) == answer_of(request())
            await controller.close()

    with caplog.at_level(logging.ERROR):
        run_virtually(main())
    assert len(calls) >= 5
    assert "duty=moves failed" in caplog.text
    assert "a bug of the planner" in caplog.text


def test_prefetches_go_to_their_replicas_and_those_that_fail_are_not_errors():
    async def main():
        starter = Starter()
        async with cluster(starter, num_replicas=2) as client:
            wanted = [Prefetch("r1", "a"), Prefetch("r0", "nobody"), Prefetch("r9", "a")]
            await Controller(client, Duties()).prefetch(lambda view: lambda: wanted)
            assert starter.started[1].commands == [PrefetchAdapter("a")]
            assert starter.started[0].commands == [PrefetchAdapter("nobody")]

    asyncio.run(main())


class Script:
    """Answers given actions, one a time."""

    def __init__(self, *actions):
        self.actions = list(actions)
        self.asked = []

    def decide(self, view, draining=(), num_starting=0):
        self.asked.append((sorted(draining), num_starting))
        return self.actions.pop(0) if self.actions else None


def test_replicas_are_started_drained_and_reopened_without_a_request_lost():
    async def main():
        starter = Starter({"step_s": 0.5}, start_s=3)
        async with cluster(starter, num_replicas=1) as client:
            scaler = Script(Start(2))
            controller = Controller(client, Duties(scaling=scaler, scaling_every_s=1))
            controller.start()
            await until(lambda: len(client.fleet.replicas) == 3)
            assert ([], 2) in scaler.asked
            tasks = [asyncio.create_task(collect(client, request(f"r{i}"))) for i in range(6)]
            await asyncio.sleep(0)
            for replica in starter.started[1:]:
                replica.faults["freeze", "before"] = "error"
            scaler.actions = [Drain("r1"), Reopen("r1"), Drain("r2")]
            await until(lambda: "r2" not in client.fleet.replicas)
            assert (["r1"], 0) in scaler.asked
            for i, events in enumerate(await asyncio.gather(*tasks)):
                assert tokens_of(events) == answer_of(request(f"r{i}"))
                assert_one_end(events)
            await asyncio.sleep(10)
            assert sorted(client.fleet.replicas) == ["r0", "r1"]
            assert client.view.replicas["r1"].accepts
            assert len(starter.started) == 3
            await controller.close()

    run_virtually(main())
