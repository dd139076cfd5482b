"""Token ids to text as they come: nothing too early, nothing lost, nothing left over."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_tokenizers
from loraswarm.text.detokenizer import MAX_PENDING_TOKENS, Detokenizer

BYTE_LEVEL = tiny_tokenizers.byte_level()
BYTE_FALLBACK = tiny_tokenizers.byte_fallback()


def pieces_of(detokenizer: Detokenizer, token_ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in token_ids), detokenizer.flush()]


def byte_ids(data: bytes) -> list[int]:
    """Ids of the tokens of `BYTE_LEVEL` that are one byte each."""
    table = {BYTE_LEVEL.token_bytes(i): i for i in reversed(range(BYTE_LEVEL.vocab_size))}
    return [table[bytes([byte])] for byte in data]


def fallback_ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=80), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_byte_level_pieces_joined_are_the_text_of_all_ids(ids: list[int], skips: bool) -> None:
    pieces = pieces_of(Detokenizer(BYTE_LEVEL, (), skips), ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids, skips)


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_text_after_any_prompt_comes_out_whole_and_without_replacement(
    prompt: str, text: str
) -> None:
    prompt_ids = BYTE_LEVEL.encode(prompt)
    ids = byte_ids(text.encode())
    pieces = pieces_of(Detokenizer(BYTE_LEVEL, prompt_ids), ids)
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.sampled_from(["▁hello", "he", "▁", "a", "é", ".", "你", "🙂", "\n"])))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_byte_fallback_pieces_joined_are_the_text_of_all_ids(words: list[str]) -> None:
    ids: list[int] = []
    for word in words:
        known = BYTE_FALLBACK._backend.token_to_id(word)
        ids += fallback_ids(word) if known is None else [known]
    pieces = pieces_of(Detokenizer(BYTE_FALLBACK), ids)
    assert "".join(pieces) == BYTE_FALLBACK.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_held_until_its_last_byte() -> None:
    for tokenizer, ids in ((BYTE_LEVEL, byte_ids("你".encode())), (BYTE_FALLBACK, None)):
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(i) for i in ids or fallback_ids("你")]
        assert pieces == ["", "", "你"]


def test_an_unfinished_character_comes_out_at_the_end_only() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push(i) for i in byte_ids(b"a\xf0\x9f\x99")] == ["a", "", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_bytes_that_cannot_become_a_character_are_not_held() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push(i) for i in byte_ids(b"\xff\xffa")] == ["\ufffd", "\ufffd", "a"]


def test_text_given_out_before_a_broken_byte_run_stands() -> None:
    ids = [*fallback_ids("你"), 3 + 0xE4, BYTE_FALLBACK._backend.token_to_id("x")]
    assert "".join(pieces_of(Detokenizer(BYTE_FALLBACK), ids)) == "你\ufffdx"


def test_an_endless_run_of_unfinished_characters_stays_cheap_and_exact() -> None:
    ids = byte_ids(b"\xe4" * 133 + "你".encode() * 3 + b"x")
    detokenizer = Detokenizer(BYTE_LEVEL)
    pieces = []
    for i in ids:
        pieces.append(detokenizer.push(i))
        assert len(detokenizer._pending) <= MAX_PENDING_TOKENS
    assert "".join(pieces) == BYTE_LEVEL.decode(ids)


def test_tokens_that_all_end_inside_a_character_come_out_as_they_are_completed() -> None:
    tokenizer = tiny_tokenizers.straddling()
    first, second, third_first = 0xE4, 0xBD, 256
    ids = [first, *[second, third_first] * 133, second, 0xA0]
    detokenizer = Detokenizer(tokenizer)
    pieces = []
    for i in ids:
        pieces.append(detokenizer.push(i))
        assert len(detokenizer._pending) <= MAX_PENDING_TOKENS
    assert pieces == ["", *["", "你"] * 134]
    assert detokenizer.flush() == ""


def test_the_first_word_after_a_prompt_keeps_its_space() -> None:
    prompt = BYTE_FALLBACK.encode("hello the", add_special_tokens=False)
    world = BYTE_FALLBACK._backend.token_to_id("▁world")
    assert pieces_of(Detokenizer(BYTE_FALLBACK, prompt), [world]) == [" world", ""]
    assert pieces_of(Detokenizer(BYTE_FALLBACK, [*prompt, 1, 1, 1, 1, 1, 1, 1]), [world])[0] == (
        " world"
    )
    assert pieces_of(Detokenizer(BYTE_FALLBACK), [world])[0] == "world"  # negative control


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    first, *rest = byte_ids("你".encode())
    assert "".join(pieces_of(Detokenizer(BYTE_LEVEL, [first]), rest)) == "你"


def test_special_tokens_are_text_only_when_asked() -> None:
    ids = BYTE_LEVEL.encode("a<|user|>b", add_special_tokens=False)
    assert "".join(pieces_of(Detokenizer(BYTE_LEVEL), ids)) == "ab"
    assert "".join(pieces_of(Detokenizer(BYTE_LEVEL, (), False), ids)) == "a<|user|>b"
