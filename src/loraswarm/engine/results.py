"""From logits to what each chunk of a step produced: drawn tokens and log-probabilities.

Called by the engine between the model and the scheduler's commit.
Legend: Z logit rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from loraswarm.core.events import ErrorInfo, TokenLogprob
from loraswarm.engine.prepare import LogitRows
from loraswarm.engine.sampler import NONE_ALLOWED, NOT_FINITE, sample, token_logprobs
from loraswarm.engine.step import ChunkResult
from loraswarm.errors import EngineError, InvalidRequest

FAILURES = {
    NOT_FINITE: ErrorInfo(
        "the model's logits are not finite for this request (an overflow in the base's dtype, or "
        "adapter weights too large for it); try --dtype float32",
        EngineError.error_type,
        EngineError.http_status,
    ),
    NONE_ALLOWED: ErrorInfo(
        "the request's penalties, logit_bias, min_tokens and stop_token_ids leave no token to "
        "choose; relax them",
        InvalidRequest.error_type,
        InvalidRequest.http_status,
    ),
}


@torch.inference_mode()
def chunk_results(logits_ZV: Tensor, rows: Seq[LogitRows]) -> list[ChunkResult]:
    """One result per item of `rows`, in its order. `logits_ZV` is used up (changed in place)."""
    prompt_logprobs = [_prompt_logprobs(logits_ZV, item) for item in rows]
    drawn = _draw(logits_ZV, [item for item in rows if item.sample_row is not None])
    results = []
    for item, prompt in zip(rows, prompt_logprobs, strict=True):
        token, logprob = drawn.get(item.sample_row, (None, None))
        error = FAILURES.get(token) if token is not None else None
        results.append(ChunkResult(None if error else token, logprob, prompt, error))
    return results


def _draw(
    logits_ZV: Tensor, rows: list[LogitRows]
) -> dict[int | None, tuple[int, TokenLogprob | None]]:
    """Token and log-probability (if asked for) by logit row."""
    if not rows:
        return {}
    rows = sorted(rows, key=lambda item: item.sample_row or 0)
    sequences = [item.chunk.sequence for item in rows]
    picked_ZV = logits_ZV
    if len(rows) != logits_ZV.shape[0]:
        picked_ZV = logits_ZV[[item.sample_row for item in rows]]
    counts = [sequence.request.params.logprobs for sequence in sequences]
    wanted = [index for index, count in enumerate(counts) if count is not None]
    raw_ZV = picked_ZV[wanted] if wanted else None
    tokens = sample(picked_ZV, sequences)
    logprobs: dict[int, TokenLogprob] = {}
    if raw_ZV is not None:
        chosen = [max(tokens[index], 0) for index in wanted]
        found = token_logprobs(raw_ZV, chosen, [counts[index] or 0 for index in wanted])
        logprobs = dict(zip(wanted, found, strict=True))
    return {
        item.sample_row: (token, logprobs.get(index))
        for index, (item, token) in enumerate(zip(rows, tokens, strict=True))
    }


def _prompt_logprobs(logits_ZV: Tensor, rows: LogitRows) -> tuple[TokenLogprob, ...]:
    if not rows.prompt_rows:
        return ()
    sequence = rows.chunk.sequence
    first = rows.first_prompt_position
    token_ids = sequence.token_ids[first : first + len(rows.prompt_rows)]
    count = sequence.request.params.prompt_logprobs or 0
    wanted_ZV = logits_ZV[rows.prompt_rows.start : rows.prompt_rows.stop]
    return tuple(token_logprobs(wanted_ZV, token_ids, [count] * len(token_ids)))
