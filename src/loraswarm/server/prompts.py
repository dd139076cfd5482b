"""Prompts to token ids: plain ones of completions, chats by the model's template.

Long texts are encoded in a thread, so that other streams go on. Used by the endpoints.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraswarm.errors import InvalidRequest
from loraswarm.server.schema import ChatBody, CompletionBody
from loraswarm.text.detokenizer import Detokenizer
from loraswarm.text.tokenizer import Tokenizer, check_token_ids

MAX_PROMPTS = 2048
LONG_TEXT_CHARACTERS = 20_000
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = frozenset(
    {
        "role",
        "content",
        "name",
        "tool_call_id",
        "reasoning",
        "reasoning_content",
    }
)
UNSUPPORTED_MESSAGE_FIELDS = frozenset({"tool_calls", "function_call", "audio"})
IGNORED_MESSAGE_FIELDS = frozenset({"refusal", "annotations"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the text they stand for, and where in it each begins (for `echo`)."""

    token_ids: tuple[int, ...]
    text: str = ""
    starts: tuple[int, ...] = ()


async def completion_prompts(
    body: CompletionBody, tokenizer: Tokenizer, vocab_size: int
) -> list[Prompt]:
    """The prompts of a completions body: text or token ids, one or a list.

    Raises   InvalidRequest if the form is wrong or an id is not in the vocabulary.
    """
    items = _prompt_items(body.prompt)
    for item in items:
        if not isinstance(item, str):
            check_token_ids(item, vocab_size, "prompt")
    num_characters = sum(len(item) for item in items)
    if num_characters < LONG_TEXT_CHARACTERS:
        return [_encode(item, body, tokenizer) for item in items]
    return await asyncio.to_thread(lambda: [_encode(item, body, tokenizer) for item in items])


async def chat_prompt(body: ChatBody, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a chat by the model's own template."""
    if body.add_generation_prompt and body.continue_final_message:
        raise InvalidRequest(
            "continue_final_message needs add_generation_prompt to be false",
            "continue_final_message",
        )
    text = tokenizer.render_chat(
        parse_messages(body.messages),
        body.add_generation_prompt,
        body.continue_final_message,
        body.chat_template_kwargs,
    )
    if len(text) < LONG_TEXT_CHARACTERS:
        return Prompt(tuple(tokenizer.encode(text, body.add_special_tokens)))
    return Prompt(tuple(await asyncio.to_thread(tokenizer.encode, text, body.add_special_tokens)))


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages with plain text content, as chat templates take them.

    Raises   InvalidRequest naming the message and the part.
    """
    if not messages:
        raise InvalidRequest("messages is empty; give at least one", "messages")
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _prompt_items(prompt: Any) -> list[str] | list[list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and not _is_ids(prompt):
        raise InvalidRequest(
            f"prompt has {len(prompt):,} prompts; at most {MAX_PROMPTS:,} go in one request",
            "prompt",
        )
    if prompt in ([], ""):
        raise InvalidRequest("prompt is empty", "prompt")
    if isinstance(prompt, list):
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if _is_ids(prompt):
            return [prompt]
        if all(_is_ids(item) for item in prompt):
            return prompt
    raise InvalidRequest(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists",
        "prompt",
    )


def _is_ids(item: Any) -> bool:
    return isinstance(item, list) and all(type(token_id) is int for token_id in item)


def _encode(item: str | list[int], body: CompletionBody, tokenizer: Tokenizer) -> Prompt:
    if isinstance(item, str):
        token_ids, starts = tokenizer.encode_with_starts(item, body.add_special_tokens)
        return Prompt(tuple(token_ids), item, tuple(starts))
    if not body.echo:
        return Prompt(tuple(item))
    detokenizer = Detokenizer(tokenizer, (), body.skip_special_tokens)
    starts = []
    text = ""
    for token_id in item:
        starts.append(len(text))
        text += detokenizer.push(token_id)
    return Prompt(tuple(item), text + detokenizer.flush(), tuple(starts))


def _parse_message(message: Mapping[str, Any], path: str) -> dict[str, str]:
    parsed: dict[str, str] = {}
    for name, value in message.items():
        if value is None or value == [] or name in IGNORED_MESSAGE_FIELDS:
            continue
        if name in UNSUPPORTED_MESSAGE_FIELDS:
            raise InvalidRequest(f"{path}.{name} is not supported", "messages")
        if name not in MESSAGE_FIELDS:
            raise InvalidRequest(f"unknown field '{path}.{name}'", "messages")
        if name != "content" and not isinstance(value, str):
            raise InvalidRequest(f"{path}.{name} must be a string", "messages")
        parsed[name] = value
    if parsed.get("role") not in ROLES:
        raise InvalidRequest(
            f"{path}.role is {parsed.get('role')!r}; it must be one of {', '.join(ROLES)}",
            "messages",
        )
    parsed["content"] = _parse_content(message.get("content"), f"{path}.content")
    return parsed


def _parse_content(content: Any, path: str) -> str:
    """A string, or the text parts of a list, a line each."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{path} must be a string or a list of text parts", "messages")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise InvalidRequest(
                f"{path}[{i}] has type {kind!r}; only 'text' is supported", "messages"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{path}[{i}].text must be a string", "messages")
        texts.append(part["text"])
    return "\n".join(texts)
