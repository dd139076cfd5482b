"""A real HTTP server on a free port of 127.0.0.1, in a thread of the test process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import httpx
import openai

from fake_engine import FakeEngine
from loraswarm.config import ServerConfig
from loraswarm.server.serve import bind, serve, url_of

T = TypeVar("T")
TIMEOUT_S = 30.0
REQUESTS_TIMEOUT_S = 600.0


class HastyAsyncio:
    """asyncio, where uvicorn's server looks up what it calls: its waits of a tenth of a second,
    after which it sees that it is to end, take a twentieth of that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(delay_s: float) -> None:
        await asyncio.sleep(delay_s / 20)


@dataclass
class RunningServer:
    """`url` has no path; `call` runs a coroutine in the server's event loop."""

    url: str
    http: httpx.Client
    engine: FakeEngine
    loop: asyncio.AbstractEventLoop
    exit_codes: list[int]

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def post(self, path: str, body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, **body: object) -> dict[str, Any]:
        response = self.post("/v1/completions", {"model": "tiny", "prompt": "hello", **body})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def chat(self, **body: object) -> dict[str, Any]:
        messages = [{"role": "user", "content": "hello"}]
        response = self.post(
            "/v1/chat/completions", {"model": "tiny", "messages": messages, **body}
        )
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def wait_until_idle(self) -> None:
        """Until the engine has no open request."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.engine.num_open:
                await asyncio.sleep(0.005)

    async def wait_until_open(self, count: int) -> None:
        """Until the engine has `count` open requests."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.engine.num_open != count:
                await asyncio.sleep(0.005)


@contextlib.contextmanager
def running_server(engine: FakeEngine, **options: Any) -> Iterator[RunningServer]:
    """Serve `engine` until the block ends."""
    config = ServerConfig(port=0, **options)
    listener = bind(config)
    ready = threading.Event()
    exit_codes: list[int] = []
    started: dict[str, Any] = {}

    async def run() -> None:
        started["loop"] = asyncio.get_running_loop()
        started["task"] = asyncio.current_task()
        code = await serve(engine, engine.tokenizer, config, listener, report=lambda _: ready.set())
        exit_codes.append(code)

    def main() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(run())

    url = url_of(listener)
    thread = threading.Thread(target=main)
    with mock.patch("uvicorn.server.asyncio", HastyAsyncio()):
        thread.start()
        try:
            assert ready.wait(TIMEOUT_S)
            with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
                yield RunningServer(url, http, engine, started["loop"], exit_codes)
        finally:
            if not exit_codes:
                with contextlib.suppress(RuntimeError):  # the loop may have ended by itself
                    started["loop"].call_soon_threadsafe(started["task"].cancel)
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


@contextlib.contextmanager
def openai_client(base_url: str, api_key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        yield client


def async_openai_client(base_url: str) -> openai.AsyncOpenAI:
    """Many requests at once may take longer to connect than the client's own five seconds."""
    return openai.AsyncOpenAI(
        base_url=base_url, api_key="none", max_retries=0, timeout=REQUESTS_TIMEOUT_S
    )
