"""Engines on Ray: the relay of their bytes, and one small cluster that loses an engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from unittest import mock

import pytest

from cluster_factory import empty_view
from cluster_kills import (
    check_answers,
    check_nothing_is_left,
    engine_config,
    expected_tokens,
    kill_one,
    run_all,
    streams,
    until,
)
from engine_factory import save_swarm
from loraswarm.cluster import ray_actor
from loraswarm.cluster.front import ClusterClient, FrontOptions
from loraswarm.cluster.moving import MoveFailed
from loraswarm.cluster.ray_replicas import (
    KeptKV,
    RayOptions,
    RayProcess,
    _unless_late,
    ray_cluster,
    ray_starter,
)
from loraswarm.cluster.routing import make_router
from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.snapshot import KVPages, SequenceSnapshot
from loraswarm.engine.messages import Adopt, Events, Frozen, decode_command, decode_reply, encode
from loraswarm.errors import ConfigError
from virtual_time import run_virtually

SNAPSHOT = SequenceSnapshot(
    request=Request(request_id="x", prompt_token_ids=(1,), params=SamplingParams(seed=1)),
    output_token_ids=(4, 5),
    kv=KVPages(layout="l", num_tokens=2, pages=(bytes(50_000), bytes(range(256)) * 200)),
)


class FakeProcess:
    """An engine's process that keeps what it is sent."""

    pid = 7
    returncode = None

    def __init__(self):
        self.sent = []
        self.replies = asyncio.Queue()
        self.ended = asyncio.Event()

    def send(self, command):
        self.sent.append(command)

    async def receive(self):
        return await self.replies.get()

    async def wait(self):
        await self.ended.wait()

    def kill(self):
        self.returncode = -9
        self.ended.set()


class FakeRay:
    """Ray's store in this process: a reference is a task that ends with what was put."""

    def __init__(self):
        self.num_put = 0

    def put(self, value):
        self.num_put += 1

        async def get():
            return value

        return get()

    def kill(self, actor):
        actor.is_killed = True


class FakeHandle:
    """Calls of an actor in this process."""

    def __init__(self, actor):
        self.actor = actor
        self.is_killed = False

    def __getattr__(self, name):
        method = getattr(self.actor, name)
        return mock.Mock(remote=lambda *arguments: asyncio.ensure_future(method(*arguments)))


@contextlib.asynccontextmanager
async def relay(kept):
    """The two ends of one engine's bytes, and Ray's store between them."""
    process = FakeProcess()
    ray = FakeRay()

    async def start():
        return process

    with (
        mock.patch.object(ray_actor.EngineProcess, "start", start),
        mock.patch("loraswarm.cluster.ray_actor._ray", return_value=ray),
        mock.patch("loraswarm.cluster.ray_replicas._ray", return_value=ray),
    ):
        actor = ray_actor.EngineActor()
        end = RayProcess(FakeHandle(actor), kept)
        await end.start()
        yield end, process, ray
        await end.close()
        for task in actor._tasks:
            task.cancel()
        await asyncio.gather(*actor._tasks, return_exceptions=True)


def test_bytes_arrive_whole_and_in_order_in_both_directions():
    async def main():
        async with relay(KeptKV()) as (end, process, ray):
            commands = [bytes([i]) * (i + 1) for i in range(100)]
            for command in commands:
                end.send(command)
            for reply in commands:
                process.replies.put_nowait(reply)
            assert [await end.receive() for _ in commands] == commands
            while len(process.sent) < len(commands):
                await asyncio.sleep(0)
            assert process.sent == commands
            assert ray.num_put == 0

    asyncio.run(main())


def test_k_and_v_stay_in_the_store_until_the_actor_that_adopts_fetches_them():
    async def main():
        kept = KeptKV()
        async with relay(kept) as (source, sender, ray):
            sender.replies.put_nowait(encode(Frozen(SNAPSHOT)))
            frame = await source.receive()
            assert len(frame) < 1000
            assert ray.num_put == 1
            async with relay(kept) as (target, receiver, _):
                snapshot = decode_reply(frame).snapshot
                assert snapshot.output_token_ids == (4, 5)
                target.send(encode(Adopt(snapshot)))
                while not receiver.sent:
                    await asyncio.sleep(0)
                assert decode_command(receiver.sent[0]) == Adopt(SNAPSHOT)

    asyncio.run(main())


def test_k_and_v_that_cannot_be_fetched_end_the_adoption_with_an_error():
    async def main():
        kept = KeptKV()

        async def lost():
            raise OSError("the owner has died")

        async with relay(kept) as (source, sender, _):
            sender.replies.put_nowait(encode(Frozen(SNAPSHOT)))
            snapshot = decode_reply(await source.receive()).snapshot
            (key,) = kept._refs
            kept._refs[key].close()
            kept.keep({key: lost()})
            source.send(encode(Adopt(snapshot)))
            reply = decode_reply(await source.receive())
            assert isinstance(reply, Events)
            (event,) = reply.events
            assert event.finish_reason == "error"
            assert "could not be fetched" in event.error.message
            assert sender.sent == []

    asyncio.run(main())


