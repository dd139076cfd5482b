"""What every endpoint needs: the engine, the tokenizer, and which names `model` may say.

Knows nothing about HTTP. Made once by `create_app`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from loraswarm.core.client import EngineClient
from loraswarm.core.request import check_adapters
from loraswarm.errors import AdapterError, InvalidRequest, UnknownAdapter
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

    @cached_property
    def _refusals(self) -> dict[str, str | None]:
        """Why each known adapter is not served; None if it is, whatever else has its name."""
        rows = self.client.info.adapters
        refused = {row.name: row.refusal for row in rows if row.refusal is not None}
        return refused | {row.name: None for row in rows if row.refusal is None}
