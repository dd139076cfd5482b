"""Everything a client can send wrong: one clear error in OpenAI's shape, and the server goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import tiny_tokenizers
from fake_engine import FakeEngine, Script
from server_harness import RunningServer, running_server

TOKENIZER = tiny_tokenizers.byte_level()
VOCABULARY = TOKENIZER.vocab_size
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(TOKENIZER, max_model_len=133)) as server:
        yield server


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def say(content: object, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content, **more}]}


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    # body, param, part of the message
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": []}, "prompt", "prompt is empty"),
    ({"prompt": [[]]}, "prompt", "prompt is empty"),
    ({"prompt": ["a", 1]}, "prompt", "must be a string, a list of strings"),
    ({"prompt": [1.5]}, "prompt", "must be a string, a list of strings"),
    ({"prompt": [True]}, "prompt", "must be a string, a list of strings"),
    ({"prompt": {"a": 1}}, "prompt", "must be a string, a list of strings"),
    ({"prompt": None}, "prompt", "prompt is missing"),
    ({"prompt": ["a"] * 2049}, "prompt", "2,049 prompts; at most 2,048"),
    ({"prompt": ["a"] * 100, "n": 100}, "n", "10,000 choices; at most 2,048"),
    ({"prompt": [VOCABULARY]}, "prompt", f"token id {VOCABULARY:,}; this model's vocabulary has"),
    ({"prompt": [[1], [-1]]}, "prompt", "token id -1"),
    ({"prompt": [2**80]}, "prompt", "token id 1,208,925"),
    ({"prompt": [5] * 134}, "prompt", "prompt has 134 tokens; this model allows 133"),
    ({"prompt": [5] * 133}, "prompt", "prompt has 133 tokens; this model allows 133"),
    (
        {"prompt": [5] * 130, "max_tokens": 7},
        "max_tokens",
        "130 tokens and max_tokens is 7; this model allows 133",
    ),
    ({"model": None}, "model", "model is missing"),
    ({"model": 5}, "model", "model is 5; it should be a valid string"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens is -1; it must be an integer >= 0"),
    ({"max_tokens": "7"}, "max_tokens", "max_tokens is '7'; it should be a valid integer"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5; it should be a valid integer"),
    ({"max_tokens": True}, "max_tokens", "max_tokens is True; it should be a valid integer"),
    ({"max_tokens": 2**70}, "max_tokens", "below 2**63"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "min_tokens is 9 but max_tokens is 3"),
    ({"temperature": -0.1}, "temperature", "temperature is -0.1; it must be a number in [0"),
    ({"temperature": "hot"}, "temperature", "temperature is 'hot'"),
    ({"top_p": 0}, "top_p", "top_p is 0; it must be a number in (0, 1]"),
    ({"top_k": -2}, "top_k", "top_k is -2"),
    ({"presence_penalty": 3}, "presence_penalty", "presence_penalty is 3"),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0"),
    ({"seed": 2**63}, "seed", "seed is 9223372036854775808"),
    ({"n": 0}, "n", "n is 0; it should be greater than or equal to 1"),
    ({"n": 129}, "n", "n is 129; it should be less than or equal to 128"),
    ({"best_of": 3}, "best_of", "best_of is not supported"),
    ({"logprobs": 21}, "logprobs", "logprobs is 21; it must be an integer from 0 to 20"),
    ({"logprobs": True}, "logprobs", "logprobs is True; it should be a valid integer"),
    ({"stop": 5}, "stop", "stop is 5; it should be a valid list"),
    ({"stop": ["a", 5]}, "stop[1]", "stop[1] is 5; it should be a valid string"),
    ({"stop": [""]}, "stop", "non-empty strings"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", "stop_token_ids has token id"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", "logit_bias has token id"),
    ({"logit_bias": {"1_0": 1}}, "logit_bias", "logit_bias has the key '1_0'"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "logit_bias is 101"),
    ({"stream": "yes"}, "stream", "stream is 'yes'; it should be a valid boolean"),
    ({"stream_options": {}}, "stream_options", "stream_options needs stream to be true"),
    (
        {"stream": True, "stream_options": {"foo": 1}},
        "stream_options.foo",
        "unknown field 'stream_options.foo'",
    ),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "cannot be streamed"),
    ({"nonsense": 1}, "nonsense", "unknown field 'nonsense'"),
    ({"messages": []}, "messages", "unknown field 'messages'"),
    ({"suffix": "x"}, "suffix", "suffix is not supported"),
    ({"guided_json": {}}, "guided_json", "guided_json is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    ({"use_beam_search": True}, "use_beam_search", "use_beam_search is not supported"),
]
BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "messages is empty"),
    ({"messages": None}, "messages", "messages is missing"),
    ({"messages": "hi"}, "messages", "messages is 'hi'; it should be a valid list"),
    ({"messages": ["hi"]}, "messages[0]", "messages[0] is 'hi'"),
    ({"messages": [{"content": "x"}]}, "messages", "messages[0].role is None"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "role is 'robot'; it must be"),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0].content must be a string or"),
    (say(5), "messages", "messages[0].content must be a string or"),
    (say([IMAGE]), "messages", "messages[0].content[0] has type 'image_url'; only 'text'"),
    (say(["x"]), "messages", "messages[0].content[0] has type None"),
    (say([{"type": "text"}]), "messages", "messages[0].content[0].text must be a string"),
    (say("x", foo=1), "messages", "unknown field 'messages[0].foo'"),
    (say("x", name=7), "messages", "messages[0].name must be a string"),
    (say("x", tool_calls=[{"id": "1"}]), "messages", "messages[0].tool_calls is not supported"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools here"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"tool_choice": "required"}, "tool_choice", "tool_choice is not supported"),
    ({"functions": [{}]}, "functions", "functions is not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "modalities is not supported"),
    ({"audio": {}}, "audio", "audio is not supported"),
    ({"store": True}, "store", "store is not supported"),
    ({"chat_template": "{{ x }}"}, "chat_template", "chat_template is not supported"),
    ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs", "it must be an integer from 0 to 20"),
    ({"logprobs": 3}, "logprobs", "logprobs is 3; it should be a valid boolean"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "give one of them"),
    ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
    ({"chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs", "may not set 'tokenize'"),
    ({"prompt": "x"}, "prompt", "unknown field 'prompt'"),
    (say("word " * 200), "prompt", "this model allows 133"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_COMPLETIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_completion_is_refused_by_name_and_the_next_one_works(
    server: RunningServer, fields: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    num_requests = len(server.engine.requests)
    body: dict[str, Any] = {"model": "tiny", "prompt": "x", **fields}
    if stream and "stream_options" not in fields:
        body.setdefault("stream", True)
    if fields.get("prompt") == "":
        body["add_special_tokens"] = False
    error = error_of(server.post(COMPLETIONS, body), 400)
    assert message in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert len(server.engine.requests) == num_requests
    server.complete(max_tokens=1)


@pytest.mark.parametrize(("fields", "param", "message"), BAD_CHATS)
def test_a_bad_chat_is_refused_by_name_and_the_next_one_works(
    server: RunningServer, fields: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(server.post(CHAT, {"model": "tiny", **say("hi"), **fields}), 400)
    assert message in error["message"]
    assert error["param"] == param
    server.chat(max_tokens=1)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_not_json_is_refused(server: RunningServer, raw: bytes) -> None:
    for path in (COMPLETIONS, CHAT):
        error = error_of(server.http.post(path, content=raw), 400)
        assert "not valid JSON" in error["message"]
    server.complete(max_tokens=1)


@pytest.mark.parametrize("raw", [b"[]", b"5", b'"x"', b"null"])
def test_a_body_that_is_not_an_object_is_refused(server: RunningServer, raw: bytes) -> None:
    error = error_of(server.http.post(COMPLETIONS, content=raw), 400)
    assert "must be a JSON object" in error["message"]


def test_a_body_beyond_the_limit_is_refused(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraswarm.server.schema.MAX_BODY_BYTES", 133)
    error = error_of(server.post(COMPLETIONS, {"model": "tiny", "prompt": "x" * 133}), 400)
    assert "more than 133 bytes" in error["message"]
    server.complete(max_tokens=1)


def test_inert_values_of_unsupported_fields_are_accepted(server: RunningServer) -> None:
    server.chat(
        max_tokens=1,
        tools=[],
        tool_choice="none",
        functions=None,
        response_format={"type": "text"},
        modalities=["text"],
        audio=None,
        store=False,
        metadata={"a": "b"},
        user="someone",
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        parallel_tool_calls=True,
        logit_bias=None,
        messages=[
            {"role": "user", "content": "x", "name": None},
            {"role": "assistant", "content": "y", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "z", "name": "me"},
        ],
    )
    server.complete(max_tokens=1, suffix=None, best_of=1, use_beam_search=False, length_penalty=1.0)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_unknown_model_is_not_found_and_the_known_are_named(
    server: RunningServer, path: str
) -> None:
    for stream in (False, True):
        body = {"model": "nope", "prompt": "x", "stream": stream}
        if path == CHAT:
            body = {"model": "nope", "stream": stream, **say("x")}
        error = error_of(server.post(path, body), 404)
        assert error["code"] == "model_not_found"
        assert "'nope'" in error["message"]
        assert "known: sql, team/router, tiny" in error["message"]
    error = error_of(server.http.get("/v1/models/nope"), 404)
    assert error["code"] == "model_not_found"


def test_a_refused_adapter_says_why(server: RunningServer) -> None:
    error = error_of(server.post(COMPLETIONS, {"model": "broken", "prompt": "x"}), 422)
    assert "tensor x has 3 dimensions" in error["message"]
    assert error["type"] == "adapter_error"


def test_unknown_paths_and_methods_answer_in_the_same_shape(server: RunningServer) -> None:
    for path in ("/", "/v1/nothing", "/v1/completions/", "/docs", "/openapi.json"):
        assert "GET " + path in error_of(server.http.get(path), 404)["message"]
    response = server.http.get(COMPLETIONS)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_model_without_a_chat_template_says_so() -> None:
    with running_server(FakeEngine(tiny_tokenizers.without_template())) as server:
        error = error_of(server.post(CHAT, {"model": "tiny", **say("hi")}), 400)
        assert "no chat template; use /v1/completions" in error["message"]
        server.complete(max_tokens=1)


def test_tokens_the_model_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(TOKENIZER)
    small = engine.info.__class__(**{**_fields(engine.info), "vocab_size": 7})
    monkeypatch.setattr(FakeEngine, "info", small)
    with running_server(engine) as server:
        error = error_of(server.post(COMPLETIONS, {"model": "tiny", "prompt": "hello"}), 400)
        assert "vocabulary has 7 tokens" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_own_status(stream: bool) -> None:
    with running_server(FakeEngine(TOKENIZER, fail_after=0)) as server:
        for n in (1, 3):
            body = {"model": "tiny", "prompt": "x", "stream": stream, "n": n}
            error = error_of(server.post(COMPLETIONS, body), 500)
            assert error["message"] == "the fake engine failed this request"
            assert error["type"] == "engine_error"
        server.call(server.wait_until_idle())


def test_a_failure_on_the_way_is_no_half_answer() -> None:
    with running_server(FakeEngine(TOKENIZER, fail_after=3)) as server:
        body = {"model": "tiny", "prompt": "Hello there, how are you?"}
        error_of(server.post(COMPLETIONS, body), 500)


def test_a_bug_of_ours_is_a_500_in_the_same_shape() -> None:
    def broken(*_: object) -> list[int]:
        raise ZeroDivisionError

    with running_server(FakeEngine(TOKENIZER, Script(broken))) as server:
        error = error_of(server.post(COMPLETIONS, {"model": "tiny", "prompt": "x"}), 500)
        assert error["type"] == "internal_error"
        assert "ZeroDivisionError" in error["message"]


def _fields(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__dataclass_fields__}
