"""Token ids of one sequence to text, as they come.

Gives text out as soon as no later token can change it, so pieces joined equal the text of all ids.
Knows nothing about stop strings or events. Used by TextStream.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraswarm.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MIN_CONTEXT_TOKENS = 6
MAX_PENDING_TOKENS = 32
NUM_KEPT_TOKENS = 8


class Detokenizer:
    """Incremental text of one sequence.

    Decoders look at a token's neighbours (a first token loses its leading space), so a few tokens
    before the new ones are decoded with them and their text is cut off:

        ids   ... | context | pending |
        text      | known   | sent .. held (the beginning of a character, shown as U+FFFD)

    Byte-level vocabularies give exactly the text of all ids. Byte-fallback decoders show a whole
    run of byte tokens as U+FFFD if any of it is invalid; text given out before stays as it is.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        """Text continues `prompt_ids`, which are not part of it."""
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._context = self._prompt_tail(prompt_ids)
        self._known = self._finished_text(self._context)
        self._pending: list[int] = []
        self._num_sent = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes certain; may be empty."""
        if token_id in self._skipped or not self._tokenizer.knows(token_id):
            return ""
        self._pending.append(token_id)
        text = self._pending_text()
        num_held = 0
        if text.endswith(REPLACEMENT):
            num_held = self._tokenizer.num_unfinished(self._context + self._pending)
        end = max(self._num_sent, len(text) - num_held)
        piece = text[self._num_sent : end]
        if num_held == 0:
            self._start_after_pending(bool(text))
        elif len(self._pending) >= MAX_PENDING_TOKENS:
            self._set_context(self._pending[-NUM_KEPT_TOKENS:])
        else:
            self._num_sent = end
        return piece

    def flush(self) -> str:
        """The text still held at the end of the sequence: an unfinished character as U+FFFD."""
        piece = self._pending_text()[self._num_sent :] if self._pending else ""
        self._pending = []
        self._num_sent = 0
        return piece

    def _start_after_pending(self, has_text: bool) -> None:
        if has_text:
            self._set_context(self._pending)
        elif not self._known:
            self._set_context(self._context + self._pending)
        else:
            self._pending = []

    def _set_context(self, token_ids: list[int]) -> None:
        self._context = token_ids
        self._known = self._finished_text(token_ids)
        self._pending = []
        self._num_sent = 0

    def _pending_text(self) -> str:
        text = self._decode(self._context + self._pending)
        if text.startswith(self._known):
            return text[len(self._known) :]
        return self._decode(self._pending)

    def _finished_text(self, token_ids: Sequence[int]) -> str:
        text = self._decode(token_ids)
        if text.endswith(REPLACEMENT):
            return text[: len(text) - self._tokenizer.num_unfinished(token_ids)]
        return text

    def _prompt_tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The shortest end of the prompt that has text and begins at a character's beginning."""
        size = MIN_CONTEXT_TOKENS
        while size < len(prompt_ids):
            tail = list(prompt_ids[-size:])
            text = self._decode(tail)
            if text and text[0] != REPLACEMENT:
                return tail
            size *= 2
        return list(prompt_ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skips_special)
