"""What an operator can ask of a running engine about its adapters, and what it answers.

Plain data that crosses processes. Built by server/admin and LLM, carried out by the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tier = Literal["device", "host", "store"]
"""The nearest place where an adapter is: in pages, in host memory, or only where it was found."""


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Serve what is at `path` (within the configured stores) as `name`, and bring it to the host.

    A name that is served already is refused unless `in_place`: then it becomes a new generation.
    """

    name: str
    path: str
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Serve `name` no more; answered when its running requests have ended and its memory is free.

    One that a store still holds comes back when its files change or when it is loaded by name.
    """

    name: str


@dataclass(frozen=True, slots=True)
class PinAdapter:
    """Bring `name` to the device and keep it there until it is unpinned."""

    name: str


@dataclass(frozen=True, slots=True)
class UnpinAdapter:
    name: str


@dataclass(frozen=True, slots=True)
class PrefetchAdapter:
    """Bring `name` to the host, and to the device if that takes free pages only."""

    name: str


@dataclass(frozen=True, slots=True)
class RescanAdapters:
    """Look at every store now."""


AdminCommand = (
    LoadAdapter | UnloadAdapter | PinAdapter | UnpinAdapter | PrefetchAdapter | RescanAdapters
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """One adapter of the catalog at one moment.

    `num_bytes` is the size of its weights file, `host_bytes` and `device_bytes` what it takes there
    now (without matrices it shares). `state` is why it cannot be asked for, if it cannot: its files
    are still being written, it is refused, or it was unloaded; `reason` explains.
    """

    name: str
    path: str
    state: Literal["served", "pending", "refused", "unloaded"] = "served"
    reason: str | None = None
    generation: int = 1
    digest: str = ""
    method: str = ""
    max_rank: int = 0
    file_format: str = ""
    num_bytes: int = 0
    tier: Tier = "store"
    host_bytes: int = 0
    device_bytes: int = 0
    is_loading: bool = False
    is_pinned: bool = False
    num_running: int = 0
    num_waiting: int = 0
    num_requests: int = 0
    num_device_hits: int = 0
    num_host_hits: int = 0
    num_misses: int = 0
    last_error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanReport:
    """What a scan of the stores has changed; `failures` are stores that could not be listed (their
    adapters stay as they were)."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    elapsed_s: float = 0.0


AdminResult = AdapterState | ScanReport
