"""`loraswarm serve` as a user runs it, over HTTP with the official openai client."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import openai
import psutil
import pytest

from adapter_factory import save_random_adapter
from engine_factory import save_swarm
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from openai_contract import OpenAIContract
from served_process import served
from server_harness import async_openai_client, openai_client

POOL = str(4 << 20)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 16, has_tokenizer=True)
    (path / "adapters" / "a-file.txt").write_text("not an adapter")
    (path / "adapters" / "broken").mkdir()
    (path / "adapters" / "broken" / "adapter_config.json").write_text("{nonsense")
    return path


def arguments(path):
    return (
        str(path / "model"),
        "--adapters",
        str(path / "adapters"),
        "--served-model-name",
        "tiny",
        "--pool-bytes",
        POOL,
        "--num-threads",
        "2",
    )


@pytest.fixture(scope="module")
def server(swarm):
    with served(*arguments(swarm)) as running:
        yield running


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


def test_a_client_that_hangs_up_in_mid_stream_makes_room_at_once(tmp_path):
    """One request runs at a time; those that were hung up on would each take 60,000 tokens."""
    save_swarm(tmp_path, 2, has_tokenizer=True, max_position_embeddings=65_536)
    body = {"prompt": "x", "max_tokens": 60_000, "ignore_eos": True, "stream": True}
    with served(*arguments(tmp_path)[:-4], "--max-num-sequences", "1") as server:
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


def test_when_the_engine_dies_streams_end_with_an_error_and_the_server_exits_non_zero(swarm):
    with served(*arguments(swarm)) as server:
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


def test_sigterm_to_the_whole_group_lets_running_requests_finish(swarm):
    with served(*arguments(swarm)) as server:
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


def test_ctrl_c_lets_running_requests_finish(swarm):
    with served(*arguments(swarm)) as server:
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


def test_a_hundred_adapters_through_a_pool_with_room_for_a_few(tmp_path):
    save_swarm(tmp_path, 1, ranks=[8], has_tokenizer=True)
    shape = decoder_config(read_config(tmp_path / "model")).shape()
    for index in range(1, 100):
        save_random_adapter(
            tmp_path / "adapters" / f"a{index:03}", shape, rank=8, seed=index, std=0.2
        )

    async def main(url):
        async with async_openai_client(url) as client:

            async def ask(index):
                answer = await client.completions.create(
                    model=f"a{index:03}", prompt="item", max_tokens=5, temperature=0
                )
                return answer.choices[0].text

            first = await asyncio.gather(*(ask(i) for i in range(100)))
            second = await asyncio.gather(*(ask(i) for i in reversed(range(100))))
        return first, second[::-1]

    with served(*arguments(tmp_path)[:-4], "--pool-bytes", "300000") as server:
        first, second = asyncio.run(main(server.base_url))
    with served(*arguments(tmp_path)) as roomy:
        expected, _ = asyncio.run(main(roomy.base_url))
    assert first == second == expected
    assert len(set(first)) > 50
