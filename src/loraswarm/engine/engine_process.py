"""An engine's process and the way to it: bytes there and back, and its end.

Knows what neither commands nor replies mean. Used by engine/child_client on one machine, and by
whoever carries the bytes further (cluster/ray_replicas).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from loraswarm.engine.messages import commands_address, replies_address

# What the engine's libraries read once, at their start; the user's own settings win.
# GOMP_SPINCOUNT: how long idle threads spin before they sleep. By default so long that a step takes
# many times longer as soon as another process, such as the server, uses a core.
# THP_MEM_ALLOC_ENABLE: torch asks for huge pages; weights and page pool are read with fewer misses.
ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}


class EngineTransport(Protocol):
    """The way to one engine process. Bytes arrive whole and in order, or not at all."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        ...

    def send(self, command: bytes) -> None:
        """Never waits; what is sent after its end is lost."""
        ...

    async def receive(self) -> bytes:
        """The next reply; of a process that has ended there may be some left."""
        ...

    async def wait(self) -> None:
        """Until the process has ended."""
        ...

    def kill(self) -> None:
        """End it at once; nothing happens if it has ended."""
        ...

    async def close(self) -> None:
        """Give back what the way to an ended process took. Safe to call twice."""
        ...


class EngineProcess:
    """A child process of this one, reached through two sockets in a directory of its own."""

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

    @classmethod
    async def start(cls) -> EngineProcess:
        """Start it; it waits for its first command."""
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
        return cls(directory, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def send(self, command: bytes) -> None:
        self._commands.send(command, zmq.NOBLOCK)

    async def receive(self) -> bytes:
        return await self._replies.recv()

    async def wait(self) -> None:
        await self._process.wait()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    def close_input(self) -> None:
        """What a parent's death does: the engine ends by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def close(self) -> None:
        self.close_input()
        if not self._context.closed:
            self._replies.close(linger=0)
            self._commands.close(linger=0)
            self._context.term()
            shutil.rmtree(self._directory, ignore_errors=True)
