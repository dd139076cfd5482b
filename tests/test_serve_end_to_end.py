"""`loraswarm serve` as a user runs it, over HTTP with the official openai client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import openai
import psutil
import pytest

from adapter_factory import save_random_adapter
from engine_factory import save_swarm
from loraswarm import LLM, SamplingParams
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from openai_contract import OpenAIContract
from served_process import ServedProcess, served
from server_harness import async_openai_client, openai_client

POOL_BYTES = 4 << 20
NUM_CROWDED = 100
CROWDED_POOL_BYTES = 300_000
LONG_POOL_BYTES = 64 << 20


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 16, has_tokenizer=True)
    (path / "adapters" / "a-file.txt").write_text("not an adapter")
    (path / "adapters" / "broken").mkdir()
    (path / "adapters" / "broken" / "adapter_config.json").write_text("{nonsense")
    return path


@pytest.fixture(scope="module")
def long_swarm(tmp_path_factory):
    """A base of so long a context that an answer need not end by itself while a test runs."""
    path = tmp_path_factory.mktemp("long")
    save_swarm(path, 2, has_tokenizer=True, max_position_embeddings=65_536)
    return path


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    path = tmp_path_factory.mktemp("crowd")
    save_swarm(path, 1, ranks=[8], has_tokenizer=True)
    shape = decoder_config(read_config(path / "model")).shape()
    for index in range(1, NUM_CROWDED):
        save_random_adapter(path / "adapters" / f"a{index:03}", shape, rank=8, seed=index, std=0.2)
    return path


def arguments(path, pool_bytes=POOL_BYTES):
    return (
        str(path / "model"),
        "--adapters",
        str(path / "adapters"),
        "--served-model-name",
        "tiny",
        "--pool-bytes",
        str(pool_bytes),
        "--num-threads",
        "2",
    )


@dataclass
class Servers:
    """`shared` is for tests that do not end it; each of the others is for one test."""

    shared: ServedProcess
    dying: ServedProcess
    terminated: ServedProcess
    interrupted: ServedProcess
    one_at_a_time: ServedProcess
    crowded: ServedProcess


@pytest.fixture(scope="module")
def servers(swarm, long_swarm, crowd):
    """All started at once: a start takes seconds, most of them to import torch."""
    plain = arguments(swarm)
    one_at_a_time = (*arguments(long_swarm, LONG_POOL_BYTES), "--max-num-sequences", "1")
    commands = [plain, plain, plain, plain, one_at_a_time, arguments(crowd, CROWDED_POOL_BYTES)]
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor() as starting:
            starts = [starting.submit(stack.enter_context, served(*each)) for each in commands]
        servers = [start.result() for start in starts]
        yield Servers(*servers)
        for server in servers:
            server.process.terminate()


@pytest.fixture(scope="module")
def server(servers):
    return servers.shared


class TestOpenAI(OpenAIContract):
    @pytest.fixture
    def base_url(self, server):
        return server.base_url

    @pytest.fixture
    def model(self):
        return "tiny"

    @pytest.fixture
    def adapter(self):
        return "a004"


def test_sixty_four_streams_over_sixteen_adapters_equal_each_alone(server):
    async def ask(client, i):
        stream = await client.completions.create(
            model=f"a{i % 16:03}",
            prompt=f"item number {i}",
            max_tokens=9,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main():
        async with async_openai_client(server.base_url) as client:
            together = await asyncio.gather(*(ask(client, i) for i in range(64)))
            alone = [await ask(client, i) for i in range(0, 64, 9)]
        return together, alone

    together, alone = asyncio.run(main())
    assert together[::9] == alone
    assert len(set(together)) > 30


def test_a_refused_adapter_and_an_unknown_one_say_why_and_the_next_request_works(server):
    with openai_client(server.base_url) as client:
        with pytest.raises(
            openai.UnprocessableEntityError, match=r"adapter_model\.safetensors is missing"
        ):
            client.completions.create(model="broken", prompt="x")
        with pytest.raises(openai.NotFoundError, match="a000, a001"):
            client.completions.create(model="a-file.txt", prompt="x")
        assert client.completions.create(model="a000", prompt="x", max_tokens=1).choices


def test_a_client_that_hangs_up_in_mid_stream_makes_room_at_once(servers):
    """One request runs at a time; those that were hung up on would each take 60,000 tokens."""
    server = servers.one_at_a_time
    body = {"prompt": "x", "max_tokens": 60_000, "ignore_eos": True, "stream": True}
    url = f"{server.base_url}/completions"
    for index in range(8):
        model = f"a{index % 2:03}"
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", url, json=body | {"model": model}) as response,
        ):
            next(response.iter_lines())
    with openai_client(server.base_url) as client:
        answer = client.completions.create(
            model="a001", prompt="x", max_tokens=20, extra_body={"ignore_eos": True}
        )
    assert answer.usage.completion_tokens == 20


def engine_pid(server):
    (child,) = psutil.Process(server.process.pid).children()
    return child.pid


def test_when_the_engine_dies_streams_end_with_an_error_and_the_server_exits_non_zero(servers):
    server = servers.dying
    body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    url = f"{server.base_url}/completions"
    with (
        httpx.Client(timeout=20) as client,
        client.stream("POST", url, json=body | {"stream": True, "n": 30}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        os.kill(engine_pid(server), signal.SIGKILL)
        rest = [line for line in lines if line]
    assert any('"error"' in line for line in rest)
    assert server.process.wait(10) == 1


def test_sigterm_to_the_whole_group_lets_running_requests_finish(servers):
    server = servers.terminated
    body = {"model": "a002", "prompt": "x", "max_tokens": 150, "ignore_eos": True}
    url = f"{server.base_url}/completions"
    engine = engine_pid(server)
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", url, json=body | {"stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        os.kill(engine, signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.process.wait(30) == 0


def test_ctrl_c_lets_running_requests_finish(servers):
    server = servers.interrupted
    body = {"model": "a002", "prompt": "x", "max_tokens": 150, "ignore_eos": True}
    engine = engine_pid(server)
    url = f"{server.base_url}/completions"
    with (
        httpx.Client(timeout=20) as client,
        client.stream("POST", url, json=body | {"stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
    assert server.process.wait(10) == 0
    assert not psutil.pid_exists(engine)


def test_a_hundred_adapters_through_a_pool_with_room_for_a_few(servers, crowd):
    """Answers are those of an engine with room for all."""
    names = [f"a{index:03}" for index in range(NUM_CROWDED)]

    async def main():
        async with async_openai_client(servers.crowded.base_url) as client:

            async def ask(name):
                answer = await client.completions.create(
                    model=name, prompt="item", max_tokens=5, temperature=0
                )
                return answer.choices[0].text

            first = await asyncio.gather(*(ask(name) for name in names))
            second = await asyncio.gather(*(ask(name) for name in reversed(names)))
        return first, second[::-1]

    first, second = asyncio.run(main())
    options = {"pool_bytes": POOL_BYTES, "num_threads": 2}
    with LLM(str(crowd / "model"), str(crowd / "adapters"), **options) as roomy:
        params = SamplingParams(max_tokens=5, temperature=0)
        outputs = roomy.generate(["item"] * NUM_CROWDED, params, adapter=names)
    assert first == second == [output.text for output in outputs]
    assert len(set(first)) > 50
