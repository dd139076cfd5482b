"""One request while it is being served: its tokens and how far it has come.

Written by the scheduler alone. Knows nothing about pages, tensors or text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loraswarm.core.events import TokenLogprob
from loraswarm.core.request import Request
from loraswarm.core.snapshot import KVPages

AdapterKey = tuple[str, str]
AdapterMix = tuple[tuple[AdapterKey, float], ...]
"""What a token is computed with: adapters and their weights. () is the base alone."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and generated tokens of one request.

    Tokens from `first_adapted` on are computed with the adapters of `mix`, those before it with the
    base alone (activated LoRA). `num_computed` tokens have their K and V in pages; preemption sets
    it back to 0 and keeps the tokens. `seed` is fixed at arrival, so the token drawn at a position
    depends on nothing else. `order` is the request's place in the line of arrival, which was at
    `arrived_s` of the engine's clock. When the sequence first started, `num_cached` tokens of the
    prompt had K and V already and `queue_s` seconds had passed; None before. `max_tokens` is the
    request's limit, or what the context leaves when the request set none. A frozen one computes
    nothing until it is thawed. `brought` is K and V that came with it from another engine, until
    they are in pages.

        token_ids   | prompt ............... | generated ...... |
                    | num_computed ->  | next chunk or decode   |
    """

    request: Request
    mix: AdapterMix
    seed: int
    max_tokens: int
    end_token_ids: frozenset[int]
    first_adapted: int = 0
    order: int = 0
    arrived_s: float = 0.0
    is_frozen: bool = False
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    num_cached: int = 0
    queue_s: float | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    brought: KVPages | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        if self.request.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def adapter_keys(self) -> tuple[AdapterKey, ...]:
        """The adapters that must be resident while the sequence runs."""
        return tuple(key for key, _ in self.mix)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def may_end(self) -> bool:
        """Whether an end token is allowed as the next one (`min_tokens` is reached)."""
        return self.num_output >= self.request.params.min_tokens
