"""What a benchmark sends, what it saw, and what can be driven: plain data and one protocol.

Knows nothing about HTTP, engines or how requests are drawn. `PlannedRequest`s are made by
bench/workload, sent by a `Target` (bench/http_target, bench/offline) that bench/runner drives, and
become `RequestRecord`s, which bench/metrics reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request to send. `adapter` None is the base model.

    `arrival_s` is when it is sent, in seconds after the run's start; None in a closed loop, where
    it is sent when a place is free.
    """

    index: int
    adapter: str | None
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    arrival_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What came of one request. Times are seconds after the run's start.

    `response_s` is when each part of the answer that had text came, in order; a part may hold
    several tokens. `num_output` and `num_prompt` are the server's counts if it told them, else the
    number of parts and the length of what was sent; `is_counted` is whether it told `num_output`.
    `cached_tokens` of the prompt were not computed, if the server said so. A failed request has
    `error`, one line, and keeps what it got.
    """

    index: int
    adapter: str | None
    num_prompt: int
    max_tokens: int
    start_s: float
    response_s: tuple[float, ...]
    num_output: int
    error: str | None = None
    cached_tokens: int | None = None
    is_counted: bool = True


class Target(Protocol):
    """Something that answers requests: an endpoint or an engine in this process.

    `name` says in reports what it is.
    """

    @property
    def name(self) -> str: ...

    async def send(self, request: PlannedRequest, clock: Clock) -> RequestRecord:
        """Answer one request; what goes wrong is in the record's `error`, never raised.

        `clock` gives the seconds after the run's start.
        """
        ...

    async def close(self) -> None:
        """Free what the target holds; safe to call twice."""
        ...
