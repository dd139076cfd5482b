"""Engine events of one request to text: detokenizer, stop strings and end reasons joined.

The engine knows nothing of text, so a stop string is found here: the consumer then closes the
engine's iterator, which aborts the request there. Used by server and LLM.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from loraswarm.core.client import EngineClient
from loraswarm.core.events import ErrorInfo, FinishReason, SequenceEvent, TokenLogprob
from loraswarm.core.request import Request
from loraswarm.text.detokenizer import Detokenizer
from loraswarm.text.stop_strings import StopStrings
from loraswarm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """New text and tokens of one request, and its end when `finish_reason` is set.

    `text` may lag behind `token_ids` while a character is unfinished or a stop string possible.
    `logprobs` and `text_starts` are parallel to `token_ids` when asked for; a start is where the
    token's text begins, counted in characters from the beginning of the output. `stop_reason` is
    the stop string or the id of `stop_token_ids` that ended the text, None for an end token.
    `num_tokens` counts all output tokens so far.
    """

    text: str
    token_ids: tuple[int, ...]
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    text_starts: tuple[int, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: ErrorInfo | None = None


class TextStream:
    """The text of one request; feed it every event in order until `push` reports the end."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        params = request.params
        self._params = params
        self._detokenizer = Detokenizer(
            tokenizer, request.prompt_token_ids, params.skip_special_tokens
        )
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._num_tokens = 0
        self._num_characters = 0
        self._is_finished = False

    def push(self, event: SequenceEvent) -> TextDelta:
        """The text of `event`; after a `finish_reason` no more events may come."""
        assert not self._is_finished
        pieces: list[str] = []
        starts: list[int] = []
        matched = None
        for token_id in event.token_ids:
            starts.append(self._num_characters)
            text, matched = self._push_token(token_id, self._is_hidden(event, len(starts)))
            pieces.append(text)
            if matched is not None:
                break
        finish_reason = event.finish_reason
        if matched is not None:
            finish_reason = "stop"
        elif finish_reason is not None:
            pieces.append(self._flush())
        self._is_finished = finish_reason is not None
        num_new = len(starts)
        return TextDelta(
            text="".join(pieces),
            token_ids=event.token_ids[:num_new],
            num_tokens=self._num_tokens,
            logprobs=None if event.logprobs is None else event.logprobs[:num_new],
            text_starts=None if event.logprobs is None else tuple(starts),
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=matched if matched is not None else self._stop_reason(event),
            error=None if matched is not None else event.error,
        )

    def _push_token(self, token_id: int, is_hidden: bool) -> tuple[str, str | None]:
        self._num_tokens += 1
        return self._add("" if is_hidden else self._detokenizer.push(token_id))

    def _flush(self) -> str:
        text, _ = self._stops.push(self._detokenizer.flush(), may_stop=False)
        return text + self._stops.flush()

    def _add(self, text: str) -> tuple[str, str | None]:
        self._num_characters += len(text)
        return self._stops.push(text, self._num_tokens > self._params.min_tokens)

    def _is_hidden(self, event: SequenceEvent, position: int) -> bool:
        """Is the `position`th token of `event` the stop token, whose text is not output?"""
        return (
            event.stop_token_id is not None
            and position == len(event.token_ids)
            and not self._params.include_stop_str_in_output
        )

    def _stop_reason(self, event: SequenceEvent) -> int | None:
        is_asked = event.stop_token_id in self._params.stop_token_ids
        return event.stop_token_id if is_asked else None


async def stream_text(
    client: EngineClient, request: Request, tokenizer: Tokenizer
) -> AsyncGenerator[TextDelta, None]:
    """Generate and yield text until its end; closing early aborts the request in the engine."""
    stream = TextStream(tokenizer, request)
    async with aclosing(client.generate(request)) as events:
        async for event in events:
            delta = stream.push(event)
            yield delta
            if delta.finish_reason is not None:
                return
