"""An engine in a process of its own: takes commands from one socket, sends events on another.

Run as `python -m loraswarm.engine.child DIRECTORY` by engine/child_client, which holds the other
ends. Exits when told to, or when the parent's end of standard input closes.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import zmq

from loraswarm.core.events import ErrorInfo, SequenceEvent
from loraswarm.engine.engine import Engine
from loraswarm.engine.messages import (
    Abort,
    AdaptersReply,
    Administer,
    Adopt,
    AnswerReply,
    AskAdapters,
    AskStats,
    CatalogChange,
    Command,
    Events,
    Failed,
    Freeze,
    Frozen,
    Move,
    Progress,
    Ready,
    Release,
    Reply,
    Reported,
    Start,
    StatsReply,
    Stop,
    Submit,
    Thaw,
    Unfrozen,
    WatchResidency,
    commands_address,
    decode_command,
    encode,
    replies_address,
)
from loraswarm.engine.setup import build_engine
from loraswarm.errors import EngineError, LoRASwarmError

log = logging.getLogger(__name__)


class ParentGone(Exception):
    """The process that started this engine has ended or asked it to stop."""


class ChildEngine:
    """Joins one engine to its sockets; `run` is the life of the process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._commands = context.socket(zmq.PULL)
        self._replies = context.socket(zmq.PUSH)
        self._replies.setsockopt(zmq.SNDHWM, 0)
        self._replies.setsockopt(zmq.LINGER, 1000)
        self._commands.setsockopt(zmq.RCVHWM, 0)
        self._commands.bind(commands_address(directory))
        self._replies.connect(replies_address(directory))
        self._poller = zmq.Poller()
        self._poller.register(self._commands, zmq.POLLIN)
        self._poller.register(sys.stdin.fileno(), zmq.POLLIN)

    def run(self) -> int:
        """Start, serve until told to stop; returns the exit code."""
        engine: Engine | None = None
        try:
            command = self._receive(None)
            assert isinstance(command, Start), command
            engine = build_engine(
                command.config, lambda line: self._send(Progress(line)), has_loader_process=True
            )
            self._send_catalog(engine)
            self._send(Ready(engine.info))
            gc.collect()
            gc.freeze()  # what start-up made stays; a collection need not look at it again
            self._serve(engine)
        except ParentGone:
            shutil.rmtree(self._directory, ignore_errors=True)  # the parent may have been killed
            return 0
        except LoRASwarmError as error:
            self._send(Failed(ErrorInfo.of(error)))
            return 1
        except Exception as error:
            traceback.print_exc()
            self._send(Failed(ErrorInfo.of(EngineError(f"engine failed: {error!r}"))))
            return 1
        finally:
            if engine is not None:
                engine.close()

    def _serve(self, engine: Engine) -> NoReturn:
        for number in engine.filenos():
            self._poller.register(number, zmq.POLLIN)
        while True:
            timeout_s = _idle_s(engine)
            if report := engine.reports.take(is_idle=timeout_s != 0.0):
                self._send(Reported(report))
            while command := self._receive(timeout_s):
                self._handle(engine, command)
                timeout_s = 0.0
            if events := engine.step(may_wait=False):
                self._send(Events(events))
            for answer in engine.take_answers():
                self._send_catalog(engine)
                self._send(AnswerReply.of(answer.command_id, answer.result))
            self._send_catalog(engine)

    def _handle(self, engine: Engine, command: Command) -> None:
        if isinstance(command, Submit):
            request = command.request
            if refusal := _refusal(request.request_id, lambda: engine.add(request)):
                self._send(Events([refusal]))
        elif isinstance(command, Abort):
            if ended := engine.abort(command.request_id):
                self._send(Events([ended]))
        elif isinstance(command, AskStats):
            if not engine.has_work:
                engine.check()  # too slow to do beside running requests
            self._send(StatsReply(engine.stats()))
        elif isinstance(command, AskAdapters):
            self._send(AdaptersReply(engine.adapter_states()))
        elif isinstance(command, Administer):
            engine.begin_command(command.command_id, command.command())
        elif isinstance(command, Move):
            self._move(engine, command)
        elif isinstance(command, WatchResidency):
            engine.reports.watch()
        elif isinstance(command, Stop):
            self._send(Events(engine.abort_all()))
            raise ParentGone
        else:
            raise AssertionError(f"unexpected command {command}")

    def _move(self, engine: Engine, command: Move) -> None:
        if isinstance(command, Freeze):
            snapshot, events = engine.freeze(command.request_id, command.with_kv)
            self._send(Events(events))
            self._send(Frozen(snapshot))
        elif isinstance(command, Thaw):
            was_frozen = engine.thaw(command.request_id)
            self._send(Unfrozen(command.request_id, was_frozen, is_gone=False))
        elif isinstance(command, Release):
            is_gone = engine.release(command.request_id)
            self._send(Unfrozen(command.request_id, is_gone, is_gone))
        elif isinstance(command, Adopt):
            snapshot = command.snapshot
            refusal = _refusal(snapshot.request_id, lambda: engine.adopt(snapshot))
            # An event of nothing says that it is queued.
            self._send(Events([refusal or SequenceEvent(request_id=snapshot.request_id)]))

    def _receive(self, timeout_s: float | None) -> Command | None:
        """The next command; None if none came in so many seconds, or there is news."""
        ready = dict(self._poller.poll(None if timeout_s is None else int(timeout_s * 1e3)))
        if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 1024):
            raise ParentGone
        if self._commands in ready:
            return decode_command(self._commands.recv())
        return None

    def _send_catalog(self, engine: Engine) -> None:
        changed, removed = engine.take_catalog_changes()
        if changed or removed:
            self._send(CatalogChange(changed, removed))

    def _send(self, reply: Reply) -> None:
        self._replies.send(encode(reply))


def _idle_s(engine: Engine) -> float | None:
    """How long nothing is to be done unless a command or news come; None: for ever."""
    if engine.has_work and not engine.is_blocked:
        return 0.0
    due_s = engine.next_due_s()
    return None if due_s is None else max(0.0, due_s - time.monotonic())


def _refusal(request_id: str, begin: Callable[[], None]) -> SequenceEvent | None:
    """Queue the request by `begin`; its terminal event if it is refused."""
    try:
        begin()
    except LoRASwarmError as error:
        return SequenceEvent(
            request_id=request_id, finish_reason="error", error=ErrorInfo.of(error)
        )
    return None


def main() -> None:
    """Entry point of the process."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when to stop
    sys.exit(ChildEngine(Path(sys.argv[1])).run())


if __name__ == "__main__":
    main()
