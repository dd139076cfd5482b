"""The events of a sequence, from what it is when they happen. Used by the scheduler."""

from __future__ import annotations

from loraswarm.core.events import ErrorInfo, FinishReason, SequenceEvent
from loraswarm.core.sequence import Sequence
from loraswarm.engine.step import ChunkResult


def error_event(sequence: Sequence, error: ErrorInfo) -> SequenceEvent:
    """The terminal event of one that failed."""
    return SequenceEvent(request_id=sequence.request_id, finish_reason="error", error=error)


def token_event(
    sequence: Sequence, result: ChunkResult, reason: FinishReason | None
) -> SequenceEvent:
    """The event of a chunk that reached the last known token; prompt logprobs go with the first."""
    is_first = sequence.num_output == (result.token_id is not None)
    return SequenceEvent(
        request_id=sequence.request_id,
        token_ids=() if result.token_id is None else (result.token_id,),
        logprobs=(result.logprob,) if result.logprob is not None else None,
        prompt_logprobs=tuple(sequence.prompt_logprobs) or None if is_first else None,
        finish_reason=reason,
        stop_token_id=result.token_id if reason == "stop" else None,
        num_cached_tokens=sequence.num_cached if is_first else None,
        queue_s=sequence.queue_s if is_first else None,
    )
