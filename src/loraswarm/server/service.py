"""What every endpoint needs: the engine, the tokenizer, and which names `model` may say.

Knows nothing about HTTP. Made once by `create_app`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from loraswarm.core.client import EngineClient
from loraswarm.errors import AdapterError, UnknownAdapter
from loraswarm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Service:
    """`created_s` is the start of the server in seconds since 1970."""

    client: EngineClient
    tokenizer: Tokenizer
    created_s: int

    def model_names(self) -> list[str]:
        """The base model and the adapters that are served."""
        info = self.client.info
        return [info.model, *info.served_adapters()]

    def adapter_of(self, model: str) -> str | None:
        """The adapter `model` names; None for the base model.

        Raises   UnknownAdapter; AdapterError if the adapter is known but was refused.
        """
        if model == self.client.info.model:
            return None
        if model not in self._refusals:
            raise UnknownAdapter(model, self.model_names())
        refusal = self._refusals[model]
        if refusal is not None:
            raise AdapterError(f"model {model!r} is not served: {refusal}")
        return model

    @cached_property
    def _refusals(self) -> dict[str, str | None]:
        """Why each known adapter is not served; None if it is, whatever else has its name."""
        rows = self.client.info.adapters
        refused = {row.name: row.refusal for row in rows if row.refusal is not None}
        return refused | {row.name: None for row in rows if row.refusal is None}
