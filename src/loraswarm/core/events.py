"""What the engine says about a request, step by step.

A request yields any number of `SequenceEvent`s without `finish_reason` and exactly one with it;
that one is terminal. Knows nothing about text or HTTP. Built by the scheduler, read by server and
LLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loraswarm.errors import LoRASwarmError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and the most likely tokens at its position, best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An exception of the tree in a form that crosses processes."""

    message: str
    error_type: str
    http_status: int
    param: str | None = None

    @classmethod
    def of(cls, error: LoRASwarmError) -> ErrorInfo:
        """`error` as plain data."""
        if isinstance(error, ReportedError):
            return error.info
        param = getattr(error, "param", None)
        return cls(str(error), error.error_type, error.http_status, param)


class ReportedError(LoRASwarmError):
    """An error that came as data."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.info = info
        self.http_status = info.http_status
        self.error_type = info.error_type
        self.param = info.param


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceEvent:
    """New tokens of one request, and its end when `finish_reason` is set.

    `token_ids` are new since the last event; `logprobs` is parallel to it when asked for.
    `prompt_logprobs` comes once, with the first event of a request that asked for it; its first
    item is None because nothing predicts the first token. `stop_token_id` is the stop or end token
    that ended the sequence (also the last of `token_ids`). `num_cached_tokens` of the prompt were
    not computed, because their K and V were there; `queue_s` is how long the request waited before
    its first step. Both come with the first event that has tokens.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int | None = None
    queue_s: float | None = None
    error: ErrorInfo | None = None
