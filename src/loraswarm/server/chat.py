"""POST /v1/chat/completions: messages in, an assistant's message out, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from loraswarm.core.events import TokenLogprob
from loraswarm.errors import InvalidRequest
from loraswarm.server import logprobs as shapes
from loraswarm.server.choices import (
    Answer,
    Choice,
    Generation,
    collect_answers,
    plan_generation,
    run_generation,
)
from loraswarm.server.envelope import Envelope
from loraswarm.server.prompts import chat_prompt
from loraswarm.server.sampling import chat_params
from loraswarm.server.schema import ChatBody, read_generation
from loraswarm.server.service import Service
from loraswarm.server.streaming import open_stream, unless_disconnected
from loraswarm.text.generation import TextDelta

ROLE = {"role": "assistant", "content": ""}


async def create_chat_completion(service: Service, request: Request) -> Response:
    """Answer one request; its engine requests are aborted if the client goes."""
    body = await read_generation(request, ChatBody)
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed", "prompt_logprobs")
    chosen = service.choose(body.model, body.weighted_adapters())
    prompt = await chat_prompt(body, service.tokenizer)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    envelope = Envelope(kind, "chatcmpl", body)
    generation = plan_generation(
        service, envelope.response_id, [prompt], chat_params(body), chosen, body.n
    )
    envelope.generation = generation
    writer = _Writer(service, body, envelope)
    if body.stream:
        return await open_stream(request, writer.chunks(generation))
    answers = await unless_disconnected(request.receive, collect_answers(service, generation))
    return Response(writer.whole(generation, answers), media_type="application/json")


class _Writer:
    """The JSON of one response."""

    def __init__(self, service: Service, body: ChatBody, envelope: Envelope) -> None:
        self._service = service
        self._body = body
        self._envelope = envelope

    def whole(self, generation: Generation, answers: list[Answer]) -> bytes:
        """The response without streaming."""
        body = self._body
        choices = [self._whole_choice(i, answer) for i, answer in enumerate(answers)]
        self._envelope.num_completion_tokens = sum(len(a.token_ids) for a in answers)
        more: dict[str, Any] = {}
        of_prompt = answers[0].prompt_logprobs
        if body.prompt_logprobs is not None and of_prompt is not None:
            more["prompt_logprobs"] = shapes.prompt_logprobs(
                self._service.tokenizer, of_prompt, body.prompt_logprobs
            )
        if body.return_token_ids:
            more["prompt_token_ids"] = generation.choices[0].prompt.token_ids
        return self._envelope.whole(choices, **more)

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The events of a streamed response; each choice begins with its role."""
        deltas = run_generation(self._service, generation)
        begun: set[int] = set()
        async with aclosing(deltas):
            async for choice, delta in deltas:
                events = b""
                if choice.index not in begun:
                    events = self._opening(choice, is_first=not begun)
                    begun.add(choice.index)
                self._envelope.num_completion_tokens += len(delta.token_ids)
                if self._is_worth_sending(delta):
                    events += self._envelope.chunk(self._chunk_choice(choice.index, delta))
                if events:
                    yield events
        yield self._envelope.closing()

    def _is_worth_sending(self, delta: TextDelta) -> bool:
        body = self._body
        if delta.text or delta.finish_reason is not None:
            return True
        return body.logprobs or body.return_token_ids or body.counts_continuously

    def _opening(self, choice: Choice, is_first: bool) -> bytes:
        part = {"index": choice.index, "delta": ROLE, "logprobs": None, "finish_reason": None}
        if is_first and self._body.return_token_ids:
            return self._envelope.chunk(part, prompt_token_ids=choice.prompt.token_ids)
        return self._envelope.chunk(part)

    def _chunk_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        part: dict[str, Any] = {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            part["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            part["token_ids"] = delta.token_ids
        return part

    def _whole_choice(self, index: int, answer: Answer) -> dict[str, Any]:
        part: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.text), "refusal": None},
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self._body.return_token_ids:
            part["token_ids"] = answer.token_ids
        return part

    def _logprobs(self, items: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return shapes.chat_logprobs(
            self._service.tokenizer, items or (), self._body.top_logprobs or 0
        )
