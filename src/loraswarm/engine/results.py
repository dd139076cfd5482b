"""From logits to what each chunk of a step produced: drawn tokens and log-probabilities.

Begun by engine/model_runner after the model, waited for by engine/look_ahead before the commit.
Legend: Z logit rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from loraswarm.core.events import ErrorInfo, TokenLogprob
from loraswarm.engine.prepare import LogitRows
from loraswarm.engine.sampler import (
    NONE_ALLOWED,
    NOT_FINITE,
    Drawn,
    draw_rows,
    draws_at_once,
    token_logprobs,
)
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


class StepResults:
    """What the chunks of one step produce; `rows` has one item for each.

    Uses up the logits (changes them in place), and where they lie must not be written before
    `draw`. Greedy rows are drawn at once, without waiting for the device. Others are drawn when
    asked for: that may wait, and needs every token before theirs to be known.
    """

    def __init__(self, logits_ZV: Tensor, rows: Seq[LogitRows]) -> None:
        self._logits_ZV: Tensor | None = logits_ZV
        self._rows = rows
        sampled = [item for item in rows if item.sample_row is not None]
        self._sampled = sorted(sampled, key=lambda item: item.sample_row or 0)
        self._prompt_logprobs: list[tuple[TokenLogprob, ...]] = [() for _ in rows]
        self._logprobs: dict[int, TokenLogprob] = {}
        self._drawn: Drawn | None = None
        if _can_draw_at_once(rows):
            self.draw()

    @torch.inference_mode()
    def draw(self) -> Tensor | None:
        """Token ids [Z] int64 on the device, by logit row; None if no chunk draws."""
        if self._logits_ZV is not None:
            logits_ZV, self._logits_ZV = self._logits_ZV, None
            self._prompt_logprobs = [_prompt_logprobs(logits_ZV, item) for item in self._rows]
            if self._sampled:
                self._draw_from(logits_ZV)
        return None if self._drawn is None else self._drawn.token_Z

    def wait(self) -> list[ChunkResult]:
        """One result per chunk, in their order."""
        self.draw()
        tokens = [] if self._drawn is None else self._drawn.wait()
        drawn = {
            item.sample_row: (token, self._logprobs.get(index))
            for index, (item, token) in enumerate(zip(self._sampled, tokens, strict=True))
        }
        results = []
        for item, prompt in zip(self._rows, self._prompt_logprobs, strict=True):
            found, logprob = drawn.get(item.sample_row, (None, None))
            error = FAILURES.get(found) if found is not None else None
            results.append(ChunkResult(None if error else found, logprob, prompt, error))
        return results

    def _draw_from(self, logits_ZV: Tensor) -> None:
        rows = self._sampled
        sequences = [item.chunk.sequence for item in rows]
        picked_ZV = logits_ZV
        if len(rows) != logits_ZV.shape[0]:
            picked_ZV = logits_ZV[[item.sample_row for item in rows]]
        counts = [sequence.request.params.logprobs for sequence in sequences]
        wanted = [index for index, count in enumerate(counts) if count is not None]
        raw_ZV = picked_ZV[wanted] if wanted else None
        self._drawn = draw_rows(picked_ZV, sequences)
        if raw_ZV is not None:
            tokens = self._drawn.wait()
            chosen = [max(tokens[index], 0) for index in wanted]
            found = token_logprobs(raw_ZV, chosen, [counts[index] or 0 for index in wanted])
            self._logprobs = dict(zip(wanted, found, strict=True))


def _can_draw_at_once(rows: Seq[LogitRows]) -> bool:
    if any(item.prompt_rows or item.sample_row is None for item in rows):
        return False
    sequences = [item.chunk.sequence for item in rows]
    has_logprobs = any(each.request.params.logprobs is not None for each in sequences)
    return not has_logprobs and draws_at_once(sequences)


def _prompt_logprobs(logits_ZV: Tensor, rows: LogitRows) -> tuple[TokenLogprob, ...]:
    if not rows.prompt_rows:
        return ()
    sequence = rows.chunk.sequence
    first = rows.first_prompt_position
    token_ids = sequence.token_ids[first : first + len(rows.prompt_rows)]
    count = sequence.request.params.prompt_logprobs or 0
    wanted_ZV = logits_ZV[rows.prompt_rows.start : rows.prompt_rows.stop]
    return tuple(token_logprobs(wanted_ZV, token_ids, [count] * len(token_ids)))
