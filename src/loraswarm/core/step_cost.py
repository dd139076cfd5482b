"""What a step of a model has to do, in numbers, and how long that takes on a measured machine.

Plain arithmetic: knows neither tensors nor who chose the chunks. Its figures are fitted by
bench/calibrate; whoever wants to know what a step would take, without taking it, asks `StepCosts`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

AFTER_TOKENS = (
    "logit_row_s",
    "lora_s",
    "adapter_s",
    "adapted_token_s",
    "tile_byte_s",
    "lora_product_s",
    "kv_byte_s",
    "attention_pair_s",
)
"""Figures of `StepCosts` in the order of `amounts_of`, behind those of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWork:
    """`num_tokens` tokens of a sequence that has `num_computed` in pages already.

    `adapter` is what distinguishes its adapter from others (None: the base), of `adapter_bytes` in
    pages. `samples`: its last token is followed by a new one, for which logits are computed.
    """

    num_tokens: int
    num_computed: int
    adapter: Hashable | None = None
    adapter_bytes: int = 0
    samples: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a step multiplies and reads, beside the base's weights.

    `num_tokens` are all its tokens, `num_logit_rows` those with logits. `tile_bytes` are those of
    its `num_adapters` distinct adapters, each once; `num_adapted_tokens` have one, and
    `lora_products` are, added up over them, the bytes of each token's own. `kv_bytes` are read by
    chunks of one token (decodes); `attention_pairs` count, for the tokens of longer chunks, what
    each attends to, itself included. Sliding windows are not known here.
    """

    num_tokens: int
    num_logit_rows: int
    num_adapters: int = 0
    num_adapted_tokens: int = 0
    tile_bytes: int = 0
    lora_products: int = 0
    kv_bytes: int = 0
    attention_pairs: int = 0

    @classmethod
    def of(cls, chunks: Iterable[ChunkWork], kv_token_bytes: int) -> Self:
        """The work of these chunks; a token in pages takes `kv_token_bytes`."""
        chunks = tuple(chunks)
        adapted = [each for each in chunks if each.adapter is not None]
        sizes = {each.adapter: each.adapter_bytes for each in adapted}
        decodes = [each for each in chunks if each.num_tokens == 1]
        return cls(
            num_tokens=sum(each.num_tokens for each in chunks),
            num_logit_rows=sum(each.samples for each in chunks),
            num_adapters=len(sizes),
            num_adapted_tokens=sum(each.num_tokens for each in adapted),
            tile_bytes=sum(sizes.values()),
            lora_products=sum(each.num_tokens * each.adapter_bytes for each in adapted),
            kv_bytes=sum(each.num_computed + 1 for each in decodes) * kv_token_bytes,
            attention_pairs=sum(_num_pairs(each) for each in chunks if each.num_tokens != 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Seconds of a step, a sum over what it does.

    Semantics    step_s = fixed_s + sum over brackets i of token_s[i] * (tokens in bracket i)
                   + logit_row_s * num_logit_rows
                   + lora_s (if there is any adapter) + adapter_s * num_adapters
                   + adapted_token_s * num_adapted_tokens
                   + tile_byte_s * tile_bytes + lora_product_s * lora_products
                   + kv_byte_s * kv_bytes + attention_pair_s * attention_pairs

    Brackets are those of a tax: bracket i holds the tokens of a step from the `brackets[i]`-th
    (exclusive) to the `brackets[i + 1]`-th. The first tokens of a step cost little, since the
    base's weights must be read in any case, which is in `fixed_s`; later ones cost their products.

    Units    seconds for one of what the name says. No figure is negative: more work never takes
             less time.
    """

    fixed_s: float
    brackets: tuple[int, ...]
    token_s: tuple[float, ...]
    logit_row_s: float
    lora_s: float
    adapter_s: float
    adapted_token_s: float
    tile_byte_s: float
    lora_product_s: float
    kv_byte_s: float
    attention_pair_s: float

    def step_s(self, work: StepWork) -> float:
        """Seconds that a step with this work takes."""
        amounts = amounts_of(work, self.brackets)
        return sum(
            cost * amount for cost, amount in zip(self._coefficients(), amounts, strict=True)
        )

    def _coefficients(self) -> tuple[float, ...]:
        rest: tuple[float, ...] = tuple(getattr(self, name) for name in AFTER_TOKENS)
        return (self.fixed_s, *self.token_s, *rest)

    @classmethod
    def of(cls, coefficients: Iterable[float], brackets: tuple[int, ...]) -> Self:
        """From one figure for each of `amounts_of`, in its order."""
        fixed_s, *others = (float(value) for value in coefficients)
        token_s, rest = others[: len(brackets)], others[len(brackets) :]
        figures = dict(zip(AFTER_TOKENS, rest, strict=True))
        return cls(fixed_s=fixed_s, brackets=brackets, token_s=tuple(token_s), **figures)


def amounts_of(work: StepWork, brackets: tuple[int, ...]) -> tuple[float, ...]:
    """What the figures of `StepCosts` are multiplied by, in their order; the first is 1."""
    return (
        1.0,
        *tokens_in_brackets(work.num_tokens, brackets),
        float(work.num_logit_rows),
        float(work.num_adapters > 0),
        float(work.num_adapters),
        float(work.num_adapted_tokens),
        float(work.tile_bytes),
        float(work.lora_products),
        float(work.kv_bytes),
        float(work.attention_pairs),
    )


def tokens_in_brackets(num_tokens: int, brackets: tuple[int, ...]) -> tuple[float, ...]:
    """How many of `num_tokens` fall to each bracket: (0, 8, 32) cuts 40 into 8, 24 and 8."""
    bounds = (*brackets, max(num_tokens, brackets[-1]))
    return tuple(float(max(0, min(num_tokens, end) - begin)) for begin, end in pairwise(bounds))


def _num_pairs(chunk: ChunkWork) -> int:
    """Token i of the chunk attends to what was computed before and to i + 1 tokens of the chunk."""
    return chunk.num_tokens * chunk.num_computed + chunk.num_tokens * (chunk.num_tokens + 1) // 2
