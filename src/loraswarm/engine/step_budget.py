"""How many tokens a step may still compute. Used by the scheduler while it chooses one."""

from __future__ import annotations

from loraswarm.core.sequence import Sequence

MAX_SCORED_TOKENS = 256
"""Prompt tokens of a step that are given logits of their own: each is a row as wide as the
vocabulary, in float32."""


class StepBudget:
    """What is left of a step's tokens, and of those of prompts that are to be scored."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._num_scored = MAX_SCORED_TOKENS

    @property
    def is_spent(self) -> bool:
        return self._num_tokens <= 0

    def plan(self, sequence: Sequence, planned: dict[Sequence, int]) -> None:
        """Note how many tokens it computes, if there are any left for it."""
        num_tokens = min(sequence.num_uncomputed, self._num_tokens)
        is_scored = sequence.request.params.prompt_logprobs is not None
        if is_scored and len(sequence.prompt_logprobs) < sequence.num_prompt:
            num_tokens = min(num_tokens, self._num_scored)
            self._num_scored -= num_tokens
        self._num_tokens -= num_tokens
        if num_tokens > 0:
            planned[sequence] = num_tokens
