"""The demo's mixed batch: the same prompts to the base and to every adapter, at once, over HTTP.

Talks to a running server through the official openai client; knows nothing of engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loraswarm.demo import heldout
from loraswarm.errors import ConfigError, EngineError

PROMPT_TASKS = ("ticket-router", "log-summary", "sql")
MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Reply:
    """What one model said to one prompt."""

    prompt: str
    model: str
    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Showcase:
    """All replies of the batch and the seconds it took."""

    replies: tuple[Reply, ...]
    elapsed_s: float

    @property
    def num_tokens(self) -> int:
        return sum(reply.num_tokens for reply in self.replies)


def prompts() -> list[str]:
    """A ticket, a log excerpt and a question, none of them seen in training."""
    return [heldout(task)[0].prompt for task in PROMPT_TASKS]


async def ask_all(base_url: str, models: Sequence[str]) -> Showcase:
    """Send every prompt to every model in one go; replies are in the order of prompts and models.

    Raises   ConfigError if the openai package is not installed.
    """
    try:
        from openai import APIError, AsyncOpenAI
    except ImportError as error:
        raise ConfigError(
            "the demo talks through the openai package; pip install 'loraswarm[demo]'"
        ) from error
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none") as client:

        async def ask(prompt: str, model: str) -> Reply:
            answer = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=MAX_TOKENS,
                temperature=0,
            )
            tokens = answer.usage.completion_tokens if answer.usage else 0
            return Reply(prompt, model, answer.choices[0].message.content or "", tokens)

        await client.models.list()
        begin_s = time.perf_counter()
        asks = [ask(prompt, model) for prompt in prompts() for model in models]
        try:
            replies = await asyncio.gather(*asks)
        except APIError as error:
            raise EngineError(f"the demo's server did not answer: {error}") from error
        return Showcase(tuple(replies), time.perf_counter() - begin_s)


def table(showcase: Showcase) -> str:
    """The replies for people to read, prompt by prompt."""
    width = max(len(reply.model) for reply in showcase.replies)
    lines: list[str] = []
    last_prompt = None
    for reply in showcase.replies:
        if reply.prompt != last_prompt:
            last_prompt = reply.prompt
            lines += ["", *(f"> {line}" for line in reply.prompt.splitlines())]
        lines.append(f"  {reply.model:{width}}  {' '.join(reply.text.split())}")
    rate = showcase.num_tokens / showcase.elapsed_s
    lines += [
        "",
        f"{len(showcase.replies)} requests, {len({r.model for r in showcase.replies})} models, "
        f"one batch: {showcase.num_tokens} tokens in {showcase.elapsed_s:.2f} s "
        f"({rate:.0f} tokens/s)",
    ]
    return "\n".join(lines[1:])
