"""What is needed to go on with a request in another engine: plain data that crosses processes.

Knows nothing about pages' owners, queues or transport. Written by engine/migration, or by a front
that knows no more than what it has sent; read by engine/adoption.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraswarm.core.events import TokenLogprob
from loraswarm.core.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """K and V of a sequence's first `num_tokens` tokens, byte for byte as they lie in pages.

    `pages` are the whole pages in token order; what of the last one lies behind `num_tokens` means
    nothing. `layout` names the base and how a page is laid out: only where it is the same may the
    bytes be used.
    """

    layout: str
    num_tokens: int
    pages: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.pages))


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSnapshot:
    """A request in the middle of its answer, of which `output_token_ids` are already known.

    An engine that adopts it draws the tokens behind them, the same ones as the engine it comes
    from: what an engine has chosen, the seed and how many tokens there may be, is fixed in the
    request. With `kv` the tokens' K and V need not be computed again.

    `adapter_digests`, one for each of the request's adapters, say which contents have made the
    tokens so far; () if adapters act on none of them, None if that is not known: then an adopting
    engine takes what it serves. `waited_s` have passed since the request came; `queue_s` and
    `num_cached_tokens` are those of its first event, None and 0 before it started.
    `prompt_logprobs` are those computed so far, for the first event; () once that has been sent.
    """

    request: Request
    output_token_ids: tuple[int, ...] = ()
    adapter_digests: tuple[str, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    waited_s: float = 0.0
    queue_s: float | None = None
    num_cached_tokens: int = 0
    kv: KVPages | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)
