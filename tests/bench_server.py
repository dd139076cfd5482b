"""A fake OpenAI endpoint that answers with given bytes at given times, and knows when it sent them.

HTTP/1.1 by hand, so that a test decides what is in one write and how a connection ends. Also a
program, for benchmarks/aiperf_agreement: `python tests/bench_server.py` serves answers with known
delays until its input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Body = dict[str, Any]
REASONS = {200: "OK", 307: "Temporary Redirect"}


@dataclass(frozen=True)
class Write:
    """So many seconds of waiting, then one write."""

    data: bytes
    delay_s: float = 0.0


@dataclass(frozen=True)
class Answer:
    """A response: its writes, and what is done after the last of them."""

    writes: Sequence[Write] = ()
    status: int = 200
    content_type: str = "text/event-stream"
    then: Literal["end", "cut", "reset", "hang"] = "end"


@dataclass
class Received:
    """A request as it came; `sent_s` are the loop's times just before each write."""

    method: str
    path: str
    headers: dict[str, str]
    body: Body
    arrived_s: float
    sent_s: list[float] = field(default_factory=list)


@dataclass
class BenchServer:
    """`answer` makes the response to a body of /v1/completions, the first being number 0."""

    answer: Callable[[Body, int], Answer]
    models: Answer = field(default_factory=lambda: json_answer({"object": "list", "data": []}))
    url: str = ""
    requests: list[Received] = field(default_factory=list)
    num_connections: int = 0
    num_open: int = 0
    max_open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The life of one connection."""
        self.num_connections += 1
        try:
            while (received := await _receive(reader)) is not None:
                if not await self._respond(received, writer):
                    return
        except ConnectionError:
            pass  # the client has given up
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _respond(self, received: Received, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        if received.method == "GET":
            return await _write(self.models, received, writer)
        number = len(self.requests)
        self.requests.append(received)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            return await _write(self.answer(received.body, number), received, writer)
        finally:
            self.num_open -= 1


@contextlib.asynccontextmanager
async def bench_server(
    answer: Callable[[Body, int], Answer], models: Answer | None = None
) -> AsyncIterator[BenchServer]:
    """Serve on a free port of 127.0.0.1, in this event loop, until the block ends."""
    state = BenchServer(answer)
    if models is not None:
        state.models = models
    tasks: set[asyncio.Task[Any]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await state.serve(reader, writer)
        tasks.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield state
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def event(payload: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def text_chunk(text: str, finish_reason: str | None = None) -> bytes:
    """The event of new text."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return event({"id": "cmpl-1", "object": "text_completion", "choices": [choice]})


def usage_chunk(num_prompt: int, num_output: int, num_cached: int | None = None) -> bytes:
    """The event that has counts only."""
    usage: Body = {"prompt_tokens": num_prompt, "completion_tokens": num_output}
    usage["total_tokens"] = num_prompt + num_output
    if num_cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": num_cached}
    return event({"id": "cmpl-1", "object": "text_completion", "choices": [], "usage": usage})


DONE = b"data: [DONE]\n\n"


def json_answer(body: object, status: int = 200) -> Answer:
    """A response that is no stream."""
    return Answer([Write(json.dumps(body).encode())], status, "application/json")


def stream_answer(delays_s: Sequence[float], num_prompt: int = 7) -> Answer:
    """One token after each delay, the counts, and the end."""
    last = len(delays_s) - 1
    writes = [
        Write(text_chunk(" word", "length" if index == last else None), delay_s)
        for index, delay_s in enumerate(delays_s)
    ]
    return Answer([*writes, Write(usage_chunk(num_prompt, len(delays_s)) + DONE)])


async def _receive(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    pairs = (line.partition(":") for line in lines if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    body = json.loads(content) if content else {}
    return Received(method, path, headers, body, asyncio.get_running_loop().time())


async def _write(answer: Answer, received: Received, writer: asyncio.StreamWriter) -> bool:
    """Send a response; returns whether the connection can be used again."""
    reason = REASONS.get(answer.status, "Error")
    head = f"HTTP/1.1 {answer.status} {reason}\r\nContent-Type: {answer.content_type}\r\n"
    writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
    for one in answer.writes:
        if one.delay_s:
            await asyncio.sleep(one.delay_s)
        received.sent_s.append(asyncio.get_running_loop().time())
        writer.write(b"%x\r\n%s\r\n" % (len(one.data), one.data))
        await writer.drain()
    if answer.then == "hang":
        await asyncio.Event().wait()
    if answer.then == "reset":
        writer.transport.abort()
    if answer.then == "end":
        writer.write(b"0\r\n\r\n")
        await writer.drain()
    return answer.then == "end"


class KnownAnswers:
    """The answers of the program: delays that a request's number alone decides.

    Requests without a limit, by which clients find out whether a server is there, have no number.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __call__(self, body: Body, _: int) -> Answer:
        num_output = body.get("max_completion_tokens") or body.get("max_tokens")
        if num_output is None:
            return stream_answer([0.0])
        rng = random.Random(next(self._numbers))
        first_s = rng.uniform(0.05, 0.25)
        between_s = rng.uniform(0.01, 0.03)
        return stream_answer([first_s] + [between_s] * (num_output - 1))


async def _main() -> None:
    model = {"id": "fake", "object": "model", "created": 0, "owned_by": "tests"}
    models = json_answer({"object": "list", "data": [model]})
    async with bench_server(KnownAnswers(), models) as server:
        print(server.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main())
