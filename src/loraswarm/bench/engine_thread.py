"""The thread that makes an engine and drives it, and the requests that are open in it.

Kernels keep their settings by thread, so no other thread touches the engine. Times are taken here,
as soon as a step has ended. Knows nothing about runs. Used by bench/offline.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraswarm.bench.records import Clock, PlannedRequest, RequestRecord
from loraswarm.bench.sse import one_line
from loraswarm.config import EngineConfig
from loraswarm.core.client import EngineInfo, served_names
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request
from loraswarm.engine.wakeup import Wakeup, wait_readable
from loraswarm.errors import LoRASwarmError

if TYPE_CHECKING:
    from loraswarm.engine.engine import Engine

Report = Callable[[str], None]


@dataclass(slots=True, kw_only=True, eq=False)
class OpenRequest:
    """A request that has not ended. Times are filled in by the engine's thread."""

    planned: PlannedRequest
    request: Request
    clock: Clock
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[RequestRecord]
    start_s: float
    response_s: list[float] = field(default_factory=list)
    num_output: int = 0
    cached_tokens: int | None = None

    def take(self, event: SequenceEvent, time_s: float) -> None:
        """Add an event's tokens, which came at `time_s`."""
        if event.token_ids:
            self.response_s.append(time_s)
            self.num_output += len(event.token_ids)
        if event.num_cached_tokens is not None:
            self.cached_tokens = event.num_cached_tokens

    def end(self, error: str | None) -> None:
        """Hand the record to whoever waits for it."""
        if error is None and not self.response_s:
            error = "the answer has no token"
        record = RequestRecord(
            index=self.planned.index,
            adapter=self.planned.adapter,
            num_prompt=len(self.planned.prompt_token_ids),
            max_tokens=self.planned.max_tokens,
            start_s=self.start_s,
            response_s=tuple(self.response_s),
            num_output=self.num_output,
            error=error,
            cached_tokens=self.cached_tokens,
        )
        with contextlib.suppress(RuntimeError):  # a loop that is closed has nobody waiting
            self.loop.call_soon_threadsafe(self._settle, record)

    def _settle(self, record: RequestRecord) -> None:
        if not self.done.done():
            self.done.set_result(record)


class EngineThread(threading.Thread):
    """The only thread that touches the engine: kernels keep their settings by thread."""

    def __init__(self, config: EngineConfig, report: Report) -> None:
        super().__init__(name="bench-engine", daemon=True)
        self._config = config
        self._report = report
        self._ready: queue.Queue[EngineInfo | BaseException] = queue.Queue()
        self._inbox: queue.SimpleQueue[tuple[str, OpenRequest | None]] = queue.SimpleQueue()
        self._wakeup = Wakeup()
        self._lock = threading.Lock()
        self._end: str | None = None
        self._open: dict[str, OpenRequest] = {}
        self.adapter_names: tuple[str, ...] = ()

    def wait_ready(self) -> EngineInfo:
        """Until the engine is there. Raises what its making raised."""
        outcome = self._ready.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def submit(self, entry: OpenRequest) -> None:
        """Queue a request; once the thread has ended, the request ends at once."""
        if not self._tell("add", entry):
            entry.end(self._end)

    def abort(self, entry: OpenRequest) -> None:
        """Give a request up; nobody waits for its record any more."""
        self._tell("abort", entry)

    def stop(self) -> None:
        """Ask the thread to end; safe to call twice."""
        self._tell("stop", None)

    def run(self) -> None:
        """Make the engine, drive it until told to stop, free it."""
        from loraswarm.engine.setup import build_engine

        engine: Engine | None = None
        end = "the engine was closed"
        try:
            engine = build_engine(self._config, self._report)
            summaries = {one.name: one for one in engine.adapters()}
            self.adapter_names = tuple(served_names(summaries))
            self._ready.put(engine.info)
            self._serve(engine)
        except Exception as error:
            end = one_line(f"the engine failed: {error!r}")
            if engine is not None:
                traceback.print_exc()
            self._ready.put(error)  # read by nobody once the engine was ready
        finally:
            if engine is not None:
                engine.close()
            self._finish(end)

    def _serve(self, engine: Engine) -> None:
        filenos = (*engine.filenos(), self._wakeup.fileno())
        while True:
            timeout_s = _idle_s(engine)
            if timeout_s != 0.0:
                wait_readable(filenos, timeout_s)
            self._wakeup.clear()
            while (message := self._next()) is not None:
                what, entry = message
                if entry is None:
                    return
                self._handle(engine, what, entry)
            self._deliver(engine.step(may_wait=False))

    def _next(self) -> tuple[str, OpenRequest | None] | None:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            return None

    def _handle(self, engine: Engine, what: str, entry: OpenRequest) -> None:
        if what == "abort":
            engine.abort(entry.request.request_id)
            self._open.pop(entry.request.request_id, None)
            return
        try:
            engine.add(entry.request)
        except LoRASwarmError as error:
            entry.end(one_line(str(error)))
        else:
            self._open[entry.request.request_id] = entry

    def _deliver(self, events: list[SequenceEvent]) -> None:
        for event in events:
            entry = self._open[event.request_id]
            entry.take(event, entry.clock())
            if event.finish_reason is None:
                continue
            del self._open[event.request_id]
            entry.end(one_line(event.error.message) if event.error is not None else None)

    def _tell(self, what: str, entry: OpenRequest | None) -> bool:
        """Whether the thread will read it."""
        with self._lock:
            if self._end is not None:
                return False
            self._inbox.put((what, entry))
            self._wakeup.wake()
            return True

    def _finish(self, end: str) -> None:
        """End what is open and what was queued, and refuse what comes."""
        with self._lock:
            self._end = end
            self._wakeup.close()
        while (message := self._next()) is not None:
            what, entry = message
            if entry is not None and what == "add":
                self._open[entry.request.request_id] = entry
        for entry in self._open.values():
            entry.end(end)
        self._open.clear()


def _idle_s(engine: Engine) -> float | None:
    """How long nothing is to be done unless a request or news come; None: for ever."""
    if engine.has_work and not engine.is_blocked:
        return 0.0
    due_s = engine.next_due_s()
    return None if due_s is None else max(0.0, due_s - time.monotonic())
