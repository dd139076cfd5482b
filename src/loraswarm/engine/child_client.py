"""The server's side of an engine that runs in a child process.

Starts the process, sends commands, hands each request its events, and notices when the process
dies: every open request then gets a terminal error event. Implements core.client.EngineClient.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import zmq
import zmq.asyncio

from loraswarm.config import EngineConfig
from loraswarm.core.admin import AdapterState, AdminCommand, AdminResult
from loraswarm.core.client import AdapterSummary, EngineInfo, EngineStats
from loraswarm.core.events import ErrorInfo, ReportedError, SequenceEvent
from loraswarm.core.request import Request
from loraswarm.core.residency_report import ResidencyReport
from loraswarm.engine.messages import (
    Abort,
    AdaptersReply,
    Administer,
    AnswerReply,
    AskAdapters,
    AskStats,
    CatalogChange,
    Command,
    Events,
    Failed,
    Progress,
    Ready,
    Reported,
    Start,
    StatsReply,
    Stop,
    Submit,
    WatchResidency,
    commands_address,
    decode_reply,
    encode,
    replies_address,
)
from loraswarm.errors import ConfigError, EngineError, LoRASwarmError

# What the engine's libraries read once, at their start; the user's own settings win.
# GOMP_SPINCOUNT: how long idle threads spin before they sleep. By default so long that a step takes
# many times longer as soon as another process, such as the server, uses a core.
# THP_MEM_ALLOC_ENABLE: torch asks for huge pages; weights and page pool are read with fewer misses.
ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}
STOP_TIMEOUT_S = 10.0
LAST_REPLIES_S = 0.1  # what the process sent last may still be in the socket
Report = Callable[[str], None]
log = logging.getLogger(__name__)


class ChildEngineClient:
    """One engine process; made by `start`, ended by `close` or by the process's death."""

    def __init__(self, directory: Path, process: asyncio.subprocess.Process) -> None:
        self._directory = directory
        self._process = process
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._commands.setsockopt(zmq.SNDHWM, 0)
        self._commands.setsockopt(zmq.LINGER, 0)
        self._commands.connect(commands_address(directory))
        self._replies = zmq.asyncio.Context(self._context).socket(zmq.PULL)
        self._replies.bind(replies_address(directory))
        self._info: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._queues: dict[str, asyncio.Queue[SequenceEvent]] = {}
        self._stats: list[asyncio.Future[EngineStats]] = []
        self._states: list[asyncio.Future[tuple[AdapterState, ...]]] = []
        self._commands_open: dict[int, asyncio.Future[AdminResult]] = {}
        self._command_ids = itertools.count()
        self._adapters: dict[str, AdapterSummary] = {}
        self._closed = asyncio.Event()
        self._failure: ErrorInfo | None = None
        self._report: Report = log.info
        self._on_residency: Callable[[ResidencyReport], None] = lambda report: None
        self._is_ready = False
        self._reader = asyncio.create_task(self._read())
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, config: EngineConfig, report: Report = log.info) -> ChildEngineClient:
        """Start the process and wait until it serves; `report` gets its start-up lines.

        Raises   ConfigError or EngineError if it could not start.
        """
        directory = Path(tempfile.mkdtemp(prefix="loraswarm-"))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "loraswarm.engine.child",
            str(directory),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=ENGINE_ENVIRONMENT | os.environ,
        )
        client = cls(directory, process)
        client._report = report
        client._send(Start(config))
        try:
            await client._info
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def info(self) -> EngineInfo:
        return self._info.result()

    @property
    def is_alive(self) -> bool:
        return not self._closed.is_set()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def adapters(self) -> Mapping[str, AdapterSummary]:
        """See `EngineClient`."""
        return MappingProxyType(self._adapters)

    async def generate(self, request: Request) -> AsyncGenerator[SequenceEvent, None]:
        """Submit and yield events until the terminal one; closing early aborts the request."""
        if request.request_id in self._queues:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        queue: asyncio.Queue[SequenceEvent] = asyncio.Queue()
        self._queues[request.request_id] = queue
        ended = False
        try:
            if self.is_alive:
                self._send(Submit(request))
            else:
                queue.put_nowait(self._death_event(request.request_id))
            while not ended:
                event = await queue.get()
                ended = event.finish_reason is not None
                yield event
        finally:
            del self._queues[request.request_id]
            if not ended and self.is_alive:
                self._send(Abort(request.request_id))

    async def stats(self) -> EngineStats:
        """Counts at the engine's next free moment. Raises EngineError if it is gone."""
        future: asyncio.Future[EngineStats] = self._future()
        self._stats.append(future)
        self._send(AskStats())
        return await future

    async def adapter_states(self) -> tuple[AdapterState, ...]:
        """See `EngineClient`. Raises EngineError if the engine is gone."""
        future: asyncio.Future[tuple[AdapterState, ...]] = self._future()
        self._states.append(future)
        self._send(AskAdapters())
        return await future

    async def administer(self, command: AdminCommand) -> AdminResult:
        """See `EngineClient`; goes on in the engine if the caller stops waiting."""
        future: asyncio.Future[AdminResult] = self._future()
        command_id = next(self._command_ids)
        self._commands_open[command_id] = future
        self._send(Administer.of(command_id, command))
        return await future

    def watch_residency(self, on_report: Callable[[ResidencyReport], None]) -> None:
        """Hand `on_report` what the engine holds, a full report first, until it ends; asked again,
        another full report. Raises EngineError if the engine is gone."""
        if not self.is_alive:
            raise EngineError(self._death().message)
        self._on_residency = on_report
        self._send(WatchResidency())

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def close(self) -> None:
        """Stop the process (killed if it does not end in time) and remove its sockets."""
        if self._process.returncode is None and not self._is_ready:
            self._process.kill()  # still loading: it would not read a command
        elif self._process.returncode is None:
            self._send(Stop())
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                log.warning("engine pid=%d did not stop; killing it", self._process.pid)
                self._process.kill()
        await self._closed.wait()
        self._reader.cancel()
        await asyncio.gather(self._reader, self._watcher, return_exceptions=True)
        if not self._context.closed:
            self._replies.close(linger=0)
            self._commands.close(linger=0)
            self._context.term()
            shutil.rmtree(self._directory, ignore_errors=True)

    def _future(self) -> asyncio.Future[Any]:
        if not self.is_alive:
            raise EngineError(self._death().message)
        return asyncio.get_running_loop().create_future()

    def _send(self, command: Command) -> None:
        self._commands.send(encode(command), zmq.NOBLOCK)

    async def _read(self) -> None:
        """Hand every reply to whom it concerns."""
        while True:
            reply = decode_reply(await self._replies.recv())
            if isinstance(reply, Events):
                for event in reply.events:
                    if queue := self._queues.get(event.request_id):
                        queue.put_nowait(event)
            elif isinstance(reply, StatsReply):
                _set(self._stats.pop(0), reply.stats)
            elif isinstance(reply, AdaptersReply):
                _set(self._states.pop(0), reply.states)
            elif isinstance(reply, AnswerReply):
                self._take_answer(reply)
            elif isinstance(reply, CatalogChange):
                for name in reply.removed:
                    self._adapters.pop(name, None)
                self._adapters.update(reply.changed)
            elif isinstance(reply, Reported):
                self._on_residency(reply.report)
            elif isinstance(reply, Progress):
                self._report(reply.line)
            elif isinstance(reply, Ready):
                if not self._info.done():
                    self._info.set_result(reply.info)
                self._is_ready = True
            elif isinstance(reply, Failed):
                self._failure = reply.error

    def _take_answer(self, reply: AnswerReply) -> None:
        future = self._commands_open.pop(reply.command_id)
        if reply.error is None:
            _set(future, reply.report or reply.state)
        elif not future.done():
            future.set_exception(ReportedError(reply.error))

    async def _watch(self) -> None:
        """When the process ends, or cannot be understood, end everything that waits for it."""
        ended = asyncio.create_task(self._process.wait())
        await asyncio.wait({ended, self._reader}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            log.error("engine pid=%d cannot be read: %r", self.pid, self._reader.exception())
            self._process.kill()
        await ended
        await asyncio.sleep(LAST_REPLIES_S)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._closed.set()
        if not self._info.done():
            self._info.set_exception(self._start_error())
        for request_id, queue in self._queues.items():
            queue.put_nowait(self._death_event(request_id))
        waiting: list[asyncio.Future[Any]] = [*self._stats, *self._states]
        for future in [*waiting, *self._commands_open.values()]:
            if not future.done():
                future.set_exception(EngineError(self._death().message))

    def _start_error(self) -> LoRASwarmError:
        failure = self._death()
        kind = ConfigError if failure.error_type == ConfigError.error_type else EngineError
        return kind(failure.message)

    def _death(self) -> ErrorInfo:
        if self._failure is not None:
            return self._failure
        return ErrorInfo(
            f"the engine process has ended (exit code {self._process.returncode})",
            EngineError.error_type,
            EngineError.http_status,
        )

    def _death_event(self, request_id: str) -> SequenceEvent:
        return SequenceEvent(request_id=request_id, finish_reason="error", error=self._death())


def _set(future: asyncio.Future[Any], result: object) -> None:
    """Whoever waited may have gone."""
    if not future.done():
        future.set_result(result)
