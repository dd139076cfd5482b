"""The methods of adaptation that are served, by `peft_type`.

A method turns an adapter's config into a plan (which tensors, which modules; from headers alone)
and its tensors into the general form of adapters/adapter. What is refused, and why, is in `table`.
Called by adapters/reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from loraswarm.adapters.adapter import BaseWeights
from loraswarm.adapters.config_keys import ConfigKeys
from loraswarm.adapters.methods.adalora import AdaLora
from loraswarm.adapters.methods.beft import Beft
from loraswarm.adapters.methods.delora import Delora
from loraswarm.adapters.methods.gralora import Gralora
from loraswarm.adapters.methods.ia3 import Ia3
from loraswarm.adapters.methods.ln_tuning import LnTuning
from loraswarm.adapters.methods.loha import Loha
from loraswarm.adapters.methods.lokr import Lokr
from loraswarm.adapters.methods.lora import Lora
from loraswarm.adapters.methods.miss import Miss
from loraswarm.adapters.methods.tied_lora import TiedLora
from loraswarm.adapters.methods.trainable_tokens import TrainableTokens
from loraswarm.adapters.methods.vblora import VbLora
from loraswarm.adapters.methods.vera import Vera
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape

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


METHODS: Mapping[str, Method] = {
    "ADALORA": AdaLora(),
    "BEFT": Beft(),
    "DELORA": Delora(),
    "GRALORA": Gralora(),
    "IA3": Ia3(),
    "LN_TUNING": LnTuning(),
    "LOHA": Loha(),
    "LOKR": Lokr(),
    "LORA": Lora(),
    "MISS": Miss(),
    "TIED_LORA": TiedLora(),
    "TRAINABLE_TOKENS": TrainableTokens(),
    "VBLORA": VbLora(),
    "VERA": Vera(),
}


def method_of(keys: ConfigKeys) -> Method:
    """The method that a config names.

    Raises    AdapterError saying why it is refused and what to do instead.
    """
    peft_type = keys.get("peft_type")
    method = METHODS.get(peft_type) if isinstance(peft_type, str) else None
    if method is None:
        # Imported here: it must not be loaded already where it is run as a program.
        from loraswarm.adapters.methods.table import refusal_of

        raise refusal_of(peft_type)
    return method
