"""A model's own tokenizer and chat template, as transformers loads them.

Encoding and decoding go straight to the compiled tokenizer: no truncation, no padding, no clean-up
of spaces, safe from several threads. Knows nothing about requests in flight. Used by server and
LLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import transformers

from loraswarm.errors import ConfigError, InvalidRequest
from loraswarm.text.token_bytes import TokenBytes

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Tokenizer:
    """Text to token ids and back; made by `load`."""

    def __init__(self, loaded: Any) -> None:
        """Wrap a transformers tokenizer that has a compiled backend."""
        self._loaded = loaded
        self._backend = loaded.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = bool(getattr(loaded, "split_special_tokens", False))
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._token_bytes = TokenBytes(self._backend, self.token_text)
        self._anchor = self._find_anchor()
        self._texts: dict[int, str] = {}
        self._reserved = frozenset(inspect.signature(loaded.apply_chat_template).parameters)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load from a model directory; code in the directory is never run.

        Raises   ConfigError if the directory has no tokenizer or one that cannot be read.
        """
        directory = Path(path)
        if not any((directory / name).is_file() for name in VOCABULARY_FILES):
            raise ConfigError(
                f"no tokenizer in {directory}; expected one of {', '.join(VOCABULARY_FILES)}"
            )
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(
                str(directory), use_fast=True, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ConfigError(f"the tokenizer in {directory} cannot be read: {error}") from error
        if getattr(loaded, "backend_tokenizer", None) is None:
            raise ConfigError(
                f"the tokenizer in {directory} has no compiled form; convert it to tokenizer.json"
            )
        return cls(loaded)

    @property
    def vocab_size(self) -> int:
        """Number of tokens the tokenizer knows, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out of text."""
        return self._special_ids

    @property
    def has_chat_template(self) -> bool:
        return bool(self._loaded.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises InvalidRequest if it is not valid Unicode."""
        return self.encode_with_starts(text, add_special_tokens)[0]

    def encode_with_starts(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[int]]:
        """Token ids, and where in `text` each begins; tokens that were added begin at the last."""
        try:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error}") from error
        starts = [0] * len(encoding.offsets)
        last = 0
        for i, (start, _) in enumerate(encoding.offsets):
            last = max(last, start)
            starts[i] = last
        return encoding.ids, starts

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids the tokenizer does not know add nothing."""
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def knows(self, token_id: int) -> bool:
        return self._backend.id_to_token(token_id) is not None

    def token_text(self, token_id: int) -> str:
        """Text of one token inside a sentence, with its leading space; "" for an unknown id."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode_inside(token_id)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; a part of a character where the token is one."""
        return self._token_bytes.of(token_id)

    def num_unfinished(self, token_ids: Sequence[int]) -> int:
        """How many U+FFFD at the end of the decoded `token_ids` the next token may replace."""
        return self._token_bytes.num_unfinished(token_ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a chat by the model's own template; holds its special tokens.

        A `developer` message is a `system` message to a template that does not name that role.

        Raises   InvalidRequest if the model has no template or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions or add a chat_template to "
                "its tokenizer_config.json",
                "messages",
            )
        arguments = dict(template_arguments or {})
        if taken := sorted(self._reserved & arguments.keys()):
            raise InvalidRequest(
                f"chat_template_kwargs may not set {taken[0]!r}", "chat_template_kwargs"
            )
        try:
            rendered = self._loaded.apply_chat_template(
                self._with_known_roles(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **arguments,
            )
        except TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {error}", "messages"
            ) from error
        return str(rendered)

    def _with_known_roles(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if "developer" in str(self._loaded.chat_template):
            return [dict(message) for message in messages]
        return [
            {**message, "role": "system"} if message["role"] == "developer" else dict(message)
            for message in messages
        ]

    def _find_anchor(self) -> tuple[int, str] | None:
        """A token of plain text, to put before a token whose text inside a sentence is wanted."""
        ids = self.encode("a", add_special_tokens=False)
        text = self.decode(ids[-1:])
        return (ids[-1], text) if text else None

    def _decode_inside(self, token_id: int) -> str:
        if not self.knows(token_id):
            return ""
        if self._anchor is not None and token_id not in self._special_ids:
            anchor_id, anchor_text = self._anchor
            text = self.decode([anchor_id, token_id], skip_special_tokens=False)
            if text.startswith(anchor_text):
                return text[len(anchor_text) :]
        return self.decode([token_id], skip_special_tokens=False)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequest naming the first id that is not in [0, vocab_size)."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    wrong = next(i for i in token_ids if not 0 <= i < vocab_size)
    raise InvalidRequest(
        f"{param} has token id {wrong:,}; this model's vocabulary has {vocab_size:,} tokens "
        f"(0 to {vocab_size - 1:,})",
        param,
    )
