"""POST /v1/completions: prompts in, text out, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
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
from loraswarm.server.prompts import completion_prompts
from loraswarm.server.sampling import completion_params
from loraswarm.server.schema import CompletionBody, read_generation
from loraswarm.server.service import Service
from loraswarm.server.streaming import open_stream, unless_disconnected
from loraswarm.text.generation import TextDelta


async def create_completion(service: Service, request: Request) -> Response:
    """Answer one request; its engine requests are aborted if the client goes."""
    body = await read_generation(request, CompletionBody)
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed", "prompt_logprobs")
    vocab_size = service.client.info.vocab_size
    chosen = service.choose(body.model, body.weighted_adapters())
    prompts = await completion_prompts(body, service.tokenizer, vocab_size)
    envelope = Envelope("text_completion", "cmpl", body)
    generation = plan_generation(
        service, envelope.response_id, prompts, completion_params(body), chosen, body.n
    )
    envelope.generation = generation
    writer = _Writer(service, body, envelope)
    if body.stream:
        return await open_stream(request, writer.chunks(generation))
    answers = await unless_disconnected(request.receive, collect_answers(service, generation))
    return Response(writer.whole(generation, answers), media_type="application/json")


class _Writer:
    """The JSON of one response."""

    def __init__(self, service: Service, body: CompletionBody, envelope: Envelope) -> None:
        self._service = service
        self._body = body
        self._envelope = envelope

    def whole(self, generation: Generation, answers: list[Answer]) -> bytes:
        """The response without streaming."""
        pairs = zip(generation.choices, answers, strict=True)
        choices = [self._whole_choice(choice, answer) for choice, answer in pairs]
        self._envelope.num_completion_tokens = sum(len(a.token_ids) for a in answers)
        return self._envelope.whole(choices)

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The events of a streamed response."""
        deltas = run_generation(self._service, generation)
        begun: set[int] = set()
        async with aclosing(deltas):
            async for choice, delta in deltas:
                is_first = choice.index not in begun
                begun.add(choice.index)
                self._envelope.num_completion_tokens += len(delta.token_ids)
                if self._is_worth_sending(delta, is_first):
                    yield self._envelope.chunk(self._chunk_choice(choice, delta, is_first))
        yield self._envelope.closing()

    def _is_worth_sending(self, delta: TextDelta, is_first: bool) -> bool:
        body = self._body
        if delta.text or delta.finish_reason is not None or (is_first and body.echo):
            return True
        return body.logprobs is not None or body.return_token_ids or body.counts_continuously

    def _chunk_choice(self, choice: Choice, delta: TextDelta, is_first: bool) -> dict[str, Any]:
        echoes = self._body.echo and is_first
        part: dict[str, Any] = {
            "index": choice.index,
            "text": choice.prompt.text + delta.text if echoes else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            part["stop_reason"] = delta.stop_reason
        if self._body.logprobs is not None:
            part["logprobs"] = self._logprobs(
                choice,
                delta.prompt_logprobs if echoes else None,
                delta.logprobs or (),
                delta.text_starts or (),
            )
        if self._body.return_token_ids:
            part["prompt_token_ids"] = choice.prompt.token_ids if is_first else None
            part["token_ids"] = delta.token_ids
        return part

    def _whole_choice(self, choice: Choice, answer: Answer) -> dict[str, Any]:
        body = self._body
        text = "".join(answer.text)
        part: dict[str, Any] = {
            "index": choice.index,
            "text": choice.prompt.text + text if body.echo else text,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if body.logprobs is not None:
            part["logprobs"] = self._logprobs(
                choice,
                answer.prompt_logprobs if body.echo else None,
                answer.logprobs,
                answer.text_starts,
            )
        if body.prompt_logprobs is not None and answer.prompt_logprobs is not None:
            part["prompt_logprobs"] = shapes.prompt_logprobs(
                self._service.tokenizer, answer.prompt_logprobs, body.prompt_logprobs
            )
        if body.return_token_ids:
            part["prompt_token_ids"] = choice.prompt.token_ids
            part["token_ids"] = answer.token_ids
        return part

    def _logprobs(
        self,
        choice: Choice,
        of_prompt: tuple[TokenLogprob | None, ...] | None,
        of_answer: list[TokenLogprob] | tuple[TokenLogprob, ...],
        starts: list[int] | tuple[int, ...],
    ) -> dict[str, Any]:
        """The legacy object; with `echo` offsets count from the beginning of the prompt."""
        assert self._body.logprobs is not None
        shift = len(choice.prompt.text) if self._body.echo else 0
        items: list[TokenLogprob | None] = list(of_answer)
        token_ids = [item.token_id for item in of_answer]
        offsets = [shift + start for start in starts]
        if of_prompt is not None:
            items = [*of_prompt, *items]
            token_ids = [*choice.prompt.token_ids, *token_ids]
            offsets = [*choice.prompt.starts, *offsets]
        return shapes.completion_logprobs(
            self._service.tokenizer, items, token_ids, offsets, self._body.logprobs
        )