def test_references_that_no_move_uses_leave_in_order():
    kept = KeptKV(max_kept=2)
    for name in (b"one", b"two", b"three"):
        kept.keep({name: name})
    assert kept.take(b"... one ... two ...") == {b"two": b"two"}
    assert kept.take(b"two three") == {b"three": b"three"}


def test_the_end_of_the_engine_and_of_the_actor_are_seen():
    async def main():
        async with relay(KeptKV()) as (end, process, _):
            process.replies.put_nowait(b"last words")
            end.kill()
            await end.wait()
            assert end.returncode == -9
            assert await end.receive() == b"last words"
        async with relay(KeptKV()) as (end, process, _):
            end._actor.actor.receive = mock.AsyncMock(side_effect=RuntimeError("actor died"))
            process.replies.put_nowait(b"x")
            await end.wait()
            assert end.returncode is not None

    asyncio.run(main())


def test_an_address_where_nobody_listens_is_refused_before_ray_tries_for_minutes():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            mock.patch("loraswarm.cluster.ray_replicas._ray") as ray,
            pytest.raises(ConfigError, match=f"{address} .--ray-address.: .*refused"),
            ray_cluster(RayOptions(address=address)),
        ):
            pass
        ray.return_value.init.assert_not_called()


@pytest.mark.parametrize(("num_found", "is_enough"), [(0, False), (1, False), (2, True)])
def test_a_cluster_of_our_own_without_the_devices_is_refused_and_shut_down(num_found, is_enough):
    ray = mock.Mock()
    ray.cluster_resources.return_value = {"GPU": num_found} if num_found else {}
    refusal = contextlib.nullcontext()
    if not is_enough:
        said = f"--replica-gpus is 1, so 2 replicas need 2 GPUs; Ray finds {num_found}"
        refusal = pytest.raises(ConfigError, match=said)
    with (
        mock.patch("loraswarm.cluster.ray_replicas._ray", return_value=ray),
        refusal,
        ray_cluster(RayOptions(num_gpus=1.0, max_replicas=2)),
    ):
        ray.shutdown.assert_not_called()
    ray.shutdown.assert_called_once()


@pytest.mark.parametrize(("address", "num_cpus"), [(None, 0), ("auto", 3)])
def test_on_a_machine_of_our_own_any_number_of_replicas_has_its_place(address, num_cpus):
    with mock.patch("loraswarm.cluster.ray_replicas._ray") as ray:
        ray_starter(None, RayOptions(address=address, num_cpus=3), print)
        assert ray.return_value.remote.call_args.kwargs["num_cpus"] == num_cpus


@pytest.mark.parametrize(("start_s", "num_reports"), [(14, 0), (16, 1), (900, 1)])
def test_a_replica_that_finds_no_place_for_long_is_reported_once(start_s, num_reports):
    reports = []

    async def main():
        await _unless_late(asyncio.sleep(start_s), lambda: reports.append(1))

    run_virtually(main())
    assert len(reports) == num_reports


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 3, max_position_embeddings=1024)
    return path


def test_a_cluster_on_ray_moves_requests_and_loses_none_when_an_engine_is_killed(swarm):
    requests = streams(6, 3, 96)
    params = SamplingParams(max_tokens=96, temperature=1.0, seed=1, ignore_eos=True)
    prompt = tuple(3 + i % 120 for i in range(300))  # its pages are too large for a message
    requests.append(
        Request(request_id="s6", prompt_token_ids=prompt, params=params, adapter="a001")
    )
    expected = expected_tokens(swarm, requests)
    config = engine_config(swarm)
    options = RayOptions(num_cpus=1, max_replicas=2)

    async def main():
        front = FrontOptions(num_replicas=2, seed=0)
        starter = ray_starter(config, options, lambda _: None)
        client = ClusterClient(starter, make_router("least-loaded"), empty_view(), front)
        await client.open()
        try:
            answers = await run_all(client, requests)
            await until(lambda: (one := client.requests.get("s6")) and one.token_ids)
            held = client.requests.get("s6")
            (target,) = client.fleet.replicas.keys() - {held.replica_id}
            with contextlib.suppress(MoveFailed):  # it has ended already
                await client.mover.move("s6", target, with_kv=True)
            victim = kill_one(client)
            check_answers(requests, await answers, expected)
            await until(lambda: victim not in client.fleet.replicas)
            await until(lambda: len(client.fleet.replicas) == 2)
            await check_nothing_is_left(client)
        finally:
            await client.close()

    before = set(Path("/tmp").glob("lsw-*"))
    with ray_cluster(options):
        (directory,) = set(Path("/tmp").glob("lsw-*")) - before
        asyncio.run(main())
    assert not os.path.exists(directory)
