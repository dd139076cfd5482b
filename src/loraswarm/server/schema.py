"""The JSON bodies: every field named, typed, and refused if unknown.

Ranges are checked by SamplingParams, what refers to the model by prompts and choices.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from loraswarm.errors import InvalidRequest
from loraswarm.server.fields import drop_inert_fields

MAX_BODY_BYTES = 64 << 20
MAX_SHOWN_CHARACTERS = 80
Body = TypeVar("Body", bound="StrictBody")
Generation = TypeVar("Generation", bound="GenerationBody")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StrictBody(BaseModel):
    """Takes no unknown field and turns no value into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(StrictBody):
    """`include_obfuscation` asks for padding against eavesdroppers; there is none to turn off."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class AdapterEntry(StrictBody):
    """One adapter of a weighted sum."""

    name: str
    weight: float = 1.0


class GenerationBody(StrictBody):
    """What both endpoints accept. A field left at None takes the default of SamplingParams."""

    model: str
    adapters: list[AdapterEntry] = []
    n: Annotated[int, Field(ge=1, le=128)] = 1
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list)] = []
    logit_bias: dict[str, float] = {}
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    return_token_ids: bool = False

    def weighted_adapters(self) -> list[tuple[str, float]]:
        """(name, weight) of each entry of `adapters`."""
        return [(entry.name, entry.weight) for entry in self.adapters]

    @property
    def includes_usage(self) -> bool:
        """Does the stream end with the counts?"""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_continuously(self) -> bool:
        """Does every chunk carry the counts so far?"""
        return self.includes_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: Any
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    add_special_tokens: bool = False


async def read_generation(request: Request, model: type[Generation]) -> Generation:
    """The checked body of a request for text.

    Raises   InvalidRequest naming the field and its value.
    """
    body = await read_body(request, model)
    if body.best_of is not None and body.best_of != body.n:
        raise InvalidRequest(
            f"best_of is {body.best_of} and n is {body.n}; best_of is not supported, leave it out",
            "best_of",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true", "stream_options")
    return body


async def read_body(request: Request, model: type[Body]) -> Body:
    """The body of `request`, a JSON object.

    Raises   InvalidRequest naming the field and its value.
    """
    return parse_body(await read_bytes(request), model)


def parse_body(raw: bytes, model: type[Body]) -> Body:
    """Decode and check the JSON object `raw`."""
    try:
        decoded = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise InvalidRequest(f"the body must be a JSON object; got {_shown(decoded)}")
    try:
        return model.model_validate(drop_inert_fields(decoded))
    except ValidationError as error:
        raise _invalid(error) from None


async def read_bytes(request: Request) -> bytes:
    """The whole body. Raises InvalidRequest beyond MAX_BODY_BYTES."""
    parts = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > MAX_BODY_BYTES:
            raise InvalidRequest(f"the body has more than {MAX_BODY_BYTES:,} bytes")
        parts.append(part)
    return b"".join(parts)


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first thing wrong, in our words."""
    details = error.errors(include_url=False)[0]
    param = _path(details["loc"])
    kind = details["type"]
    if kind == "extra_forbidden":
        return InvalidRequest(f"unknown field {param!r}", param)
    if kind == "missing":
        return InvalidRequest(f"{param} is missing", param)
    rule = details["msg"].removeprefix("Input ")
    return InvalidRequest(f"{param} is {_shown(details['input'])}; it {rule}", param)


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as messages[0].role."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")


def _shown(value: object) -> str:
    text = repr(value)
    cut = len(text) > MAX_SHOWN_CHARACTERS
    return text[:MAX_SHOWN_CHARACTERS] + "..." if cut else text
