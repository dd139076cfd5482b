"""The logits an engine computes for each token of each request, whatever batch it runs in.

Looks into the engine's runner; every position of a prompt has logits when `prompt_logprobs` is
asked for, so that a whole request can be compared with another implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from engine_factory import run, tokens_of
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine import Engine

SCORED = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, prompt_logprobs=0)


def served_logits(
    engine: Engine,
    requests: Iterable[Request],
    before_step: Callable[[int], None] | None = None,
) -> dict[str, tuple[list[int], Tensor]]:
    """Serve the requests together: all tokens of each, and logits [tokens - 1, V] of all but the
    last. Requests must ask for prompt_logprobs (`SCORED`)."""
    requests = list(requests)
    rows: dict[str, dict[int, Tensor]] = {request.request_id: {} for request in requests}
    runner = engine._runner
    compute = runner.run

    def recorded(prepared):
        logits_ZV = compute(prepared)
        for item in prepared.rows:
            found = rows[item.chunk.sequence.request_id]
            for offset, row in enumerate(item.prompt_rows):
                found[item.first_prompt_position + offset - 1] = logits_ZV[row].clone()
            if item.sample_row is not None:
                found[item.chunk.end - 1] = logits_ZV[item.sample_row].clone()
        return logits_ZV

    runner.run = recorded
    try:
        events = run(engine, requests, before_step)
    finally:
        runner.run = compute
    results = {}
    for request in requests:
        tokens = [*request.prompt_token_ids, *tokens_of(events[request.request_id])]
        found = rows[request.request_id]
        assert sorted(found) == list(range(len(tokens) - 1))
        results[request.request_id] = (
            tokens,
            torch.stack([found[i] for i in range(len(tokens) - 1)]).cpu(),
        )
    return results
