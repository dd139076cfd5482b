"""An engine in a process of its own: every request ends once, even if the process dies first."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from dataclasses import dataclass, field

import pytest

from engine_factory import make_engine, make_request, prompt_of, run_tokens, save_swarm
from loraswarm.config import EngineConfig
from loraswarm.core.admin import LoadAdapter, UnloadAdapter
from loraswarm.core.client import served_names
from loraswarm.core.request import SamplingParams
from loraswarm.core.residency_report import page_ids
from loraswarm.engine.child_client import ChildEngineClient
from loraswarm.errors import ConfigError, EngineError

LONG = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 3, max_position_embeddings=4096)
    return path


def config_of(path):
    return EngineConfig(
        model=str(path / "model"),
        adapters=(str(path / "adapters"),),
        pool_bytes=8 << 20,
        num_threads=1,
    )


@dataclass
class Started:
    """Clients and the loop that they live in; `lines` are what the shared one's start reported."""

    runner: asyncio.Runner
    lines: list[str] = field(default_factory=list)
    shared: ChildEngineClient | None = None
    killed: ChildEngineClient | None = None
    closed: ChildEngineClient | None = None
    orphan: ChildEngineClient | None = None
    without_model: BaseException | None = None


@pytest.fixture(scope="module")
def started(swarm, tmp_path_factory):
    """One process for tests that do not end it and one for each of the others, all started at once:
    a start takes seconds, most of them to import torch."""
    config = config_of(swarm)
    without_model = dataclasses.replace(config, model=str(tmp_path_factory.mktemp("empty")))
    with asyncio.Runner() as runner:
        started = Started(runner)

        async def start():
            reports = started.lines.append, print, print, print
            starts = [ChildEngineClient.start(config, report) for report in reports]
            starts.append(ChildEngineClient.start(without_model))
            return await asyncio.gather(*starts, return_exceptions=True)

        *clients, started.without_model = runner.run(start())
        assert all(isinstance(client, ChildEngineClient) for client in clients), clients
        started.shared, started.killed, started.closed, started.orphan = clients
        yield started
        for client in clients:
            runner.run(client.close())


async def collect(client, request):
    return [event async for event in client.generate(request)]


async def until_idle(client):
    """Stats once nothing runs; the engine acts on an abort between two steps."""
    for _ in range(200):
        stats = await client.stats()
        if stats.num_running + stats.num_waiting == 0:
            return stats
        await asyncio.sleep(0.02)
    raise AssertionError(f"still busy: {stats}")


def test_answers_equal_those_of_an_engine_in_this_process(swarm, started):
    requests = [
        make_request(f"r{i}", name, prompt_of(i, 11))
        for i, name in enumerate([None, "a000", "a002"])
    ]
    expected = run_tokens(make_engine(swarm), requests)
    client = started.shared

    async def main():
        assert served_names(client.adapters) == ["a000", "a001", "a002"]
        return await asyncio.gather(*(collect(client, request) for request in requests))

    for request, events in zip(requests, started.runner.run(main()), strict=True):
        tokens = [token for event in events for token in event.token_ids]
        assert tokens == expected[request.request_id]
        assert [event.finish_reason for event in events].count(None) == len(events) - 1
    assert any("loading" in line for line in started.lines)


def test_what_the_engine_holds_is_reported_from_when_it_is_asked_for(started):
    client = started.shared
    reports = []

    async def until(condition):
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.01)

    async def main():
        prompt = prompt_of(5, 200)
        await collect(client, make_request("x", "a001", prompt))
        assert reports == [], "nobody has asked"
        client.watch_residency(reports.append)
        await until(lambda: len(reports) == 1)
        await collect(client, make_request("y", "a002", prompt))
        await until(lambda: any("a002" in report.tiers for report in reports))
        told = len(reports)
        client.watch_residency(reports.append)
        await until(lambda: len(reports) > told and reports[-1].is_full)

    started.runner.run(main())
    first, *changes, last = reports
    assert first.is_full
    assert first.tiers["a001"] == "device"
    assert first.added_pages
    assert last.tiers == {"a002": "device"} | first.tiers
    assert not any(report.is_full for report in changes)
    joined = [report.added_pages for report in (first, *changes)]
    assert sorted(page_ids(b"".join(joined))) == sorted(page_ids(last.added_pages))
    assert [report.number for report in reports] == list(range(len(reports)))
    assert len({report.epoch for report in reports}) == 1


