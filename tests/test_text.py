"""Tokenizer, stop strings, and the text of a request from its events."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import tiny_tokenizers
from fake_engine import FakeEngine, Script
from loraswarm.core.events import ErrorInfo, SequenceEvent, TokenLogprob
from loraswarm.core.request import Request, SamplingParams
from loraswarm.errors import ConfigError, InvalidRequest
from loraswarm.text.generation import TextDelta, TextStream, stream_text
from loraswarm.text.stop_strings import StopStrings
from loraswarm.text.tokenizer import Tokenizer, check_token_ids

BYTE_LEVEL = tiny_tokenizers.byte_level()
BYTE_FALLBACK = tiny_tokenizers.byte_fallback()
TEXTS = [
    "",
    "a",
    "Hello world!",
    "你好, 世界 🙂🚀 ça va",
    "tabs\tand\n\nlines  and   spaces ",
    "literal \ufffd stays",
    "<|user|>special<|end|>",
]


def byte_ids(data: bytes) -> list[int]:
    """Ids of the tokens of `BYTE_LEVEL` that are one byte each."""
    table = {BYTE_LEVEL.token_bytes(i): i for i in reversed(range(BYTE_LEVEL.vocab_size))}
    return [table[bytes([byte])] for byte in data]


def test_a_saved_tokenizer_loads_and_encodes_as_transformers_does(tmp_path: Path) -> None:
    tiny_tokenizers.save_byte_level(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    official = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == official.encode(text)
        assert tokenizer.encode(text, False) == official.encode(text, add_special_tokens=False)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(chat) == official.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_applied(tmp_path: Path) -> None:
    backend = tiny_tokenizers.Backend.from_str(tiny_tokenizers.byte_level_backend().to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tiny_tokenizers._wrap(backend, None).save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    text = "The quick brown fox jumps over the lazy dog"
    assert tokenizer.encode(text) == BYTE_LEVEL.encode(text)


@pytest.mark.parametrize("config", [None, '{"model_type": "qwen2"}'])
def test_a_directory_without_tokenizer_files_is_a_config_error(
    tmp_path: Path, config: str | None
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"no tokenizer in .*tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_broken_tokenizer_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_starts_say_where_each_token_begins() -> None:
    text = "Hello world 你好"
    token_ids, starts = BYTE_LEVEL.encode_with_starts(text)
    assert token_ids == BYTE_LEVEL.encode(text)
    assert starts[0] == starts[1] == 0  # the added token has no place of its own
    assert starts == sorted(starts)
    hello = BYTE_LEVEL.encode("Hello", add_special_tokens=False)
    assert starts[1 + len(hello)] == len("Hello")


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        BYTE_LEVEL.encode("a\ud800")


def test_token_text_keeps_the_leading_space_that_decoding_alone_drops() -> None:
    hello = BYTE_FALLBACK.encode("hello", add_special_tokens=False)[0]
    assert BYTE_FALLBACK.decode([hello]) == "hello"
    assert BYTE_FALLBACK.token_text(hello) == " hello"
    assert BYTE_FALLBACK.token_text(2) == "</s>"
    assert BYTE_LEVEL.token_text(10_000) == ""


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_joined_are_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert b"".join(BYTE_LEVEL.token_bytes(i) for i in ids) == text.encode()


def test_byte_fallback_tokens_are_one_byte() -> None:
    ids = BYTE_FALLBACK.encode("hello 你", add_special_tokens=False)
    assert b"".join(BYTE_FALLBACK.token_bytes(i) for i in ids) == " hello 你".encode()


def test_ids_outside_the_vocabulary_are_refused_by_name() -> None:
    check_token_ids([], 7, "prompt")
    check_token_ids([0, 6], 7, "prompt")
    for wrong in (7, -1, 2**70):
        with pytest.raises(InvalidRequest, match=rf"prompt has token id {wrong:,}; .* 7 tokens"):
            check_token_ids([3, wrong], 7, "prompt")


def test_chat_without_a_template_is_refused_with_a_way_out() -> None:
    with pytest.raises(InvalidRequest, match="no chat template; use /v1/completions"):
        tiny_tokenizers.without_template().render_chat([{"role": "user", "content": "hi"}])


def test_an_error_raised_by_the_template_is_the_users() -> None:
    with pytest.raises(InvalidRequest, match="refuses these messages: no tools here"):
        BYTE_LEVEL.render_chat([{"role": "tool", "content": "42"}])
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        BYTE_LEVEL.render_chat([{"role": "user"}])


def test_template_arguments_reach_the_template_but_not_the_renderer() -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert BYTE_LEVEL.render_chat(chat, template_arguments={"tone": "kind"}).endswith(":kind")
    with pytest.raises(InvalidRequest, match="may not set 'tokenize'"):
        BYTE_LEVEL.render_chat(chat, template_arguments={"tokenize": True})


def test_developer_is_system_to_a_template_that_does_not_know_it() -> None:
    developer, system = ([{"role": r, "content": "be brief"}] for r in ("developer", "system"))
    assert BYTE_LEVEL.render_chat(developer) == BYTE_LEVEL.render_chat(system)


def test_a_final_message_can_be_continued() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    text = BYTE_LEVEL.render_chat(chat, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("assistant:Well,")


def cut(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        size = rng.randint(1, 4)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def run_stops(stops: StopStrings, pieces: Sequence[str]) -> tuple[str, str | None]:
    output = ""
    for piece in pieces:
        text, stop = stops.push(piece)
        output += text
        if stop is not None:
            return output, stop
    return output + stops.flush(), None


@pytest.mark.parametrize("include", [False, True])
def test_the_result_does_not_depend_on_how_the_text_is_cut(include: bool) -> None:
    rng = random.Random(3)
    for _ in range(500):
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        whole = run_stops(StopStrings(stops, include), list(text))
        assert run_stops(StopStrings(stops, include), [text]) == whole
        assert run_stops(StopStrings(stops, include), cut(text, rng)) == whole
        assert (whole[1] is not None) == any(stop in text for stop in stops)


def test_text_is_held_only_while_it_may_become_a_stop_string() -> None:
    stops = StopStrings(["END"])
    assert stops.push("tE") == ("t", None)
    assert stops.push("N") == ("", None)
    assert stops.push("x") == ("ENx", None)
    assert stops.push("EEN") == ("E", None)
    assert stops.push("D after") == ("", "END")


def test_a_stop_string_that_ended_before_it_was_allowed_does_not_count() -> None:
    stops = StopStrings(["ab", "abc"])
    assert stops.push("ab", may_stop=False) == ("", None)
    assert stops.push("x", may_stop=True) == ("abx", None)
    assert stops.push("ab", may_stop=False) == ("", None)
    assert stops.push("c", may_stop=True) == ("", "abc")


def event_of(ids: Sequence[int], **more: object) -> SequenceEvent:
    return SequenceEvent(request_id="r", token_ids=tuple(ids), **more)  # type: ignore[arg-type]


def run_stream(
    params: SamplingParams, events: Sequence[SequenceEvent], prompt: tuple[int, ...] = (5,)
) -> list[TextDelta]:
    stream = TextStream(BYTE_LEVEL, Request(request_id="r", prompt_token_ids=prompt, params=params))
    deltas = []
    for event in events:
        deltas.append(stream.push(event))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def text_of(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_stop_string_across_tokens_ends_text_and_token_ids(size: int) -> None:
    ids = byte_ids(b"one STOP two three")
    events = [event_of(ids[i : i + size]) for i in range(0, len(ids), size)]
    deltas = run_stream(SamplingParams(stop=("STOP",)), events)
    assert text_of(deltas) == "one "
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].stop_reason == "STOP"
    assert sum((delta.token_ids for delta in deltas), ()) == tuple(ids[: len("one STOP")])
    assert deltas[-1].num_tokens == len("one STOP")
    assert not any("S" in delta.text for delta in deltas)


def test_a_stop_string_can_be_kept_in_the_output() -> None:
    params = SamplingParams(stop=("STOP",), include_stop_str_in_output=True)
    assert text_of(run_stream(params, [event_of(byte_ids(b"a STOP b"))])) == "a STOP"


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    events = [event_of([i]) for i in byte_ids(b"xSxS")]
    assert text_of(run_stream(SamplingParams(stop=("S",)), events)) == "x"
    assert text_of(run_stream(SamplingParams(stop=("S",), min_tokens=2), events)) == "xSx"


@pytest.mark.parametrize(("include", "expected"), [(False, "hi"), (True, "hi.")])
def test_the_text_of_a_stop_token_is_left_out_unless_asked_for(
    include: bool, expected: str
) -> None:
    ids = byte_ids(b"hi.")
    params = SamplingParams(stop_token_ids=(ids[-1],), include_stop_str_in_output=include)
    event = event_of(ids, finish_reason="stop", stop_token_id=ids[-1])
    (delta,) = run_stream(params, [event])
    assert (delta.text, delta.token_ids) == (expected, tuple(ids))
    assert (delta.finish_reason, delta.stop_reason) == ("stop", ids[-1])


def test_an_end_token_has_no_stop_reason() -> None:
    event = event_of([*byte_ids(b"a"), 1], finish_reason="stop", stop_token_id=1)
    (delta,) = run_stream(SamplingParams(skip_special_tokens=False), [event])
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", "stop", None)


def test_what_is_held_comes_out_when_the_sequence_ends() -> None:
    ids = byte_ids(b"ST\xe4")
    deltas = run_stream(
        SamplingParams(stop=("STOP",)), [event_of(ids), event_of((), finish_reason="length")]
    )
    assert [delta.text for delta in deltas] == ["", "ST\ufffd"]
    assert deltas[-1].finish_reason == "length"


def test_text_starts_are_offsets_into_the_output() -> None:
    ids = byte_ids("a你b".encode())
    logprobs = tuple(TokenLogprob(i, -1.0, 1, ()) for i in ids)
    (delta,) = run_stream(SamplingParams(logprobs=0), [event_of(ids, logprobs=logprobs)])
    assert delta.text_starts == (0, 1, 1, 1, 2)
    assert delta.logprobs == logprobs


def test_errors_pass_through() -> None:
    error = ErrorInfo("gone", "engine_error", 500)
    (delta,) = run_stream(SamplingParams(), [event_of((), finish_reason="error", error=error)])
    assert (delta.error, delta.finish_reason) == (error, "error")


def test_a_stop_string_aborts_the_request_in_the_engine() -> None:
    engine = FakeEngine(BYTE_LEVEL, Script.text("one STOP two"))
    params = SamplingParams(max_tokens=None, stop=("STOP",))
    request = Request(request_id="r", prompt_token_ids=(5,), params=params)

    async def run() -> list[TextDelta]:
        return [delta async for delta in stream_text(engine, request, BYTE_LEVEL)]

    deltas = asyncio.run(run())
    assert (text_of(deltas), deltas[-1].stop_reason) == ("one ", "STOP")
    assert engine.aborted == ["r"]
    assert engine.num_open == 0
