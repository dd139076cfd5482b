"""The choices of one HTTP request: a request to the engine for each, run together.

Knows nothing about JSON. Used by completions and chat.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from loraswarm.core.events import FinishReason, ReportedError, TokenLogprob
from loraswarm.core.request import Request, SamplingParams, check_context
from loraswarm.errors import InvalidRequest
from loraswarm.server.errors import UNFINISHED
from loraswarm.server.metrics import RequestWatch
from loraswarm.server.prompts import Prompt
from loraswarm.server.sampling import choice_seed
from loraswarm.server.service import AdapterChoice, Service
from loraswarm.text.generation import TextDelta, TextStream
from loraswarm.text.tokenizer import check_token_ids

MAX_CHOICES = 2048


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to one prompt; `index` is its place in the response, `watch` counts it."""

    index: int
    prompt: Prompt
    request: Request
    watch: RequestWatch


@dataclass(slots=True)
class Answer:
    """A whole answer, or as much of it as has come."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text_starts: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: TextDelta) -> None:
        """Append what is new."""
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.text_starts += delta.text_starts or ()
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """All choices of one HTTP request, `num_per_prompt` for each prompt, prompt by prompt."""

    response_id: str
    choices: tuple[Choice, ...]
    num_per_prompt: int

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(len(c.prompt.token_ids) for c in self.choices[:: self.num_per_prompt])

    @property
    def num_cached_tokens(self) -> int:
        """Those of `num_prompt_tokens` whose K and V were cached when each prompt's first choice
        began; further choices find what the first has left, which nobody saved."""
        return sum(c.watch.num_cached_tokens for c in self.choices[:: self.num_per_prompt])


def plan_generation(
    service: Service,
    response_id: str,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    chosen: AdapterChoice,
    num_per_prompt: int,
) -> Generation:
    """One engine request for each prompt and choice.

    Raises   InvalidRequest before anything is submitted.
    """
    _check(service, prompts, params, num_per_prompt)
    choices: list[Choice] = []
    for prompt in prompts:
        for position in range(num_per_prompt):
            index = len(choices)
            request = Request(
                request_id=f"{response_id}-{index}",
                prompt_token_ids=prompt.token_ids,
                params=dataclasses.replace(params, seed=choice_seed(params.seed, position)),
                adapter=chosen.adapter,
                adapters=chosen.adapters,
                arrival_s=time.monotonic(),
            )
            choices.append(Choice(index, prompt, request, service.metrics.watch(request)))
    return Generation(
        response_id=response_id, choices=tuple(choices), num_per_prompt=num_per_prompt
    )


async def run_generation(
    service: Service, generation: Generation
) -> AsyncGenerator[tuple[Choice, TextDelta], None]:
    """New text of any choice as it comes; closing aborts all that are not finished.

    Raises   ReportedError at the first choice that fails; the others are aborted.
    """
    if len(generation.choices) == 1:
        deltas = _run_one(service, generation.choices[0])
    else:
        deltas = _run_many(service, generation.choices)
    async with aclosing(deltas):
        async for choice, delta in deltas:
            if delta.error is not None:
                raise ReportedError(delta.error)
            if delta.finish_reason in ("abort", "error"):
                raise ReportedError(UNFINISHED)
            yield choice, delta


async def collect_answers(service: Service, generation: Generation) -> list[Answer]:
    """The whole answers, in the order of the choices."""
    answers = [Answer() for _ in generation.choices]
    deltas = run_generation(service, generation)
    async with aclosing(deltas):
        async for choice, delta in deltas:
            answers[choice.index].add(delta)
    return answers


async def _run_one(
    service: Service, choice: Choice
) -> AsyncGenerator[tuple[Choice, TextDelta], None]:
    """As text.generation.stream_text, with every event told to the choice's watch."""
    stream = TextStream(service.tokenizer, choice.request)
    with choice.watch as watch:
        async with aclosing(service.client.generate(choice.request)) as events:
            async for event in events:
                delta = stream.push(event)
                watch.saw(event, delta)
                yield choice, delta
                if delta.finish_reason is not None:
                    return


async def _run_many(
    service: Service, choices: Sequence[Choice]
) -> AsyncGenerator[tuple[Choice, TextDelta], None]:
    queue: asyncio.Queue[tuple[Choice, TextDelta] | asyncio.Task[None]] = asyncio.Queue()

    async def feed(choice: Choice) -> None:
        async for item in _run_one(service, choice):
            queue.put_nowait(item)

    tasks = [asyncio.create_task(feed(choice)) for choice in choices]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    num_running = len(tasks)
    try:
        while num_running:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check(
    service: Service, prompts: Sequence[Prompt], params: SamplingParams, num_per_prompt: int
) -> None:
    info = service.client.info
    if len(prompts) * num_per_prompt > MAX_CHOICES:
        raise InvalidRequest(
            f"{len(prompts):,} prompts with n={num_per_prompt} make "
            f"{len(prompts) * num_per_prompt:,} choices; at most {MAX_CHOICES:,} go in one request",
            "n",
        )
    check_token_ids(params.stop_token_ids, info.vocab_size, "stop_token_ids")
    check_token_ids(tuple(params.logit_bias), info.vocab_size, "logit_bias")
    for prompt in prompts:
        if not prompt.token_ids:
            raise InvalidRequest("prompt is empty", "prompt")
        check_context(len(prompt.token_ids), params.max_tokens, info.max_model_len)
        check_token_ids(prompt.token_ids, info.vocab_size, "prompt")
