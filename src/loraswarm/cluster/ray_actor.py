"""What runs inside a Ray actor: an engine's process, and the bytes between it and the front.

Messages stay as they are, but for K and V: those of a snapshot are put into Ray's store here, by
the actor that has them, and fetched from there by the actor that adopts. Made by ray_replicas.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from typing import Any

from loraswarm.core.events import ErrorInfo, SequenceEvent
from loraswarm.core.snapshot import SequenceSnapshot
from loraswarm.engine.engine_process import EngineProcess
from loraswarm.engine.messages import Adopt, Events, Frozen, decode_command, decode_reply, encode
from loraswarm.errors import EngineError

MIN_STORED_BYTES = 64 << 10
LAST_REPLIES_S = 0.1


@dataclasses.dataclass(slots=True)
class Frames:
    """Replies since the last call; references of K and V that they have keys of; the process's end
    once nothing follows."""

    replies: list[bytes]
    kv: dict[bytes, Any]
    returncode: int | None = None


class EngineActor:
    """One engine process; all its methods are called by the front that made it."""

    def __init__(self) -> None:
        self._process: EngineProcess | None = None
        self._replies: asyncio.Queue[bytes] = asyncio.Queue()
        self._kv: dict[bytes, Any] = {}
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> int:
        """Start the process, which waits for its first command; its id on this machine."""
        self._process = process = await EngineProcess.start()
        self._tasks = [asyncio.create_task(work) for work in (self._read(), self._watch())]
        return process.pid

    async def send(self, commands: list[bytes], kv: list[dict[bytes, Any]]) -> None:
        """Hand commands to the engine, in order. `kv` is a dict, of references by key."""
        assert self._process is not None
        for command in commands:
            key = next((key for key in kv[0] if key in command), None)
            if key is not None:
                await self._adopt(command, kv[0][key])
            else:
                self._process.send(command)

    async def receive(self) -> Frames:
        """What has come since the last call; waits for the first."""
        assert self._process is not None
        while self._replies.empty() and self._process.returncode is None:
            self._news.clear()
            await self._news.wait()
        has_ended = self._process.returncode is not None
        if has_ended:
            await asyncio.sleep(LAST_REPLIES_S)  # what it sent last may still be on its way
        frames = Frames([], self._kv)
        self._kv = {}
        while not self._replies.empty():
            frames.replies.append(self._replies.get_nowait())
        if has_ended:
            frames.returncode = self._process.returncode
        return frames

    async def kill_engine(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()

    async def _read(self) -> None:
        assert self._process is not None
        while True:
            reply = await self._process.receive()
            self._replies.put_nowait(self._without_kv(reply))
            self._news.set()

    async def _watch(self) -> None:
        assert self._process is not None
        await self._process.wait()
        self._news.set()

    def _without_kv(self, reply: bytes) -> bytes:
        """A snapshot's pages stay in Ray's store on this machine; a key goes in their place."""
        if len(reply) < MIN_STORED_BYTES:
            return reply
        decoded = decode_reply(reply)
        snapshot = decoded.snapshot if isinstance(decoded, Frozen) else None
        if snapshot is None or snapshot.kv is None:
            return reply
        key = secrets.token_bytes(16)
        self._kv[key] = _ray().put(snapshot.kv.pages)
        return encode(Frozen(_with_pages(snapshot, (key,))))

    async def _adopt(self, command: bytes, pages: Any) -> None:
        """Put the pages that another actor has into the command."""
        assert self._process is not None
        decoded = decode_command(command)
        assert isinstance(decoded, Adopt), decoded
        try:
            found = await pages
        except Exception as error:  # the actor that had them is gone, or the store is full
            info = ErrorInfo.of(EngineError(f"K and V could not be fetched: {error}"))
            request_id = decoded.snapshot.request_id
            event = SequenceEvent(request_id=request_id, finish_reason="error", error=info)
            self._replies.put_nowait(encode(Events([event])))
            self._news.set()
            return
        self._process.send(encode(Adopt(_with_pages(decoded.snapshot, found))))


def _with_pages(snapshot: SequenceSnapshot, pages: tuple[bytes, ...]) -> SequenceSnapshot:
    assert snapshot.kv is not None
    kv = dataclasses.replace(snapshot.kv, pages=pages)
    return dataclasses.replace(snapshot, kv=kv)


def _ray() -> Any:
    """Loaded in every process that this runs in."""
    import ray

    return ray
