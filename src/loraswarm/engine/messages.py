"""What a server and its engine process say to each other, and its encoding (MessagePack)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from loraswarm.config import EngineConfig
from loraswarm.core.client import EngineInfo, EngineStats
from loraswarm.core.events import ErrorInfo, SequenceEvent
from loraswarm.core.request import Request


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First command: build the engine."""

    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class AskStats(msgspec.Struct, frozen=True, tag="ask_stats"):
    """Answered by one StatsReply, in order."""


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


Command = Start | Submit | Abort | AskStats | Stop
Reply = Progress | Ready | Failed | Events | StatsReply

encode = msgspec.msgpack.Encoder().encode
decode_command: Callable[[bytes], Command] = msgspec.msgpack.Decoder(Command).decode
decode_reply: Callable[[bytes], Reply] = msgspec.msgpack.Decoder(Reply).decode


def commands_address(directory: Path) -> str:
    """Where the child receives; the parent may send before it listens."""
    return f"ipc://{directory}/commands"


def replies_address(directory: Path) -> str:
    """Where the parent receives."""
    return f"ipc://{directory}/replies"
