"""What is around the choices of every response and chunk: id, object, model, counts."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec

from loraswarm.server.choices import Generation
from loraswarm.server.schema import GenerationBody
from loraswarm.server.streaming import DONE, as_event


class Envelope:
    """One response to `body`; its user sets `generation` and counts the tokens of all choices."""

    def __init__(self, kind: str, id_prefix: str, body: GenerationBody) -> None:
        self.response_id = f"{id_prefix}-{uuid.uuid4().hex}"
        self.generation: Generation | None = None
        self.num_completion_tokens = 0
        self._kind = kind
        self._body = body
        self._created_s = int(time.time())

    def whole(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """A response that is not streamed."""
        return msgspec.json.encode({**self._around(choices), **more, "usage": self._usage()})

    def chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        """One event of a streamed response."""
        chunk = self._around([choice]) | more
        if self._body.includes_usage:
            chunk["usage"] = self._usage() if self._body.counts_continuously else None
        return as_event(chunk)

    def closing(self) -> bytes:
        """The last events of a streamed response: the counts if asked for, and the end."""
        if not self._body.includes_usage:
            return DONE
        return as_event(self._around([]) | {"usage": self._usage()}) + DONE

    def _around(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": self._kind,
            "created": self._created_s,
            "model": self._body.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        assert self.generation is not None
        num_prompt_tokens = self.generation.num_prompt_tokens
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.generation.num_cached_tokens},
        }
