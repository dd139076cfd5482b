"""Replicas by options of the command line and by admin calls."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from unittest import mock

import httpx
import pytest

from command_line import error_line, run_here
from engine_factory import save_swarm
from loraswarm.commands import serve_cluster
from loraswarm.config import ClusterConfig
from loraswarm.errors import ConfigError
from served_process import served


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 2, has_tokenizer=True, max_position_embeddings=1024)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_replicas": 0}, "replicas is 0"),
        ({"num_replicas": 2, "min_replicas": 3}, "min_replicas 3"),
        ({"num_replicas": 2, "max_replicas": 1}, "max_replicas 1"),
        ({"num_replicas": 2, "min_replicas": 0}, "min_replicas 0"),
        ({"backend": "threads"}, "must be one of ray, processes"),
        ({"backend": "processes", "ray_address": "auto"}, "need replica_backend to be ray"),
        ({"replica_cpus": 0}, "replica_cpus is 0"),
        ({"replica_gpus": -1.0}, "replica_gpus is -1.0"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_by_option(options, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray-address", "auto"], "--ray-address is given without --replicas"),
        (["--replicas", "2", "--router", "dice"], "routing policy is 'dice'"),
        (["--replicas", "2", "--replica-gpus", "1"], "--device is auto; make it cuda"),
        (["--replicas", "2", "--pool-bytes", "lots"], "--pool-bytes is 'lots'"),
    ],
)
def test_what_the_command_line_refuses_before_it_starts_anything(arguments, message, capfd):
    done = run_here(capfd, "serve", "/m", "--replica-backend", "ray", "--port", "0", *arguments)
    assert message in error_line(done)


def test_without_ray_the_extra_is_named(capfd):
    with mock.patch.dict(sys.modules, {"ray": None}):
        done = run_here(capfd, "serve", "/m", "--replicas", "2", "--port", "0")
    assert "pip install 'loraswarm[cluster]'" in error_line(done)


def complete(http, **body):
    answer = http.post(
        "/v1/completions",
        json={"model": "a000", "prompt": "hello", "max_tokens": 8, "temperature": 0, **body},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def serving(http):
    return {row["replica"] for row in http.get("/v1/replicas").json()["data"]}


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("not within a minute")


def test_a_server_over_processes_survives_one_and_takes_and_removes_replicas(swarm):
    arguments = ["--adapters", swarm / "adapters", "--replicas", "2", "--device", "cpu"]
    arguments += ["--replica-backend", "processes", "--pool-bytes", "8MiB"]
    with (
        served(str(swarm / "model"), *map(str, arguments), "--host-cache-bytes", "64MiB") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        before = complete(http)
        assert serving(http) == {"r0", "r1"}
        assert http.post("/v1/load_lora_adapter", json=load("copy")).status_code == 200
        engines = children(server.process.pid)
        assert len(engines) == 2
        os.kill(engines[0], signal.SIGKILL)
        assert complete(http) == before
        until(lambda: "r2" in serving(http) and len(serving(http)) == 2)
        assert complete(http, model="copy") == before
        gone = min(serving(http))
        answer = http.delete(f"/v1/replicas/{gone}")
        assert answer.status_code == 200, answer.text
        assert gone not in serving(http)
        assert complete(http) == before
        refused = http.delete(f"/v1/replicas/{gone}")
        assert refused.status_code == 400
        assert "no replica is named" in refused.json()["error"]["message"]
        last = http.delete(f"/v1/replicas/{min(serving(http))}")
        assert "last replica" in last.json()["error"]["message"]
        assert http.post("/v1/replicas", json={"count": 0}).status_code == 400
        assert http.post("/v1/replicas", json={}).json()["num_starting"] == 1
        assert "loraswarm_pool_pages" in http.get("/metrics").text
        assert server.interrupt() == 0


def load(name):
    return {"lora_name": name, "lora_path": "a000"}


def children(pid):
    """Engine processes that the server has started."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as stat, open(f"/proc/{entry}/cmdline") as command:
                parent = int(stat.read().rsplit(")", 1)[1].split()[1])
                is_engine = "loraswarm.engine.child" in command.read()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and is_engine:
            found.append(int(entry))
    return sorted(found)


def test_a_signal_while_replicas_start_ends_them_and_leaves_nothing():
    class Slow:
        def __init__(self):
            self.has_closed = False

        async def open(self):
            asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)

        async def close(self):
            self.has_closed = True

    slow = Slow()
    assert asyncio.run(serve_cluster._serve(slow, None, None)) == 128 + signal.SIGTERM
    assert slow.has_closed


def test_a_start_that_fails_is_raised_though_a_signal_would_have_ended_it():
    slow = mock.Mock(open=mock.AsyncMock(side_effect=ConfigError("no such model")))
    slow.close = mock.AsyncMock()
    with pytest.raises(ConfigError, match="no such model"):
        asyncio.run(serve_cluster._serve(slow, None, None))
    slow.close.assert_awaited_once()
