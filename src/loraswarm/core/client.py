"""How server, LLM and bench talk to an engine, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSummary:
    """One adapter of the catalog, as listings show it. `refusal` is set when it is not served."""

    name: str
    path: str
    method: str = ""
    max_rank: int = 0
    num_bytes: int = 0
    digest: str = ""
    file_format: str = ""
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
    adapters: tuple[AdapterSummary, ...] = ()

    def served_adapters(self) -> list[str]:
        """Names of the adapters that can be asked for."""
        return [adapter.name for adapter in self.adapters if adapter.refusal is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counts at one moment; used by health, tests and metrics."""

    num_waiting: int
    num_running: int
    num_free_pages: int
    num_kv_pages: int
    num_adapter_pages: int
    num_pinned_adapters: int
    num_resident_adapters: int


class EngineClient(Protocol):
    """One engine: in this process, in a child process or on another machine."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def is_alive(self) -> bool: ...

    def generate(self, request: Request) -> AsyncGenerator[SequenceEvent, None]:
        """Submit `request` and yield its events; the last one is terminal.

        Closing the generator before its end aborts the request. An engine that dies yields a
        terminal error event.
        """
        ...

    async def stats(self) -> EngineStats: ...

    async def wait_closed(self) -> None:
        """Return when the engine has died or was closed."""
        ...

    async def close(self) -> None:
        """Stop the engine; open requests get a terminal event. Safe to call twice."""
        ...
