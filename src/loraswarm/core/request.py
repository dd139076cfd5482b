"""What a user asked for: token ids in, limits and sampling choices, the adapter by name.

Knows nothing about text, HTTP or scheduling. Built by server and LLM, read by the engine.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraswarm.errors import InvalidRequest

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MIN_TEMPERATURE = 1e-5
MAX_INT = 2**63 - 1
MAX_MIXED_ADAPTERS = 16
MAX_ADAPTER_WEIGHT = 100.0
MAX_SHOWN_NAME = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. Names are those of vLLM and OpenAI.

    `max_tokens=None` generates until the model's context is full. `logprobs=n` reports each chosen
    token's log-probability and the n most likely alternatives, taken from the model's own
    distribution before penalties, bias and temperature; `prompt_logprobs=n` does so for the prompt.
    `temperature` below 1e-5 is greedy. `seed=None` lets the engine draw one.

    Raises    InvalidRequest naming the field, its value and what is allowed.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, 0, MAX_INT, optional=True)
        _require_int("min_tokens", self.min_tokens, 0, MAX_INT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens} but max_tokens is {self.max_tokens}", "min_tokens"
            )
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_int("top_k", self.top_k, -1, MAX_INT)
        _require_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _require_int("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS, optional=True)
        _require_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS, optional=True)
        _require_int("seed", self.seed, -MAX_INT - 1, MAX_INT, optional=True)
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, low=0)
        for token_id, bias in self.logit_bias.items():
            _require_int("logit_bias", token_id, low=0)
            _require_number("logit_bias", bias, -100.0, 100.0)
        if isinstance(self.stop, str):
            raise InvalidRequest("stop must be a sequence of strings, not one string", "stop")
        if len(self.stop) > MAX_STOP_STRINGS or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise InvalidRequest(
                f"stop takes at most {MAX_STOP_STRINGS} non-empty strings, got {len(self.stop)}",
                "stop",
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def uses_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt for the base model, for one adapter, or for a weighted sum of several.

    `adapter` names one; `adapters` are (name, weight) pairs whose updates are added, each times its
    weight, as PEFT's add_weighted_adapter does with combination_type "cat" (but for a first adapter
    with rsLoRA, whose square root of the rank PEFT applies to the sum again). At most one of the
    two is given. Identified by `request_id`.

    Raises    InvalidRequest naming the field, its value and what is allowed.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapter: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    arrival_s: float = 0.0

    def __post_init__(self) -> None:
        check_adapters(self.adapters)
        if self.adapters and self.adapter is not None:
            raise InvalidRequest(
                f"the request names adapter {self.adapter!r} and a list of adapters; name the base"
                " model to combine those of the list",
                "adapters",
            )

    @property
    def weighted_adapters(self) -> tuple[tuple[str, float], ...]:
        """The adapters of the request with their weights; empty for the base model."""
        return ((self.adapter, 1.0),) if self.adapter is not None else self.adapters


def check_adapters(adapters: tuple[tuple[str, float], ...]) -> None:
    """Raise InvalidRequest unless names differ, weights are numbers, and there are not too many."""
    if len(adapters) > MAX_MIXED_ADAPTERS:
        raise InvalidRequest(
            f"adapters has {len(adapters)} entries; at most {MAX_MIXED_ADAPTERS} can be combined",
            "adapters",
        )
    names = [name for name, _ in adapters]
    for name, weight in adapters:
        if not isinstance(name, str):
            raise InvalidRequest(f"adapters has the name {name!r}; it must be a text", "adapters")
        if names.count(name) > 1:
            raise InvalidRequest(f"adapters names {name!r} twice; add up its weights", "adapters")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not abs(weight) <= MAX_ADAPTER_WEIGHT:
            raise InvalidRequest(
                f"adapters gives {name[:MAX_SHOWN_NAME]!r} the weight {reprlib.repr(weight)}; it"
                f" must be a number from -{MAX_ADAPTER_WEIGHT:g} to {MAX_ADAPTER_WEIGHT:g}",
                "adapters",
            )


def check_context(num_prompt: int, max_tokens: int | None, max_model_len: int) -> None:
    """Raise InvalidRequest, with both numbers, if prompt and answer exceed the model's context."""
    if num_prompt > max_model_len or (num_prompt == max_model_len and max_tokens != 0):
        raise InvalidRequest(
            f"prompt has {num_prompt:,} tokens; this model allows {max_model_len:,} "
            "for prompt and answer together (--max-model-len)",
            "prompt",
        )
    if max_tokens is not None and num_prompt + max_tokens > max_model_len:
        raise InvalidRequest(
            f"prompt has {num_prompt:,} tokens and max_tokens is {max_tokens:,}; this model allows "
            f"{max_model_len:,} in all (--max-model-len)",
            "max_tokens",
        )


def _require_int(
    name: str, value: object, low: int, high: int | None = None, optional: bool = False
) -> None:
    if value is None and optional:
        return
    allowed = f"an integer from {low} to {high}"
    if high is None or high == MAX_INT:
        allowed = f"an integer >= {low}" + (" and below 2**63" if high else "")
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r}; it must be {allowed}", name)
    if value < low or (high is not None and value > high):
        raise InvalidRequest(f"{name} is {value}; it must be {allowed}", name)


def _require_number(
    name: str, value: object, low: float, high: float, open_low: bool = False
) -> None:
    bracket = "(" if open_low else "["
    allowed = f"a number in {bracket}{low:g}, {high:g}]"
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not low <= value <= high
        or (open_low and value == low)
    ):
        shown = f"{value:g}" if isinstance(value, float) else reprlib.repr(value)
        raise InvalidRequest(f"{name} is {shown}; it must be {allowed}", name)
