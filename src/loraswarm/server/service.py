"""What every endpoint needs: the engine, the tokenizer, and which names `model` may say.

Knows nothing about HTTP. Made once by `create_app`.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraswarm.core.client import EngineClient
from loraswarm.errors import AdapterError, UnknownAdapter
from loraswarm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
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
        info = self.client.info
        if model == info.model:
            return None
        for adapter in info.adapters:
            if adapter.name == model and adapter.refusal is None:
                return model
            if adapter.name == model:
                raise AdapterError(f"adapter {model!r} is not served: {adapter.refusal}")
        raise UnknownAdapter(model, self.model_names())
