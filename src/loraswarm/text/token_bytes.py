"""The bytes behind a token, and whether a run of tokens ends inside a character.

Two vocabularies have tokens that are parts of characters: byte-level ones (GPT-2, Llama 3, Qwen),
where each character of a token's name stands for one byte, and byte-fallback ones (Llama 2,
Mistral), where a token named `<0xE4>` is one byte. Used by Tokenizer only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_CHARACTER_BYTES = 4
BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """Byte-level names: printable Latin-1 characters stand for themselves, others follow 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class TokenBytes:
    """Bytes of the tokens of one compiled tokenizer, found when first asked for."""

    def __init__(self, backend: Any, token_text: Callable[[int], str]) -> None:
        self._backend = backend
        self._token_text = token_text
        self._bytes: dict[int, bytes] = {}
        self._added = frozenset(backend.get_added_tokens_decoder())
        decoders = set(_decoder_types(backend.decoder))
        self._is_byte_level = "ByteLevel" in decoders
        self._is_byte_fallback = "ByteFallback" in decoders

    def of(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; b"" for an unknown id."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find(token_id)
        return found

    def num_unfinished(self, token_ids: Sequence[int]) -> int:
        """How many U+FFFD at the end of the decoded `token_ids` the next token may replace.

        Byte-level decoders show the beginning of a character as one U+FFFD, byte-fallback decoders
        as one for each of its bytes. 0 if the tokens end at the end of a character or cannot be
        completed.
        """
        if not (self._is_byte_level or self._is_byte_fallback):
            return 0
        tail = b"".join(self.of(i) for i in token_ids[-MAX_CHARACTER_BYTES:])
        num_bytes = _num_unfinished_bytes(tail)
        return min(num_bytes, 1) if self._is_byte_level else num_bytes

    def _find(self, token_id: int) -> bytes:
        name = self._backend.id_to_token(token_id)
        if name is None:
            return b""
        if token_id not in self._added:
            if self._is_byte_level and all(c in BYTE_OF_CHARACTER for c in name):
                return bytes(BYTE_OF_CHARACTER[c] for c in name)
            if self._is_byte_fallback and (match := BYTE_NAME.fullmatch(name)):
                return bytes([int(match[1], 16)])
        return self._token_text(token_id).encode()


def _decoder_types(decoder: Any) -> Iterator[str]:
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    stack = [state]
    while stack:
        part = stack.pop()
        stack.extend(part.get("decoders", ()))
        yield str(part.get("type"))


def _num_unfinished_bytes(tail: bytes) -> int:
    """Length of the valid beginning of a character that `tail` ends with; 0 if there is none.

    "a" E4 B8     -> 2, AD would complete it
    "a" E4 B8 AD  -> 0, complete
    "a" E4 41     -> 0, broken for good
    """
    for length in range(1, MAX_CHARACTER_BYTES):
        start = len(tail) - length
        if start < 0:
            return 0
        if tail[start] >= 0xC0:
            try:
                tail[start:].decode()
            except UnicodeDecodeError as error:
                return length if error.reason == "unexpected end of data" else 0
            return 0
    return 0
