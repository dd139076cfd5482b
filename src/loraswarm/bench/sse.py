"""Server-sent events from bytes, and what a chunk of a streamed completion says.

Works on bytes and decodes only the fields that are measured, because the client shares the machine
with the server it measures. Knows nothing about connections or times. Used by bench/http_target.
"""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"[DONE]"
MAX_ERROR_LENGTH = 300


class EventReader:
    """Puts events together from the pieces in which they arrive."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The payloads of the events that are complete with `piece`; `b""` ends the stream, and
        what is left is then taken as an event.

        A line `error: JSON`, which llama.cpp's server sends, is the payload `{"error": JSON}`.
        """
        lines = (self._rest + (piece or b"\n\n")).split(b"\n")
        self._rest = lines.pop()
        payloads = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"error:"):
                self._data.append(b'{"error":' + line[6:] + b"}")
            elif not line and self._data:
                payloads.append(b"\n".join(self._data))
                self._data.clear()
        return payloads


class Delta(msgspec.Struct):
    """New text of a chat completion."""

    content: str | None = None
    reasoning_content: str | None = None


class ChunkChoice(msgspec.Struct):
    """New text of a completion (`text`) or of a chat (`delta`)."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        if self.delta is not None:
            return bool(self.delta.content or self.delta.reasoning_content)
        return bool(self.text)


class PromptDetails(msgspec.Struct):
    """What the server says about the tokens of the prompt."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """The server's own counts."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct):
    """One event of a streamed answer; fields that are not here are skipped, not decoded."""

    choices: list[ChunkChoice] | None = None
    usage: Usage | None = None
    error: Any = None


_chunks = msgspec.json.Decoder(Chunk)


def decode_chunk(payload: bytes) -> Chunk:
    """Raises msgspec.MsgspecError if it is no chunk of an answer."""
    return _chunks.decode(payload)


def error_line(body: bytes) -> str:
    """What an error body says, on one line: `{"error": {"message": ...}}` as OpenAI writes it,
    its variants, or the body itself; empty for an empty body."""
    try:
        return one_line(_message(msgspec.json.decode(body)))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return one_line(body.decode(errors="replace"))


def one_line(text: str) -> str:
    """`text` without line breaks, and not too long to be printed."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_ERROR_LENGTH else line[:MAX_ERROR_LENGTH] + "..."


def _message(body: Any) -> str:
    while isinstance(body, dict):
        for key in ("error", "message", "detail"):
            if body.get(key):
                body = body[key]
                break
        else:
            break
    return body if isinstance(body, str) else msgspec.json.encode(body).decode()
