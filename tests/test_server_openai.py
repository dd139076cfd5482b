"""The OpenAI endpoints over a scripted engine: the contract, and what exactly is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import tiny_tokenizers
from fake_engine import FakeEngine, Script
from loraswarm.server.sampling import choice_seed
from openai_contract import OpenAIContract
from server_harness import RunningServer, openai_client, running_server

TOKENIZER = tiny_tokenizers.byte_level()


@pytest.fixture(scope="module")
def echo_server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(TOKENIZER)) as server:
        yield server


@pytest.fixture(scope="module")
def stop_server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(TOKENIZER, Script.text("Hello STOP 你好 END"))) as server:
        yield server


class TestOpenAIClientWithAFakeEngine(OpenAIContract):
    @pytest.fixture
    def base_url(self, echo_server: RunningServer) -> str:
        return echo_server.base_url

    @pytest.fixture
    def model(self) -> str:
        return "tiny"

    @pytest.fixture
    def adapter(self) -> str:
        return "team/router"


def events_of(server: RunningServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON of every event but the final [DONE]."""
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def last_request(server: RunningServer) -> Any:
    return server.engine.requests[-1]


def test_model_chooses_the_adapter_and_is_named_in_the_answer() -> None:
    with running_server(FakeEngine(TOKENIZER, Script.named())) as server:
        for model, adapter in (("tiny", "base"), ("sql", "sql"), ("team/router", "team/router")):
            answer = server.complete(model=model, max_tokens=100)
            assert answer["model"] == model
            assert answer["choices"][0]["text"] == f"I am {adapter}."
            assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_stop_string_across_tokens_ends_the_text(stop_server: RunningServer) -> None:
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 50, "stop": ["END", "STOP"]}
    choice = stop_server.complete(**asked)["choices"][0]
    assert choice["text"] == "Hello "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")
    chunks = events_of(stop_server, "/v1/completions", asked)
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Hello "
    assert chunks[-1]["choices"][0]["stop_reason"] == "STOP"
    kept = stop_server.complete(**asked, include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == "Hello STOP"
    assert stop_server.complete(**asked, min_tokens=12)["choices"][0]["text"] != "Hello "


def test_one_stop_string_may_be_given_without_a_list(stop_server: RunningServer) -> None:
    choice = stop_server.chat(stop="STOP")["choices"][0]
    assert choice["message"]["content"] == "Hello "


def test_a_stop_string_ends_the_work_of_the_engine(stop_server: RunningServer) -> None:
    num_aborted = len(stop_server.engine.aborted)
    stop_server.complete(stop="STOP", max_tokens=50)
    stop_server.call(stop_server.wait_until_idle())
    assert len(stop_server.engine.aborted) == num_aborted + 1


def test_a_stop_token_is_counted_but_not_part_of_the_text(stop_server: RunningServer) -> None:
    ids = TOKENIZER.encode("Hello STOP 你好 END", add_special_tokens=False)
    answer = stop_server.complete(stop_token_ids=[ids[3]], max_tokens=50, return_token_ids=True)
    choice = answer["choices"][0]
    assert choice["text"] == TOKENIZER.decode(ids[:3])
    assert choice["token_ids"] == ids[:4]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[3])
    assert answer["usage"]["completion_tokens"] == 4


def test_characters_of_several_tokens_are_streamed_whole(stop_server: RunningServer) -> None:
    chunks = events_of(
        stop_server, "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 50}
    )
    texts = [c["choices"][0]["text"] for c in chunks]
    assert "".join(texts) == "Hello STOP 你好 END"
    assert not any("\ufffd" in text for text in texts)


def test_every_field_of_sampling_reaches_the_engine(echo_server: RunningServer) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.1,
        "seed": 11,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    echo_server.complete(
        **fields, stop=["a", "b"], stop_token_ids=[9], logit_bias={"3": -100, "4": 1.5}
    )
    params = last_request(echo_server).params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (9,))
    assert params.logit_bias == {3: -100, 4: 1.5}


