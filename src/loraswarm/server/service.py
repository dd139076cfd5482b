"""What every endpoint needs: the engine, the tokenizer, the metrics, which names `model` may say.

Knows nothing about HTTP. Made once by `create_app`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraswarm.core.client import EngineClient, served_names
from loraswarm.core.request import check_adapters
from loraswarm.errors import AdapterError, InvalidRequest, UnknownAdapter
from loraswarm.server.metrics import RequestMetrics
from loraswarm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """What a request is answered with: one adapter, a weighted sum of several, or (neither) the
    base model."""

    adapter: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Service:
    """`created_s` is the start of the server in seconds since 1970."""

    client: EngineClient
    tokenizer: Tokenizer
    created_s: int
    metrics: RequestMetrics

    def model_names(self) -> list[str]:
        """The base model and the adapters that are served."""
        return [self.client.info.model, *served_names(self.client.adapters)]

    def adapter_of(self, model: str) -> str | None:
        """The adapter `model` names; None for the base model.

        Raises   UnknownAdapter; AdapterError if the adapter is known but was refused.
        """
        if model == self.client.info.model:
            return None
        known = self.client.adapters.get(model)
        if known is None:
            raise UnknownAdapter(model, self.model_names())
        if known.refusal is not None:
            raise AdapterError(f"model {model!r} is not served: {known.refusal}")
        return model

    def choose(self, model: str, adapters: Sequence[tuple[str, float]]) -> AdapterChoice:
        """What `model` and the field `adapters` name together.

        Raises   as `adapter_of`; InvalidRequest if `model` names an adapter besides the list.
        """
        adapter = self.adapter_of(model)
        if not adapters:
            return AdapterChoice(adapter)
        if adapter is not None:
            raise InvalidRequest(
                f"adapters is given and model is {model!r}, an adapter itself; let model be"
                f" {self.client.info.model!r} to combine those of the list",
                "adapters",
            )
        for name, _ in adapters:
            if self.adapter_of(name) is None:
                raise InvalidRequest(f"adapters names {name!r}, the base model", "adapters")
        check_adapters(tuple(adapters))
        return AdapterChoice(adapters=tuple(adapters))
