"""Log-probabilities in the shapes of OpenAI's two endpoints and of vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraswarm.core.events import TokenLogprob
from loraswarm.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -inf; OpenAI's value for "practically never"


def completion_logprobs(
    tokenizer: Tokenizer,
    logprobs: Sequence[TokenLogprob | None],
    token_ids: Sequence[int],
    starts: Sequence[int],
    num_top: int,
) -> dict[str, Any]:
    """The legacy shape: parallel lists; nothing is known about a token whose item is None."""
    return {
        "tokens": [tokenizer.token_text(token_id) for token_id in token_ids],
        "token_logprobs": [None if item is None else _finite(item.logprob) for item in logprobs],
        "top_logprobs": [
            None if item is None else _top_by_text(tokenizer, item, num_top) for item in logprobs
        ],
        "text_offset": list(starts),
    }


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], num_top: int
) -> dict[str, Any]:
    """The shape of chat: one object for each token, with its bytes."""
    return {
        "content": [
            {
                **_entry(tokenizer, item.token_id, item.logprob),
                "top_logprobs": [_entry(tokenizer, *pair) for pair in item.top[:num_top]],
            }
            for item in logprobs
        ],
        "refusal": None,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each token of the prompt a map of token ids, or None for the first."""
    return [None if item is None else _top_by_id(tokenizer, item, num_top) for item in logprobs]


def _top_by_text(tokenizer: Tokenizer, item: TokenLogprob, num_top: int) -> dict[str, float]:
    """The most likely tokens and the chosen one; of two with the same text the likelier."""
    top: dict[str, float] = {}
    for token_id, logprob in (*item.top[:num_top], (item.token_id, item.logprob)):
        top.setdefault(tokenizer.token_text(token_id), _finite(logprob))
    return top


def _top_by_id(tokenizer: Tokenizer, item: TokenLogprob, num_top: int) -> dict[str, Any]:
    ranked = [(i, logprob, n + 1) for n, (i, logprob) in enumerate(item.top[:num_top])]
    chosen = (item.token_id, item.logprob, item.rank)
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob, rank in (*ranked, chosen)
    }


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