def test_defaults_are_those_of_openai(echo_server: RunningServer) -> None:
    echo_server.complete(temperature=None, stop=None, user="someone", n=None)
    params = last_request(echo_server).params
    assert (params.max_tokens, params.temperature, params.stop) == (16, 1.0, ())
    assert (params.logprobs, params.prompt_logprobs, params.seed) == (None, None, None)
    echo_server.chat()
    assert last_request(echo_server).params.max_tokens is None


def test_the_chat_template_makes_the_prompt(echo_server: RunningServer) -> None:
    messages = [
        {"role": "developer", "content": "be kind", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    echo_server.chat(messages=messages, chat_template_kwargs={"tone": "calm"}, max_tokens=1)
    text = TOKENIZER.decode(last_request(echo_server).prompt_token_ids, skip_special_tokens=False)
    assert text == ("<|begin|><|user|>system:be kind<|end|><|user|>user:a\nb<|end|>assistant:calm")


def test_a_final_message_is_continued(echo_server: RunningServer) -> None:
    messages = [{"role": "assistant", "content": "Well,"}]
    echo_server.chat(
        messages=messages, add_generation_prompt=False, continue_final_message=True, max_tokens=1
    )
    text = TOKENIZER.decode(last_request(echo_server).prompt_token_ids)
    assert text.endswith("assistant:Well,")


def test_choices_are_numbered_prompt_by_prompt(echo_server: RunningServer) -> None:
    answer = echo_server.complete(prompt=["alpha", "beta"], n=2, max_tokens=50, seed=5)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["alpha", "alpha", "beta", "beta"]
    requests = {r.request_id: r for r in echo_server.engine.requests[-4:]}
    seeds = [requests[f"{answer['id']}-{i}"].params.seed for i in range(4)]
    assert seeds == [5, choice_seed(5, 1), 5, choice_seed(5, 1)]
    num_prompt = len(TOKENIZER.encode("alpha")) + len(TOKENIZER.encode("beta"))
    assert answer["usage"]["prompt_tokens"] == num_prompt


def test_derived_seeds_differ_and_fit() -> None:
    seeds = [choice_seed(5, i) for i in range(133)]
    assert len(set(seeds)) == 133
    assert all(seed is not None and -(2**63) <= seed < 2**63 for seed in seeds)
    assert choice_seed(None, 3) is None


def test_several_choices_stream_side_by_side(echo_server: RunningServer) -> None:
    chunks = events_of(
        echo_server,
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 3},
    )
    texts = ["", "", ""]
    roles = [0, 0, 0]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles[choice["index"]] += "role" in choice["delta"]
    assert roles == [1, 1, 1]
    assert texts[0] == texts[1] == texts[2] != ""


def test_usage_is_sent_when_asked_and_only_then(echo_server: RunningServer) -> None:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 3}
    assert not any("usage" in c for c in events_of(echo_server, "/v1/completions", asked))
    usage = {"stream_options": {"include_usage": True}}
    *chunks, last = events_of(echo_server, "/v1/completions", {**asked, **usage})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    usage["stream_options"]["continuous_usage_stats"] = True
    *chunks, last = events_of(echo_server, "/v1/completions", {**asked, **usage})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]


