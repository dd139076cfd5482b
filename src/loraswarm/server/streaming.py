"""Server-sent events, and the end of work whose client has gone.

Knows nothing about what is sent. Used by completions and chat.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from loraswarm.core.events import ErrorInfo
from loraswarm.errors import LoRASwarmError
from loraswarm.server.errors import error_body

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def as_event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; cancel it and wait for its end if the client goes first.

    Call only after the request's body was read.
    Raises   ClientDisconnect, or what `work` raises.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def open_stream(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
    """A streamed response, once the first event is there: what fails before has its own status."""
    first = await unless_disconnected(request.receive, _first(events))
    return EventStream(first, events)


class EventStream(Response):
    """Sends `first` and then each of `events`; an error on the way becomes the last event."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self._first = first
        self._events = events
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            try:
                await unless_disconnected(receive, self._send_all(send))
            except ClientDisconnect:
                return

    async def _send_all(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        await _send_body(send, self._first)
        try:
            async for event in self._events:
                await _send_body(send, event)
        except LoRASwarmError as error:
            await _send_body(send, b"data: " + error_body(ErrorInfo.of(error)) + b"\n\n")
        await _send_body(send, b"", is_last=True)


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _send_body(send: Send, body: bytes, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
