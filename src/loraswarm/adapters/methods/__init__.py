"""Every method of adaptation that we know: how it is applied, or why it is refused.

A method turns an adapter's config into a plan (which tensors, which modules; from headers alone)
and its tensors into the general form of adapters/adapter. The table below is what users see in the
README and in refusals. Called by adapters/reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from loraswarm.adapters.adapter import BaseWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, ConfigKeys, shortened
from loraswarm.adapters.methods.lora import Lora
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader


class Method(Protocol):
    """One way of adapting modules: a `peft_type`."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """What the adapter changes and which tensors it must hold. No torch.

        Raises    AdapterError naming the key or the tensor that cannot be applied exactly.
        """
        ...

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """The weights of a plan whose tensors have been checked against the file."""
        ...


METHODS: Mapping[str, Method] = {"LORA": Lora()}


def method_of(keys: ConfigKeys) -> Method:
    """The method that a config names.

    Raises    AdapterError saying why it is refused and what to do instead.
    """
    peft_type = keys.get("peft_type")
    method = METHODS.get(peft_type) if isinstance(peft_type, str) else None
    if method is None:
        raise AdapterError(
            f"{CONFIG_FILE}: peft_type is {shortened(peft_type)}: not supported; PEFT's"
            " save_as_lora converts many methods to LoRA"
        )
    return method
