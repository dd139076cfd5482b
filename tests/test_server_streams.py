"""Open streams: clients that go, engines that die, failures on the way, many at once."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator

import openai
import pytest
from starlette.types import Message

import tiny_tokenizers
from fake_engine import FakeEngine
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request
from loraswarm.server.streaming import EventStream
from server_harness import (
    TIMEOUT_S,
    RunningServer,
    async_openai_client,
    openai_client,
    running_server,
)

TOKENIZER = tiny_tokenizers.byte_level()
LONG_PROMPT = "Hello there, how are you? " * 3


def open_connection(server: RunningServer, body: dict[str, object]) -> socket.socket:
    """Send a completion request and read nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
    content = json.dumps({"model": "tiny", "prompt": LONG_PROMPT, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def test_a_client_that_leaves_its_stream_aborts_the_request() -> None:
    with running_server(FakeEngine(TOKENIZER, hold_after=3)) as server:
        with openai_client(server.base_url) as client:
            stream = client.completions.create(
                model="tiny", prompt=LONG_PROMPT, max_tokens=9, stream=True
            )
            next(iter(stream))
            assert server.engine.num_open == 1
            stream.close()
        server.call(server.wait_until_idle())
        assert len(server.engine.aborted) == 1
        server.call(server.engine.release())
        server.complete()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 2])
def test_a_client_that_hangs_up_aborts_all_its_choices(
    n: int, stream: bool, hold_after: int
) -> None:
    with running_server(FakeEngine(TOKENIZER, hold_after=hold_after)) as server:
        connection = open_connection(server, {"n": n, "stream": stream})
        server.call(server.wait_until_open(n))
        connection.close()
        server.call(server.wait_until_idle())
        assert len(server.engine.aborted) == n


def test_other_streams_go_on_when_one_client_leaves() -> None:
    with running_server(FakeEngine(TOKENIZER, hold_after=2)) as server:
        leaving = open_connection(server, {"stream": True})
        with openai_client(server.base_url) as client:
            stream = client.completions.create(model="tiny", prompt=LONG_PROMPT, stream=True)
            text = next(iter(stream)).choices[0].text
            server.call(server.wait_until_open(2))
            leaving.close()
            server.call(server.wait_until_open(1))
            server.call(server.engine.release())
            text += "".join(chunk.choices[0].text for chunk in stream)
        assert len(server.engine.aborted) == 1
        assert text == server.complete(prompt=LONG_PROMPT)["choices"][0]["text"]


def test_a_failure_on_the_way_is_an_error_event_and_the_end() -> None:
    with running_server(FakeEngine(TOKENIZER, fail_after=3)) as server:
        body = {"model": "tiny", "prompt": LONG_PROMPT, "stream": True}
        for n in (1, 3):
            with server.http.stream("POST", "/v1/completions", json={**body, "n": n}) as response:
                assert response.status_code == 200
                lines = [line for line in response.iter_lines() if line]
            error = json.loads(lines[-1].removeprefix("data: "))["error"]
            assert error["message"] == "the fake engine failed this request"
            assert "text" in lines[0]
            assert not any("[DONE]" in line for line in lines)
            server.call(server.wait_until_idle())
        with (
            openai_client(server.base_url) as client,
            pytest.raises(openai.APIError, match="failed this request"),
        ):
            list(client.completions.create(model="tiny", prompt=LONG_PROMPT, stream=True))


def test_a_stream_closes_its_work_when_the_client_goes_while_nothing_can_be_sent() -> None:
    is_closed = False

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal is_closed
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            is_closed = True

    async def run() -> None:
        blocked = asyncio.Event()

        async def send(message: Message) -> None:
            if message.get("body") == b"data: {}\n\n":
                blocked.set()
                await asyncio.Event().wait()

        async def receive() -> Message:
            await blocked.wait()
            return {"type": "http.disconnect"}

        work = events()
        stream = EventStream(b"first", work)
        await stream({"type": "http"}, receive, send)
        assert is_closed

    asyncio.run(run())


class AbortingEngine(FakeEngine):
    """Ends every request as an engine does that is being closed."""

    async def generate(self, request: Request) -> AsyncIterator[SequenceEvent]:
        yield SequenceEvent(request_id=request.request_id, finish_reason="abort")


def test_an_abort_by_the_engine_is_an_error_to_the_client() -> None:
    with running_server(AbortingEngine(TOKENIZER)) as server:
        for stream in (False, True):
            response = server.post(
                "/v1/completions", {"model": "tiny", "prompt": "x", "stream": stream}
            )
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "send it again" in response.json()["error"]["message"]


def test_a_dead_engine_ends_streams_with_an_error_fails_health_and_stops_the_server() -> None:
    with running_server(FakeEngine(TOKENIZER, hold_after=2)) as server:
        assert server.http.get("/health").status_code == 200
        with openai_client(server.base_url) as client:
            stream = client.completions.create(model="tiny", prompt=LONG_PROMPT, stream=True)
            next(iter(stream))
            server.call(server.engine.die())
            with pytest.raises(openai.APIError, match="the fake engine is dead"):
                list(stream)
        for path in ("/health", "/v1/health/ready"):
            assert server.http.get(path).status_code == 503
        assert server.http.get("/v1/health/live").status_code == 200
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "x"}).status_code == 500
        deadline = time.monotonic() + TIMEOUT_S
        while not server.exit_codes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.exit_codes == [1]


def test_64_streams_run_at_the_same_time() -> None:
    with running_server(FakeEngine(TOKENIZER, hold_after=2)) as server:

        async def stream_one(client: openai.AsyncOpenAI, i: int) -> str:
            stream = await client.chat.completions.create(
                model="sql", messages=[{"role": "user", "content": f"item {i}"}], stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def run() -> list[str]:
            async with async_openai_client(server.base_url) as client:
                tasks = [asyncio.create_task(stream_one(client, i)) for i in range(64)]
                opened = asyncio.run_coroutine_threadsafe(server.wait_until_open(64), server.loop)
                await asyncio.wrap_future(opened)
                released = asyncio.run_coroutine_threadsafe(server.engine.release(), server.loop)
                await asyncio.wrap_future(released)
                return list(await asyncio.gather(*tasks))

        texts = asyncio.run(run())
        assert texts == [f"user:item {i}" for i in range(64)]
