"""How server, LLM and bench talk to an engine, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from loraswarm.core.admin import AdapterState, AdminCommand, AdminResult
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSummary:
    """One adapter of the catalog, as listings show it.

    `refusal` says why it is not served. What has not been looked into yet has no method and digest;
    `generation` counts the contents that its name has had.
    """

    name: str
    path: str
    method: str = ""
    max_rank: int = 0
    num_bytes: int = 0
    digest: str = ""
    file_format: str = ""
    generation: int = 1
    refusal: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a started engine serves; fixed for its life."""

    model: str
    model_path: str
    max_model_len: int
    vocab_size: int
    end_token_ids: tuple[int, ...]
    weight_bytes: int
    num_pages: int
    page_bytes: int
    page_tokens: int
    host_cache_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTotals:
    """Loads of adapters by stage: how many, the seconds and bytes of all of them together."""

    count: int = 0
    seconds: float = 0.0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeState:
    """What is merged into the weights in use.

    `target` is the adapter that is to be, `share` the part of the bytes it changes that have it.
    `merged_bytes` are copies in use, `reserved_bytes` the memory that copies have.
    """

    target: str | None
    share: float
    num_merged_linears: int
    merged_bytes: int
    reserved_bytes: int
    total_switches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counts at one moment; used by health, tests and metrics.

    Names that begin with `total_` only grow. Pages are those of the pool by who holds them: K/V of
    running requests, prefixes kept for later ones, adapters, nobody. `total_device_hits`,
    `total_host_hits` and `total_misses` count requests by where their adapter was when they came.
    `loads` is by stage: "fetch" (from a remote store), "read" (from files), "pack" (into an image),
    "map" (an image of the host cache's directory), "copy" (to the device). `total_unkept_images`
    could not be written to the host cache's directory. `merging` is None where `--merge` is off.
    `num_frozen` of the waiting and running requests are held for a migration.
    """

    num_waiting: int
    num_running: int
    num_free_pages: int
    num_kv_pages: int
    num_frozen: int = 0
    num_prefix_pages: int = 0
    num_adapter_pages: int
    num_pinned_adapters: int
    num_resident_adapters: int
    num_host_adapters: int = 0
    num_host_bytes: int = 0
    num_loading: int = 0
    total_preemptions: int = 0
    total_device_hits: int = 0
    total_host_hits: int = 0
    total_misses: int = 0
    total_load_failures: int = 0
    total_unkept_images: int = 0
    total_device_evictions: int = 0
    total_host_evictions: int = 0
    total_prefix_evictions: int = 0
    total_prefix_hit_tokens: int = 0
    total_prefix_asked_tokens: int = 0
    loads: Mapping[str, TimeTotals] = field(default_factory=dict)
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    merging: MergeState | None = None


class EngineClient(Protocol):
    """One engine: in this process, in a child process or on another machine."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def is_alive(self) -> bool: ...

    @property
    def adapters(self) -> Mapping[str, AdapterSummary]:
        """The catalog by name, served and refused, kept current by the engine."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[SequenceEvent, None]:
        """Submit `request` and yield its events; the last one is terminal.

        Closing the generator before its end aborts the request. An engine that dies yields a
        terminal error event.
        """
        ...

    async def stats(self) -> EngineStats: ...

    async def adapter_states(self) -> tuple[AdapterState, ...]:
        """Every adapter of the catalog, sorted by name."""
        ...

    async def administer(self, command: AdminCommand) -> AdminResult:
        """Carry out a command; waits for its end.

        Raises   what the engine raises for it: UnknownAdapter, AdapterError, PathNotFound,
                 ForbiddenPath, StoreError, InvalidRequest; EngineError if it is gone.
        """
        ...

    async def wait_closed(self) -> None:
        """Return when the engine has died or was closed."""
        ...

    async def close(self) -> None:
        """Stop the engine; open requests get a terminal event. Safe to call twice."""
        ...


def served_names(adapters: Mapping[str, AdapterSummary]) -> list[str]:
    """Names of the adapters that can be asked for, sorted."""
    return sorted(name for name, adapter in adapters.items() if adapter.refusal is None)
