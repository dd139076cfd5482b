"""What the official `openai` client must be able to do with any server of ours.

A test class inherits `OpenAIContract` and provides the fixtures `base_url` (with /v1), `model` (the
base model's id) and `adapter` (an adapter's id). Nothing here depends on what the model answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from server_harness import async_openai_client, openai_client

CHAT: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Name a colour."}]},
]
NUM_CONCURRENT = 64


def counts_of(usage: openai.types.CompletionUsage | None) -> tuple[int, int, int]:
    """The tokens of `usage`, without how many were cached: that may differ from run to run."""
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert 0 <= (usage.prompt_tokens_details.cached_tokens or 0) <= usage.prompt_tokens
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


class OpenAIContract:
    """Inherit and provide `base_url`, `model` and `adapter`."""

    @pytest.fixture
    def client(self, base_url: str) -> Iterator[openai.OpenAI]:
        with openai_client(base_url) as client:
            yield client

    def test_models_lists_the_base_first_and_adapters_with_their_parent(
        self, client: openai.OpenAI, model: str, adapter: str
    ) -> None:
        models = client.models.list().data
        assert models[0].id == model
        entry = next(m for m in models if m.id == adapter)
        assert (entry.object, entry.owned_by) == ("model", "loraswarm")
        assert entry.model_dump()["parent"] == model
        assert client.models.retrieve(adapter).id == adapter

    def test_a_completion_has_text_counts_and_an_end(
        self, client: openai.OpenAI, model: str
    ) -> None:
        answer = client.completions.create(
            model=model, prompt="The sky is", max_tokens=7, extra_body={"ignore_eos": True}
        )
        assert answer.object == "text_completion"
        assert answer.model == model
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7
        assert answer.usage.prompt_tokens > 0
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7

    def test_streamed_pieces_are_the_whole_text(
        self, client: openai.OpenAI, model: str, adapter: str
    ) -> None:
        for name in (model, adapter):
            asked: dict[str, Any] = {
                "model": name,
                "prompt": "The sky is",
                "max_tokens": 13,
                "temperature": 0,
            }
            whole = client.completions.create(**asked)
            chunks = list(
                client.completions.create(
                    **asked, stream=True, stream_options={"include_usage": True}
                )
            )
            text = "".join(c.text for chunk in chunks for c in chunk.choices)
            assert text == whole.choices[0].text
            assert counts_of(chunks[-1].usage) == counts_of(whole.usage)
            assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
            assert len({chunk.id for chunk in chunks}) == 1

    def test_a_chat_streams_a_role_then_the_same_text(
        self, client: openai.OpenAI, model: str
    ) -> None:
        asked: dict[str, Any] = {
            "model": model,
            "messages": CHAT,
            "max_completion_tokens": 13,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**asked)
        assert whole.object == "chat.completion"
        assert whole.choices[0].message.role == "assistant"
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert chunks[0].choices[0].delta.role == "assistant"
        assert all(c.choices[0].delta.role is None for c in chunks[1:])
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason

    def test_n_choices_come_with_their_indices(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(
            model=model,
            prompt=["one", "two two", "three"],
            n=2,
            max_tokens=3,
            seed=7,
            extra_body={"ignore_eos": True},
        )
        assert [c.index for c in answer.choices] == [0, 1, 2, 3, 4, 5]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 18

    def test_the_same_seed_gives_the_same_choices(self, client: openai.OpenAI, model: str) -> None:
        asked: dict[str, Any] = {"model": model, "messages": CHAT, "max_tokens": 9, "seed": 133}
        first, second = (client.chat.completions.create(n=3, **asked) for _ in range(2))
        texts = [c.message.content for c in first.choices]
        assert texts == [c.message.content for c in second.choices]
        alone = client.chat.completions.create(**asked)
        assert alone.choices[0].message.content == texts[0]

    def test_chat_logprobs_have_one_entry_for_each_token(
        self, client: openai.OpenAI, model: str
    ) -> None:
        answer = client.chat.completions.create(
            model=model,
            messages=CHAT,
            max_tokens=5,
            logprobs=True,
            top_logprobs=3,
            extra_body={"ignore_eos": True},
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(logprobs.content) == 5
        for entry in logprobs.content:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 3
            ranked = [top.logprob for top in entry.top_logprobs]
            assert ranked == sorted(ranked, reverse=True)

    def test_echo_with_logprobs_scores_the_prompt(self, client: openai.OpenAI, model: str) -> None:
        prompt = "The sky is blue"
        answer = client.completions.create(
            model=model, prompt=prompt, echo=True, logprobs=2, max_tokens=0
        )
        choice = answer.choices[0]
        assert choice.text == prompt
        assert choice.finish_reason == "length"
        scores = choice.logprobs
        assert scores is not None
        assert answer.usage is not None
        num_tokens = answer.usage.prompt_tokens
        assert answer.usage.completion_tokens == 0
        assert scores.token_logprobs is not None
        assert scores.top_logprobs is not None
        assert len(scores.token_logprobs) == len(scores.tokens or ()) == num_tokens
        assert scores.token_logprobs[0] is None
        assert all(score <= 0 for score in scores.token_logprobs[1:])
        assert scores.top_logprobs[0] is None
        assert all(2 <= len(top) <= 3 for top in scores.top_logprobs[1:])

    def test_prompts_as_token_ids_are_the_same_as_text(
        self, client: openai.OpenAI, model: str
    ) -> None:
        asked: dict[str, Any] = {"model": model, "max_tokens": 5, "temperature": 0}
        text = client.completions.create(
            prompt="The sky is", extra_body={"return_token_ids": True}, **asked
        )
        ids = text.choices[0].model_dump()["prompt_token_ids"]
        again = client.completions.create(prompt=ids, **asked)
        assert again.choices[0].text == text.choices[0].text

    def test_unknown_models_are_not_found_and_the_known_are_named(
        self, client: openai.OpenAI, model: str
    ) -> None:
        with pytest.raises(openai.NotFoundError, match=model) as caught:
            client.completions.create(model="no-such-model", prompt="x")
        assert caught.value.code == "model_not_found"

    def test_bad_requests_say_what_is_wrong_and_the_next_one_works(
        self, client: openai.OpenAI, model: str
    ) -> None:
        bad: list[tuple[dict[str, Any], str]] = [
            ({"temperature": -1}, "temperature"),
            ({"max_tokens": -1}, "max_tokens"),
            ({"max_tokens": 10**9}, "max_tokens"),
            ({"prompt": [10**9]}, "vocabulary"),
            ({"prompt": []}, "empty"),
            ({"extra_body": {"nonsense": 1}}, "unknown field 'nonsense'"),
            ({"suffix": "x"}, "suffix is not supported"),
        ]
        for fields, message in bad:
            with pytest.raises(openai.BadRequestError, match=message):
                client.completions.create(**{"model": model, "prompt": "x", **fields})
            client.completions.create(model=model, prompt="x", max_tokens=1)

    def test_many_concurrent_streams_each_get_their_own_answer(
        self, base_url: str, model: str, adapter: str
    ) -> None:
        names = [model, adapter]

        async def stream_one(client: openai.AsyncOpenAI, i: int) -> tuple[str, str | None]:
            stream = await client.completions.create(
                model=names[i % 2],
                prompt=f"item {i}",
                max_tokens=11,
                temperature=0,
                stream=True,
            )
            text, reason = "", None
            async for chunk in stream:
                text += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason or reason
            return text, reason

        async def run() -> list[tuple[str, str | None]]:
            async with async_openai_client(base_url) as client:
                streams = [stream_one(client, i) for i in range(NUM_CONCURRENT)]
                return list(await asyncio.gather(*streams))

        answers = asyncio.run(run())
        assert all(reason in ("stop", "length") for _, reason in answers)
        with openai_client(base_url) as client:
            for i in (0, 1, 33, NUM_CONCURRENT - 1):
                alone = client.completions.create(
                    model=names[i % 2], prompt=f"item {i}", max_tokens=11, temperature=0
                )
                assert alone.choices[0].text == answers[i][0]
