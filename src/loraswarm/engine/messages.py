"""What a server and its engine process say to each other, and its encoding (MessagePack)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec

from loraswarm.config import EngineConfig
from loraswarm.core.admin import AdapterState, AdminCommand, AdminResult, ScanReport
from loraswarm.core.client import AdapterSummary, EngineInfo, EngineStats
from loraswarm.core.events import ErrorInfo, SequenceEvent
from loraswarm.core.request import Request
from loraswarm.core.residency_report import ResidencyReport


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First command: build the engine."""

    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class AskStats(msgspec.Struct, frozen=True, tag="ask_stats"):
    """Answered by one StatsReply, in order."""


class AskAdapters(msgspec.Struct, frozen=True, tag="ask_adapters"):
    """Answered by one AdaptersReply, in order."""


class Administer(msgspec.Struct, frozen=True, tag="administer"):
    """A command of core/admin, by the name of its type; answered by one AnswerReply with its id."""

    command_id: int
    kind: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, command_id: int, command: AdminCommand) -> Administer:
        arguments = {f.name: getattr(command, f.name) for f in dataclasses.fields(command)}
        return cls(command_id, type(command).__name__, arguments)

    def command(self) -> AdminCommand:
        """What was asked for."""
        command: AdminCommand = ADMIN_COMMANDS[self.kind](**self.arguments)
        return command


class WatchResidency(msgspec.Struct, frozen=True, tag="watch_residency"):
    """Report adapters and prefixes from now on: a full `Reported`, then one after changes."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Abort what runs and exit."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A line about start-up."""

    line: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start or has stopped by an error; nothing follows."""

    error: ErrorInfo


class Events(msgspec.Struct, frozen=True, tag="events"):
    events: list[SequenceEvent]


class StatsReply(msgspec.Struct, frozen=True, tag="stats"):
    stats: EngineStats


class AdaptersReply(msgspec.Struct, frozen=True, tag="adapters"):
    states: tuple[AdapterState, ...]


class AnswerReply(msgspec.Struct, frozen=True, tag="answer"):
    """The end of a command: one of its result's kinds, or an error."""

    command_id: int
    state: AdapterState | None = None
    report: ScanReport | None = None
    error: ErrorInfo | None = None

    @classmethod
    def of(cls, command_id: int, result: AdminResult | ErrorInfo) -> AnswerReply:
        if isinstance(result, ErrorInfo):
            return cls(command_id, error=result)
        if isinstance(result, ScanReport):
            return cls(command_id, report=result)
        return cls(command_id, state=result)


class CatalogChange(msgspec.Struct, frozen=True, tag="catalog"):
    """Rows that are new or other than before, and names that are gone; at first, all rows."""

    changed: dict[str, AdapterSummary]
    removed: tuple[str, ...] = ()


class Reported(msgspec.Struct, frozen=True, tag="reported"):
    report: ResidencyReport


ADMIN_COMMANDS = {kind.__name__: kind for kind in get_args(AdminCommand)}
Command = Start | Submit | Abort | AskStats | AskAdapters | Administer | WatchResidency | Stop
Reply = (
    Progress
    | Ready
    | Failed
    | Events
    | StatsReply
    | AdaptersReply
    | AnswerReply
    | CatalogChange
    | Reported
)

encode = msgspec.msgpack.Encoder().encode
decode_command: Callable[[bytes], Command] = msgspec.msgpack.Decoder(Command).decode
decode_reply: Callable[[bytes], Reply] = msgspec.msgpack.Decoder(Reply).decode


def commands_address(directory: Path) -> str:
    """Where the child receives; the parent may send before it listens."""
    return f"ipc://{directory}/commands"


def replies_address(directory: Path) -> str:
    """Where the parent receives."""
    return f"ipc://{directory}/replies"
