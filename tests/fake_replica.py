"""A replica without a model: its tokens are a function of request, seed and position alone.

It can be killed, hung, and made to fail before or after any command is carried out. Runs in the
event loop of its user; one token of each request per turn of `step_s`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from loraswarm.cluster.view import ReplicaLimits
from loraswarm.core.admin import AdapterState, AdminCommand, AdminResult, LoadAdapter, UnloadAdapter
from loraswarm.core.client import AdapterSummary, EngineInfo, EngineStats
from loraswarm.core.events import ErrorInfo, SequenceEvent, TokenLogprob
from loraswarm.core.request import Request
from loraswarm.core.residency_report import ResidencyReport
from loraswarm.core.snapshot import KVPages, SequenceSnapshot
from loraswarm.errors import EngineError, InvalidRequest, LoRASwarmError, UnknownAdapter

When = Literal["before", "after"]
Fault = Literal["error", "die", "hang", "bug"]
Refusal = Literal["at once", "late", "always"]
LIMITS = ReplicaLimits(
    num_seats=64, max_step_tokens=512, num_pages=1000, page_tokens=16, page_bytes=1024
)
POISON = "poison"


def token_of(request: Request, position: int) -> int:
    """What any engine draws there."""
    names = request.weighted_adapters
    text = f"{request.prompt_token_ids} {names} {request.params.seed} {position}"
    return zlib.crc32(text.encode()) % 1000


def answer_of(request: Request) -> list[int]:
    """All tokens of its answer; its seed must be set."""
    return [token_of(request, i) for i in range(request.params.max_tokens or 0)]


@dataclass(eq=False)
class Running:
    """A request on a replica; `gate` is clear while it is frozen."""

    request: Request
    num_tokens: int = 0
    events: asyncio.Queue[SequenceEvent | None] = field(default_factory=asyncio.Queue)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class FakeReplica:
    """`faults` are of ("freeze" | "thaw" | "release" | "adopt" | "administer", when), each once;
    `hold_at` is the number of tokens at which every request waits for `go`; `dies_of` positions
    of requests for the adapter POISON end it. Snapshots of other contents than it serves it refuses
    "at once" or "late", when it has read them; "always": all that come."""

    replica_id: str
    adapters: dict[str, AdapterSummary] = field(default_factory=dict)
    step_s: float = 0.0
    hold_at: int | None = None
    dies_at: int = 3
    faults: dict[tuple[str, When], Fault] = field(default_factory=dict)
    refusal: Refusal | None = None
    admin_error: LoRASwarmError | None = None
    stats_totals: int = 0
    running: dict[str, Running] = field(default_factory=dict)
    commands: list[AdminCommand] = field(default_factory=list)
    num_generated: int = 0
    num_watches: int = 0
    adopted: list[SequenceSnapshot] = field(default_factory=list)
    limits: ReplicaLimits = LIMITS

    def __post_init__(self) -> None:
        self.go = asyncio.Event()
        self._closed = asyncio.Event()
        self._awake = asyncio.Event()
        self._awake.set()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="tiny",
            model_path="/models/tiny",
            max_model_len=512,
            vocab_size=1000,
            end_token_ids=(),
            weight_bytes=4096,
            num_pages=LIMITS.num_pages,
            page_bytes=LIMITS.page_bytes,
            page_tokens=LIMITS.page_tokens,
        )

    @property
    def is_alive(self) -> bool:
        return not self._closed.is_set()

    @property
    def num_frozen(self) -> int:
        return sum(not one.gate.is_set() for one in self.running.values())

    def watch_residency(self, on_report: Callable[[ResidencyReport], None]) -> None:
        self.on_report = on_report
        self.num_watches += 1

    def hang(self) -> None:
        """Answer nothing any more."""
        self._awake.clear()

    def kill(self) -> None:
        """As kill -9."""
        self._end("error", EngineError("the fake engine has died"))

    async def generate(self, request: Request) -> AsyncGenerator[SequenceEvent, None]:
        if not self.is_alive:
            yield _error(request.request_id, EngineError("the fake engine has died"))
            return
        known = [name for name, _ in request.weighted_adapters if name not in self.adapters]
        if known and known[0] != POISON:
            yield _error(request.request_id, UnknownAdapter(known[0], self.adapters))
            return
        self.num_generated += 1
        async with aclosing(self._events(self._begin(Running(request)))) as events:
            async for event in events:
                yield event

    async def adopt(self, snapshot: SequenceSnapshot) -> AsyncGenerator[SequenceEvent, None]:
        await self._fault("adopt", "before")
        self._require_alive()
        if snapshot.request_id in self.running:
            raise InvalidRequest(f"request id {snapshot.request_id!r} is already in use")
        self.adopted.append(snapshot)
        if self._refuses(snapshot):
            error = InvalidRequest(f"{self.replica_id} does not go on with it")
            if self.refusal == "late":
                return _late(_error(snapshot.request_id, error))
            raise error
        one = Running(snapshot.request, len(snapshot.output_token_ids))
        stream = self._adopted(one)
        assert await anext(stream) is None
        try:
            await self._fault("adopt", "after")
        except BaseException:
            await stream.aclose()
            raise
        return stream

    async def freeze(self, request_id: str, with_kv: bool) -> SequenceSnapshot:
        await self._fault("freeze", "before")
        self._require_alive()
        if request_id not in self.running:
            raise InvalidRequest(f"request {request_id!r} is not open")
        one = self.running[request_id]
        one.gate.clear()
        await self._fault("freeze", "after")
        tokens = tuple(token_of(one.request, i) for i in range(one.num_tokens))
        kv = KVPages(layout="fake", num_tokens=1, pages=(b"k",)) if with_kv else None
        return SequenceSnapshot(request=one.request, output_token_ids=tokens, kv=kv)

    async def thaw(self, request_id: str) -> None:
        await self._fault("thaw", "before")
        self._require_alive()
        if request_id in self.running:
            self.running[request_id].gate.set()
        await self._fault("thaw", "after")

    async def release(self, request_id: str) -> None:
        await self._fault("release", "before")
        self._require_alive()
        if one := self.running.pop(request_id, None):
            assert not one.gate.is_set(), "only what is frozen is released"
            self._cancel(one)
            one.events.put_nowait(None)
        await self._fault("release", "after")

    async def stats(self) -> EngineStats:
        await self._awake.wait()
        self._require_alive()
        return EngineStats(
            num_waiting=0,
            num_running=len(self.running),
            num_free_pages=8,
            num_kv_pages=0,
            num_adapter_pages=0,
            num_pinned_adapters=0,
            num_resident_adapters=0,
            total_misses=self.stats_totals,
            running_adapters=(self.replica_id,),
        )

    async def adapter_states(self) -> tuple[AdapterState, ...]:
        self._require_alive()
        states = [AdapterState(name=name, path=one.path) for name, one in self.adapters.items()]
        return tuple(sorted(states, key=lambda state: state.name))

    async def administer(self, command: AdminCommand) -> AdminResult:
        await self._fault("administer", "before")
        self._require_alive()
        self.commands.append(command)
        if self.admin_error is not None:
            raise self.admin_error
        name = getattr(command, "name", "")
        if isinstance(command, LoadAdapter):
            if name in self.adapters and not command.in_place:
                raise InvalidRequest(f"{name} has already been loaded")
            self.adapters[name] = AdapterSummary(name=name, path=command.path, digest=command.path)
            return AdapterState(name=name, path=command.path)
        if name not in self.adapters:
            raise UnknownAdapter(name, self.adapters)
        path = self.adapters[name].path
        if isinstance(command, UnloadAdapter):
            del self.adapters[name]
            return AdapterState(name=name, path=path, state="unloaded")
        return AdapterState(name=name, path=path, is_pinned=True)

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def close(self) -> None:
        self._end("abort", None)

    def _refuses(self, snapshot: SequenceSnapshot) -> bool:
        names = [name for name, _ in snapshot.request.weighted_adapters]
        served = tuple(self.adapters[name].digest for name in names)
        is_other = snapshot.adapter_digests not in (None, served)
        return self.refusal == "always" or (self.refusal is not None and is_other)

    def _begin(self, one: Running) -> Running:
        request_id = one.request.request_id
        assert request_id not in self.running, f"{request_id} twice on {self.replica_id}"
        one.gate.set()
        self.running[request_id] = one
        one.task = asyncio.create_task(self._run(one))
        return one

    async def _adopted(self, one: Running) -> AsyncGenerator[SequenceEvent, None]:
        """None once it is there, then its events: closing it ends the request at any time."""
        events = self._events(self._begin(one))
        try:
            yield None  # type: ignore[misc]
            async for event in events:
                yield event
        finally:
            await events.aclose()
            self._abort(one)

    async def _events(self, one: Running) -> AsyncGenerator[SequenceEvent, None]:
        try:
            while (event := await one.events.get()) is not None:
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._abort(one)

    def _abort(self, one: Running) -> None:
        if self.running.get(one.request.request_id) is one:
            del self.running[one.request.request_id]
            self._cancel(one)

    async def _run(self, one: Running) -> None:
        request = one.request
        num_wanted = request.params.max_tokens or 0
        while True:
            await asyncio.sleep(self.step_s)
            if one.num_tokens == self.hold_at:
                await self.go.wait()
            await one.gate.wait()
            await self._awake.wait()
            if request.adapter == POISON and one.num_tokens >= self.dies_at:
                asyncio.get_running_loop().call_soon(self.kill)
                return
            event = _event(request, one.num_tokens, num_wanted)
            one.num_tokens += len(event.token_ids)
            if event.finish_reason is not None:
                self.running.pop(request.request_id, None)
            one.events.put_nowait(event)
            if event.finish_reason is not None:
                return

    def _end(self, reason: Literal["error", "abort"], error: LoRASwarmError | None) -> None:
        if not self.is_alive:
            return
        self._closed.set()
        self._awake.set()
        running, self.running = self.running, {}
        for one in running.values():
            self._cancel(one)
            info = ErrorInfo.of(error) if error else None
            one.events.put_nowait(
                SequenceEvent(request_id=one.request.request_id, finish_reason=reason, error=info)
            )

    async def _fault(self, command: str, when: When) -> None:
        await self._awake.wait()
        fault = self.faults.pop((command, when), None)
        if fault == "error":
            raise InvalidRequest(f"a fault {when} {command}")
        if fault == "bug":
            raise ValueError(f"a bug {when} {command}")
        if fault == "die":
            self.kill()
            raise EngineError("the fake engine has died")
        if fault == "hang":
            self.hang()
            await self._awake.wait()
            self._require_alive()

    def _require_alive(self) -> None:
        if not self.is_alive:
            raise EngineError("the fake engine has died")

    @staticmethod
    def _cancel(one: Running) -> None:
        if one.task is not None and one.task is not asyncio.current_task():
            one.task.cancel()


def _event(request: Request, position: int, num_wanted: int) -> SequenceEvent:
    params = request.params
    token_id = token_of(request, position)
    logprob = TokenLogprob(token_id, -float(position), 1, ())
    prompt = (None, *(TokenLogprob(i, -1.0, 1, ()) for i in request.prompt_token_ids[1:]))
    is_first = position == 0
    return SequenceEvent(
        request_id=request.request_id,
        token_ids=(token_id,),
        logprobs=(logprob,) if params.logprobs is not None else None,
        prompt_logprobs=prompt if is_first and params.prompt_logprobs is not None else None,
        finish_reason="length" if position + 1 >= num_wanted else None,
        num_cached_tokens=0 if is_first else None,
        queue_s=0.25 if is_first else None,
    )


async def _late(event: SequenceEvent) -> AsyncGenerator[SequenceEvent, None]:
    await asyncio.sleep(0.5)
    yield event


def _error(request_id: str, error: LoRASwarmError) -> SequenceEvent:
    return SequenceEvent(request_id=request_id, finish_reason="error", error=ErrorInfo.of(error))