def test_echo_comes_before_the_answer_with_offsets_into_both(echo_server: RunningServer) -> None:
    prompt = "Hello 你好 world"
    prompt_ids = TOKENIZER.encode(prompt)
    asked = {"model": "tiny", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 9}
    answer = echo_server.complete(**asked)
    choice = answer["choices"][0]
    assert choice["text"].startswith(prompt)
    assert len(choice["text"]) > len(prompt)
    scores = choice["logprobs"]
    assert (
        len(scores["tokens"])
        == len(scores["text_offset"])
        == (len(prompt_ids) + answer["usage"]["completion_tokens"])
    )
    assert scores["token_logprobs"][0] is None
    assert scores["text_offset"][len(prompt_ids)] == len(prompt)
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        if "\ufffd" not in token and not token.startswith("<|"):
            assert choice["text"][offset:].startswith(token)
    chunks = events_of(echo_server, "/v1/completions", asked)
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    offsets = [offset for c in chunks for offset in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == scores["text_offset"]


def test_echo_of_token_ids_is_their_text(echo_server: RunningServer) -> None:
    ids = TOKENIZER.encode("Hello 你好", add_special_tokens=False)
    answer = echo_server.complete(prompt=ids, echo=True, max_tokens=0, logprobs=0)
    choice = answer["choices"][0]
    assert choice["text"] == "Hello 你好"
    assert len(choice["logprobs"]["text_offset"]) == len(ids)
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_have_the_shape_of_vllm(echo_server: RunningServer) -> None:
    choice = echo_server.complete(prompt_logprobs=2, max_tokens=1)["choices"][0]
    ids = TOKENIZER.encode("hello")
    assert choice["prompt_logprobs"][0] is None
    assert choice["logprobs"] is None
    entry = choice["prompt_logprobs"][1][str(ids[1])]
    assert entry == {
        "logprob": -0.25,
        "rank": 1,
        "decoded_token": TOKENIZER.token_text(ids[1]),
    }
    assert len(echo_server.chat(prompt_logprobs=0, max_tokens=1)["prompt_logprobs"][1]) == 1


def test_chat_logprobs_carry_the_bytes_of_each_token(stop_server: RunningServer) -> None:
    choice = stop_server.chat(logprobs=True, top_logprobs=2, max_tokens=50)["choices"][0]
    content = choice["logprobs"]["content"]
    data = bytes(byte for entry in content[:-1] for byte in entry["bytes"])
    assert data.decode() == "Hello STOP 你好 END" == choice["message"]["content"]
    assert len(content[0]["top_logprobs"]) == 2


def test_token_ids_are_returned_when_asked(echo_server: RunningServer) -> None:
    ids = TOKENIZER.encode("hello")
    choice = echo_server.complete(max_tokens=2, return_token_ids=True)["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, ids[:2])
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "return_token_ids": True}
    chunks = [c["choices"][0] for c in events_of(echo_server, "/v1/completions", asked)]
    assert chunks[0]["prompt_token_ids"] == ids
    assert [token_id for c in chunks for token_id in c["token_ids"]] == ids[:2]
    assert "token_ids" not in echo_server.complete()["choices"][0]
    chat = echo_server.chat(max_tokens=2, return_token_ids=True)
    assert chat["choices"][0]["token_ids"] == chat["prompt_token_ids"][:2]


def test_a_long_prompt_is_encoded_as_a_short_one_is() -> None:
    text = "hello world " * 4000
    with running_server(FakeEngine(TOKENIZER, max_model_len=100_000)) as server:
        assert server.complete(prompt=text)["usage"]["prompt_tokens"] == len(TOKENIZER.encode(text))


def test_models_show_path_parent_and_length(echo_server: RunningServer) -> None:
    models = echo_server.http.get("/v1/models").json()
    assert models["object"] == "list"
    base, *adapters = models["data"]
    assert (base["id"], base["root"], base["parent"]) == ("tiny", "/models/tiny", None)
    assert [a["id"] for a in adapters] == ["sql", "team/router"]  # the refused one is not served
    assert {a["parent"] for a in adapters} == {"tiny"}
    assert base["max_model_len"] == echo_server.engine.max_model_len
    one = echo_server.http.get("/v1/models/team/router").json()
    assert one == adapters[1]


def test_the_version_is_told(echo_server: RunningServer) -> None:
    assert echo_server.http.get("/version").json()["version"]


def test_requests_without_the_api_key_are_refused() -> None:
    with running_server(FakeEngine(TOKENIZER), api_key="secret") as server:
        with openai_client(server.base_url, "secret") as client:
            assert client.models.list().data[0].id == "tiny"
        for key in ("wrong", "secret2", "sécret"):
            response = server.http.get(
                "/v1/models", headers={b"Authorization": f"Bearer {key}".encode()}
            )
            assert response.status_code == 401
        with (
            openai_client(server.base_url, "wrong") as client,
            pytest.raises(openai.AuthenticationError, match="API key") as caught,
        ):
            client.completions.create(model="tiny", prompt="x")
        assert caught.value.code == "invalid_api_key"
        assert server.engine.requests == []
        for path in ("/health", "/v1/health/live", "/v1/health/ready", "/version"):
            assert server.http.get(path).status_code == 200
