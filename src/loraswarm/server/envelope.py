"""What is around the choices of every response and chunk: id, object, model, counts."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Envelope:
    """One response; counts the tokens of all its choices. `created_s` is seconds since 1970."""

    kind: str
    model: str
    id_prefix: str
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    created_s: int = field(default_factory=lambda: int(time.time()))
    response_id: str = ""

    def __post_init__(self) -> None:
        self.response_id = f"{self.id_prefix}-{uuid.uuid4().hex}"

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The object with `choices` in it."""
        return {
            "id": self.response_id,
            "object": self.kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }

    def usage(self) -> dict[str, int]:
        """The counts so far."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
        }
