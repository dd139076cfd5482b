"""Migration between engine processes: streams go on, and whoever is left with a request is told."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from engine_factory import make_engine, make_request, prompt_of, run_tokens, save_swarm
from loraswarm.config import EngineConfig
from loraswarm.core.request import SamplingParams
from loraswarm.core.snapshot import SequenceSnapshot
from loraswarm.engine.child_client import ChildEngineClient
from loraswarm.engine.messages import Release
from loraswarm.errors import EngineError

LONG = SamplingParams(max_tokens=600, temperature=1.2, seed=4, ignore_eos=True)
REQUEST = make_request("x", "a000", prompt_of(1, 33), LONG)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 2, max_position_embeddings=1024)
    return path


@pytest.fixture(scope="module")
def answer(swarm):
    return run_tokens(make_engine(swarm), [REQUEST])["x"]


@pytest.fixture(scope="module")
def pair(swarm):
    """A loop and two processes, of which the last test kills the second."""
    config = EngineConfig(
        model=str(swarm / "model"),
        adapters=(str(swarm / "adapters"),),
        pool_bytes=8 << 20,
        num_threads=1,
    )

    async def start():
        return await asyncio.gather(*(ChildEngineClient.start(config) for _ in range(2)))

    with asyncio.Runner() as runner:
        clients = runner.run(start())
        yield runner, *clients
        for client in clients:
            runner.run(client.close())


async def some(stream, num_tokens: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens += (await anext(stream)).token_ids
    return tokens


async def is_idle(client) -> bool:
    """Asking makes an idle engine check its invariants."""
    stats = await client.stats()
    is_idle = stats.num_running + stats.num_waiting == 0
    assert not is_idle or (stats.num_kv_pages, stats.num_pinned_adapters) == (0, 0)
    return is_idle


def test_a_stream_that_goes_to_and_fro_has_every_token_once(pair, answer):
    runner, owner, other = pair

    async def main(owner, other):
        stream = owner.generate(REQUEST)
        tokens = await some(stream, 3)
        for with_kv in (True, False, True, True):
            snapshot = await owner.freeze("x", with_kv)
            assert (snapshot.kv is not None) == with_kv
            tokens += await some(stream, len(snapshot.output_token_ids) - len(tokens))
            assert tuple(tokens) == snapshot.output_token_ids
            adopted = other.adopt(snapshot)
            first = await anext(adopted)
            assert (first.token_ids, first.finish_reason) == ((), None)
            assert await owner.release("x")
            assert [event async for event in stream] == []
            assert await is_idle(owner)
            owner, other, stream = other, owner, adopted
            tokens += await some(stream, 20)
        async for event in stream:
            tokens += event.token_ids
        assert event.finish_reason == "length"
        assert await is_idle(owner)
        return tokens

    assert runner.run(main(owner, other)) == answer


def test_a_refused_adoption_is_one_event_and_the_source_goes_on(pair, answer):
    runner, source, target = pair

    async def main():
        stream = source.generate(REQUEST)
        tokens = await some(stream, 3)
        snapshot = await source.freeze("x", True)
        wrong = replace(snapshot, adapter_digests=("0",))
        (refusal,) = [event async for event in target.adopt(wrong)]
        assert (refusal.finish_reason, refusal.error.http_status) == ("error", 400)
        assert await source.thaw("x")
        assert not await source.thaw("x")
        assert not await source.release("x")
        async for event in stream:
            tokens += event.token_ids
        assert await source.freeze("x", True) is None
        assert await is_idle(target)
        return tokens

    assert runner.run(main()) == answer


def test_a_freeze_that_nobody_waits_for_is_undone(pair, answer):
    runner, source, _ = pair

    async def main():
        stream = source.generate(REQUEST)
        tokens = await some(stream, 3)
        freeze = asyncio.create_task(source.freeze("x", True))
        await asyncio.sleep(0)
        freeze.cancel()
        with pytest.raises(asyncio.CancelledError):
            await freeze
        async with asyncio.timeout(60):
            async for event in stream:
                tokens += event.token_ids
        return tokens

    assert runner.run(main()) == answer


def test_closing_an_adopted_or_a_frozen_stream_aborts_it(pair):
    runner, source, target = pair

    async def main():
        stream = source.generate(REQUEST)
        await some(stream, 3)
        adopted = target.adopt(await source.freeze("x", True))
        await some(adopted, 2)
        for closing in (adopted, stream):
            await closing.aclose()
        async with asyncio.timeout(60):
            while not (await is_idle(source) and await is_idle(target)):
                await asyncio.sleep(0.01)

    runner.run(main())


def test_a_request_of_a_process_that_dies_goes_on_from_what_was_sent(pair, answer):
    runner, survivor, killed = pair

    async def main():
        stream = killed.generate(REQUEST)
        tokens = await some(stream, 5)
        await killed.freeze("x", False)
        os.kill(killed.pid, signal.SIGKILL)
        release = killed._unfreeze(Release("x"))
        with pytest.raises(EngineError, match="ended"):
            await asyncio.wait_for(release, 60)
        async for event in stream:
            tokens += event.token_ids
        assert event.finish_reason == "error"
        with pytest.raises(EngineError, match="ended"):
            await killed.freeze("x", False)
        snapshot = SequenceSnapshot(request=REQUEST, output_token_ids=tuple(tokens))
        async for event in survivor.adopt(snapshot):
            tokens += event.token_ids
        assert await is_idle(survivor)
        return tokens

    assert runner.run(main()) == answer
