"""From a request body to SamplingParams, and the seed of each of its choices.

Knows nothing about prompts. Used by choices.
"""

from __future__ import annotations

import hashlib

from loraswarm.core.request import SamplingParams
from loraswarm.errors import InvalidRequest
from loraswarm.server.schema import ChatBody, CompletionBody, GenerationBody

SAME_NAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)


def completion_params(body: CompletionBody) -> SamplingParams:
    """As OpenAI's completions: 16 tokens unless `max_tokens` says otherwise.

    With `echo` the prompt's log-probabilities are asked for like those of the answer.
    """
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    asked = [body.prompt_logprobs, body.logprobs if body.echo else None]
    prompt_logprobs = max((n for n in asked if n is not None), default=None)
    return _params(body, max_tokens, body.logprobs, prompt_logprobs)


def chat_params(body: ChatBody) -> SamplingParams:
    """As OpenAI's chat: up to the end of the context unless a limit is given."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    limits = {n for n in (body.max_tokens, body.max_completion_tokens) if n is not None}
    if len(limits) > 1:
        raise InvalidRequest(
            f"max_tokens is {body.max_tokens} but max_completion_tokens is "
            f"{body.max_completion_tokens}; give one of them",
            "max_completion_tokens",
        )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _params(body, next(iter(limits), None), logprobs, body.prompt_logprobs)


def choice_seed(seed: int | None, position: int) -> int | None:
    """The seed of a prompt's choice number `position`: the first has the given one itself."""
    if seed is None or position == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def _params(
    body: GenerationBody,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    given = {name: getattr(body, name) for name in SAME_NAME}
    return SamplingParams(
        **{name: value for name, value in given.items() if value is not None},
        max_tokens=max_tokens,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        logit_bias=_logit_bias(body.logit_bias),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    for token_id in bias:
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 19):
            raise InvalidRequest(
                f"logit_bias has the key {token_id!r}; its keys are token ids", "logit_bias"
            )
    return {int(token_id): value for token_id, value in bias.items()}
