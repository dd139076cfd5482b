"""BEFT: a bias trained for each adapted linear, whether or not the base has one.

Knows its config keys and tensor names. Called through adapters/methods.
Source    peft 0.21: tuners/beft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import plan_low_rank, read_saved, tensor_name
from loraswarm.adapters.module_selection import ModuleSelection
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

INERT_KEYS = frozenset({"init_weights"})


@dataclass(frozen=True, slots=True)
class BeftConfig:
    """y = W x + b + beft_bias, for the selected modules; rank 0."""

    selection: ModuleSelection

    @property
    def method(self) -> str:
        return "beft"

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`."""
        return ModuleInfo(site, 0, 1.0, ("c",))

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        return {".beft_bias": (1, out_size)}


class Beft:
    """`Method` of peft_type BEFT."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        keys.check(SELECTION_KEYS, INERT_KEYS, {})
        return plan_low_rank(BeftConfig(keys.selection()), shape)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        modules = []
        for module in plan.modules:
            name = tensor_name(base.shape.site_path(module.site), ".beft_bias")
            modules.append(ModuleWeights(module, None, None, {"c": tensors.wide(name).flatten()}))
        return AdapterWeights(tuple(modules), read_saved(plan, tensors, base))
