"""An engine in this process as a target: same records as HTTP, and nothing left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_factory import save_swarm
from loraswarm.bench.metrics import summarize
from loraswarm.bench.offline import OfflineTarget, set_engine_environment
from loraswarm.bench.records import PlannedRequest, RequestRecord
from loraswarm.bench.runner import run
from loraswarm.engine.engine import Engine
from loraswarm.engine.engine_process import ENGINE_ENVIRONMENT
from loraswarm.errors import ConfigError

OPTIONS = {"pool_bytes": 8 << 20, "num_threads": 2, "host_cache_bytes": 64 << 20}


@pytest.fixture(scope="module")
def swarm(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 3, ranks=(4, 7))
    return path


@pytest.fixture(scope="module")
def target(swarm) -> Iterator[OfflineTarget]:
    target = make_target(swarm)
    yield target
    asyncio.run(target.close())


def make_target(swarm: Path, **options: object) -> OfflineTarget:
    return OfflineTarget(str(swarm / "model"), [str(swarm / "adapters")], **OPTIONS, **options)


def planned(*adapters: str | None, max_tokens: int = 7) -> list[PlannedRequest]:
    return [
        PlannedRequest(
            index=index,
            adapter=adapter,
            prompt_token_ids=tuple(range(3, 6 + index)),
            max_tokens=max_tokens,
        )
        for index, adapter in enumerate(adapters)
    ]


def drive(
    target: OfflineTarget, requests: list[PlannedRequest], concurrency: int = 3
) -> list[RequestRecord]:
    return asyncio.run(run(target, requests, concurrency=concurrency))


def test_every_token_is_timed(target):
    records = drive(target, planned("a000", "a001", None, "a002", "a000"))
    assert [record.error for record in records] == [None] * 5
    assert [record.adapter for record in records] == ["a000", "a001", None, "a002", "a000"]
    for record in records:
        assert record.num_output == len(record.response_s) == 7
        assert record.num_prompt == 3 + record.index
        assert record.cached_tokens == 0
        assert record.start_s < record.response_s[0]
        assert list(record.response_s) == sorted(record.response_s)
    summary = summarize(records)
    assert summary.total_output_tokens == 35
    assert summary.output_tokens_per_s > 0


def test_cached_prompts_are_told(target):
    request = PlannedRequest(
        index=0, adapter=None, prompt_token_ids=tuple(range(3, 103)), max_tokens=1
    )
    (first,) = drive(target, [request])
    (second,) = drive(target, [request])
    assert first.cached_tokens == 0
    assert second.cached_tokens
    assert second.num_prompt == 100


def test_the_target_says_what_it_is(target):
    assert target.name == "offline model"
    assert target.adapter_names() == ("a000", "a001", "a002")
    assert target.info.vocab_size == 133


def test_requests_that_cannot_be_served_become_errors_and_others_go_on(target):
    long, *others = planned("a000", "nobody", "a001")
    long = PlannedRequest(index=0, adapter=None, prompt_token_ids=(3,) * 400, max_tokens=7)
    records = drive(target, [long, *others])
    assert records[0].error is not None
    assert "prompt has 400 tokens" in records[0].error
    assert records[1].error is not None
    assert "'nobody'" in records[1].error
    assert records[2].error is None
    assert records[2].num_output == 7


def test_a_request_that_is_given_up_is_aborted(target):
    async def work() -> tuple[bool, list[RequestRecord]]:
        (long,) = planned(None, max_tokens=200)
        sending = asyncio.create_task(target.send(long, asyncio.get_running_loop().time))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        return sending.cancelled(), await run(target, planned("a000"), concurrency=1)

    was_cancelled, records = asyncio.run(work())
    assert was_cancelled
    assert records[0].error is None


def test_closing_ends_what_is_open_and_what_comes_later(swarm):
    num_threads = threading.active_count()
    target = make_target(swarm)

    async def work() -> list[RequestRecord]:
        (one,) = planned(None, max_tokens=240)
        clock = asyncio.get_running_loop().time
        sending = asyncio.create_task(target.send(one, clock))
        await asyncio.sleep(0)
        await target.close()
        await target.close()
        return [await sending, await target.send(one, clock)]

    records = asyncio.run(work())
    assert records[1].error == "the engine was closed"
    assert records[0].error in (None, "the engine was closed")
    assert threading.active_count() == num_threads


def test_an_engine_that_fails_ends_every_request(swarm, monkeypatch, capsys):
    target = make_target(swarm)

    def broken(self: Engine, may_wait: bool = True) -> list[object]:
        raise RuntimeError("out of luck")

    async def work() -> list[RequestRecord]:
        monkeypatch.setattr(Engine, "step", broken)
        records = await run(target, planned(None, "a000", None), concurrency=2)
        await target.close()
        return records

    records = asyncio.run(work())
    assert {record.error for record in records} == {
        "the engine failed: RuntimeError('out of luck')"
    }
    assert "out of luck" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"), [({"dtyp": "float32"}, "dtyp"), ({"dtype": "int3"}, "dtype is 'int3'")]
)
def test_options_that_cannot_work_are_refused(swarm, options, message):
    with pytest.raises(ConfigError, match=message):
        make_target(swarm, **options)


def test_a_model_that_cannot_be_loaded_is_refused_and_leaves_no_thread(tmp_path):
    before = set(threading.enumerate())
    with pytest.raises(ConfigError):
        OfflineTarget(str(tmp_path))  # an empty directory
    for thread in set(threading.enumerate()) - before:
        thread.join(30.0)
        assert not thread.is_alive()


def test_the_engines_environment_is_set_unless_the_user_has(monkeypatch, caplog):
    name, other = ENGINE_ENVIRONMENT
    monkeypatch.setenv(name, "77")
    monkeypatch.delenv(other, raising=False)
    with caplog.at_level(logging.WARNING):
        set_engine_environment()
    assert os.environ[name] == "77"
    assert os.environ[other] == ENGINE_ENVIRONMENT[other]
    assert f"does not see {other}" in caplog.text  # torch is loaded in this process
    monkeypatch.delenv(other)


def test_modules_of_the_benchmark_import_no_torch():
    modules = "offline, engine_thread, runner, http_target, metrics"
    code = (
        f"import sys; from loraswarm.bench import {modules}; "
        "offline.set_engine_environment(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
