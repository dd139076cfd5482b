"""Starting and ending the server: the ready line, signals, draining, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest

import tiny_tokenizers
from fake_engine import FakeEngine
from loraswarm.config import ServerConfig
from loraswarm.errors import ConfigError
from loraswarm.server.serve import bind, serve, url_of
from server_harness import TIMEOUT_S

TOKENIZER = tiny_tokenizers.byte_level()
BODY = {"model": "tiny", "prompt": "Hello there", "max_tokens": 50}


@dataclass
class Scene:
    """A server in this thread's event loop, so that it takes the process's signals."""

    http: httpx.AsyncClient
    engine: FakeEngine
    serving: asyncio.Task[int]

    async def start_request(self, stream: bool = False) -> asyncio.Task[httpx.Response]:
        """A request that waits in the engine."""
        num_open = self.engine.num_open
        task = asyncio.create_task(
            self.http.post("/v1/completions", json={**BODY, "stream": stream})
        )
        while self.engine.num_open == num_open:
            await asyncio.sleep(0.005)
        return task


async def connect_until_refused(http: httpx.AsyncClient) -> None:
    while True:
        try:
            await http.get("/v1/health/live", headers={"Connection": "close"})
        except (httpx.ReadError, httpx.RemoteProtocolError):
            continue  # accepted by the kernel while the server was closing


def play(
    scenario: Callable[[Scene], Awaitable[None]], engine: FakeEngine, drain_timeout_s: float = 30
) -> int:
    """Run `scenario` against a server; the server's exit code."""

    async def run() -> int:
        config = ServerConfig(port=0, drain_timeout_s=drain_timeout_s)
        listener = bind(config)
        ready = asyncio.Event()
        serving = asyncio.create_task(
            serve(engine, TOKENIZER, config, listener, lambda _: ready.set())
        )
        async with asyncio.timeout(TIMEOUT_S):
            await ready.wait()
            async with httpx.AsyncClient(base_url=url_of(listener), timeout=TIMEOUT_S) as http:
                await scenario(Scene(http, engine, serving))
                return await serving

    return asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_server_and_closes_the_engine(number: int) -> None:
    engine = FakeEngine(TOKENIZER)

    async def scenario(scene: Scene) -> None:
        assert (await scene.http.get("/health")).status_code == 200
        os.kill(os.getpid(), number)

    assert play(scenario, engine) == 0
    assert not engine.is_alive


def test_a_signal_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    engine = FakeEngine(TOKENIZER, hold_after=1)

    async def scenario(scene: Scene) -> None:
        running = await scene.start_request()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            await connect_until_refused(scene.http)
        assert engine.is_alive
        await engine.release()
        response = await running
        assert response.status_code == 200
        assert response.json()["choices"][0]["text"] == "Hello there"

    assert play(scenario, engine) == 0
    assert engine.aborted == []


def test_what_is_not_finished_in_time_ends_with_an_error() -> None:
    engine = FakeEngine(TOKENIZER, hold_after=1)

    async def scenario(scene: Scene) -> None:
        streamed = await scene.start_request(stream=True)
        whole = await scene.start_request()
        os.kill(os.getpid(), signal.SIGTERM)
        assert "the fake engine is dead" in (await streamed).text
        assert (await whole).status_code == 500

    assert play(scenario, engine, drain_timeout_s=0.2) == 0


def test_a_second_signal_cuts_requests_off() -> None:
    engine = FakeEngine(TOKENIZER, hold_after=1)

    async def scenario(scene: Scene) -> None:
        running = await scene.start_request()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.3)
        assert not scene.serving.done()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(httpx.HTTPError):
            await running

    assert play(scenario, engine) == 1
    assert engine.num_open == 0
    assert not engine.is_alive


def test_a_dead_engine_ends_the_server_with_a_failure() -> None:
    engine = FakeEngine(TOKENIZER)

    async def scenario(_: Scene) -> None:
        await engine.die()

    assert play(scenario, engine) == 1


def test_an_address_in_use_is_a_config_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: .*--port"):
            bind(ServerConfig(port=port))


def test_a_host_that_does_not_exist_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind(ServerConfig(host="203.0.113.7", port=0))


SCRIPT = """
import asyncio, tiny_tokenizers
from fake_engine import FakeEngine
from loraswarm.config import ServerConfig
from loraswarm.server.serve import bind, serve

async def main():
    config = ServerConfig(port=0)
    engine = FakeEngine(tiny_tokenizers.byte_level(), hold_after=2)
    return await serve(engine, engine.tokenizer, config, bind(config))

raise SystemExit(asyncio.run(main()))
"""


@contextlib.contextmanager
def start_process() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_a_process_prints_one_ready_line_and_ends_without_a_traceback() -> None:
    with start_process() as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.match(r"ready url=(http://127\.0\.0\.1:\d+) model=tiny adapters=2 ", line)
        assert match is not None
        with httpx.stream("POST", match[1] + "/v1/completions", json={**BODY, "stream": True}) as r:
            next(r.iter_lines())
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, output, errors) == (1, "", "")