def test_an_unload_is_answered_when_its_last_request_ends_though_nothing_else_happens(started):
    client = started.shared

    async def main():
        for name in ("a000", "a002"):
            await client.administer(UnloadAdapter(name))
        params = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)
        stream = client.generate(make_request("x", "a001", prompt_of(1, 9), params))
        await anext(stream)
        assert (await client.stats()).num_adapter_pages > 0
        unload = asyncio.create_task(client.administer(UnloadAdapter("a001")))
        rest = [event async for event in stream]
        assert rest[-1].finish_reason == "length"
        state = await asyncio.wait_for(unload, 60)
        assert state.state == "unloaded"
        assert "a001" not in client.adapters
        assert (await client.stats()).num_adapter_pages == 0
        for name in ("a000", "a001", "a002"):
            await client.administer(LoadAdapter(name, name))

    started.runner.run(main())


def test_closing_a_stream_early_aborts_it_and_frees_its_pages(started):
    client = started.shared

    async def main():
        stream = client.generate(make_request("x", "a001", prompt_of(1, 9), LONG))
        await anext(stream)
        queue = client._queues["x"]
        await stream.aclose()
        client._queues["x"] = queue
        stats = await until_idle(client)
        del client._queues["x"]
        assert stats.num_kv_pages == 0
        assert stats.num_pinned_adapters == 0
        last = [queue.get_nowait() for _ in range(queue.qsize())][-1]
        assert last.finish_reason == "abort"

    started.runner.run(main())


def test_refusals_arrive_as_the_only_event_with_status_and_field(started):
    async def main():
        (unknown,) = await collect(started.shared, make_request("x", "nobody", prompt_of(0, 3)))
        (empty,) = await collect(started.shared, make_request("y", None, ()))
        return unknown.error, empty.error

    unknown, empty = started.runner.run(main())
    assert unknown.http_status == 404
    assert "a000, a001, a002" in unknown.message
    assert (empty.http_status, empty.param) == (400, "prompt")


def test_when_the_process_is_killed_every_open_request_gets_one_error_event(started):
    client = started.killed

    async def main():
        requests = [make_request(f"r{i}", "a000", prompt_of(i, 5), LONG) for i in range(3)]
        tasks = [asyncio.create_task(collect(client, request)) for request in requests]
        async with asyncio.timeout(60):
            while (await client.stats()).num_running < 3:
                await asyncio.sleep(0.01)
        os.kill(client.pid, signal.SIGKILL)
        found = await asyncio.wait_for(asyncio.gather(*tasks), 10)
        await asyncio.wait_for(client.wait_closed(), 10)
        assert not client.is_alive
        late = await collect(client, make_request("late", None, prompt_of(0, 3)))
        with pytest.raises(EngineError, match="ended"):
            await client.stats()
        await client.close()
        await client.close()
        return [*found, late]

    for events in started.runner.run(main()):
        assert [event.finish_reason for event in events if event.finish_reason] == ["error"]
        assert "engine process has ended" in events[-1].error.message
        assert events[-1].error.http_status == 500


def test_close_ends_open_requests_and_the_process(started):
    client = started.closed

    async def main():
        task = asyncio.create_task(collect(client, make_request("x", None, prompt_of(0, 5), LONG)))
        async with asyncio.timeout(60):
            while (await client.stats()).num_running < 1:
                await asyncio.sleep(0.01)
        await client.close()
        events = await asyncio.wait_for(task, 10)
        with pytest.raises(ProcessLookupError):
            os.kill(client.pid, 0)
        return events

    assert started.runner.run(main())[-1].finish_reason == "abort"


def test_a_model_that_cannot_be_loaded_is_a_config_error_here_too(started):
    assert isinstance(started.without_model, ConfigError)
    assert "config.json" in str(started.without_model)


def test_the_process_ends_when_its_parent_is_gone(started):
    client = started.orphan

    async def main():
        client._process.stdin.close()
        await asyncio.wait_for(client.wait_closed(), 10)
        assert not client.is_alive
        assert client._process.returncode == 0
        await client.close()

    started.runner.run(main())
