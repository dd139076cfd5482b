"""The plan of one iteration and what came out of it. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from loraswarm.core.events import ErrorInfo, TokenLogprob
from loraswarm.core.sequence import AdapterKey, Sequence
from loraswarm.memory.adapter_cache import AdapterLoad


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The next `num_tokens` uncomputed tokens of a sequence.

    A chunk that was foreseen begins at `foreseen_begin`, behind what the step under way computes:
    its token is the one drawn there.
    """

    sequence: Sequence
    num_tokens: int
    foreseen_begin: int | None = None

    @property
    def begin(self) -> int:
        """The place of its first token in the sequence."""
        if self.foreseen_begin is None:
            return self.sequence.num_computed
        return self.foreseen_begin

    @property
    def end(self) -> int:
        """Behind its last token."""
        return self.begin + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that a new one is drawn."""
        return self.num_tokens == self.sequence.num_uncomputed and self.sequence.max_tokens > 0


@dataclass(frozen=True, slots=True)
class PageFill:
    """K and V of another engine that go into a page of this one."""

    page: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Step:
    """What one iteration does.

    `dropped` adapters are gone from their pages; `loads` may then be written into theirs, beside
    this step and later ones; `fills` are written before anything is computed; `chunks` run now.
    """

    chunks: tuple[ScheduledChunk, ...]
    loads: tuple[AdapterLoad, ...] = ()
    dropped: tuple[AdapterKey, ...] = ()
    fills: tuple[PageFill, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What the model said about one chunk.

    `token_id` is the token drawn, None if the chunk does not sample; `prompt_logprobs` are those of
    the prompt tokens that follow the chunk's tokens, when asked for. `error` says why no token
    could be drawn.
    """

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: ErrorInfo | None = None
