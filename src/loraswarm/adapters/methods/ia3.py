"""(IA)^3: outputs of linears times trained vectors.

Knows its config keys and tensor names. A vector on the input of down_proj is applied as one on the
output of up_proj. Called through adapters/methods.
Source    Liu et al. 2022 (arXiv 2205.05638); peft 0.21: tuners/ia3.
Legend: O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, ConfigKeys
from loraswarm.adapters.methods.low_rank import plan_low_rank, read_saved, tensor_name
from loraswarm.adapters.module_selection import ModuleSelection, compiled
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import TARGETS, BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = frozenset(
    {"exclude_modules", "feedforward_modules", "modules_to_save", "target_modules"}
)
# PEFT sets fan_in_fan_out to false for linears that store [out, in].
INERT_KEYS = frozenset({"fan_in_fan_out", "init_ia3_weights"})
_L = ".ia3_l"
_UP, _DOWN = TARGETS.index("up_proj"), TARGETS.index("down_proj")


@dataclass(frozen=True, slots=True)
class Ia3Config:
    """y = g * (W x + b). `feedforward` is a regular expression for whole paths, or what they end
    with, be it in the middle of a word: the modules whose input is multiplied instead."""

    selection: ModuleSelection
    feedforward: str | frozenset[str]

    @property
    def method(self) -> str:
        return "ia3"

    def scales_input(self, path: str) -> bool:
        """Whether the vector of the module at `path` multiplies its input."""
        if isinstance(self.feedforward, str):
            return compiled(self.feedforward).fullmatch(path) is not None
        return any(path.endswith(name) for name in self.feedforward)

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`. The module whose output is multiplied:

        down(act(gate) * up * l) = down(act(gate) * (l * up))
        """
        if not self.scales_input(path):
            return ModuleInfo(site, 0, 1.0, ("g",))
        if site >= shape.num_linears or site % len(TARGETS) != _DOWN:
            raise AdapterError(
                f"{CONFIG_FILE}: feedforward_modules selects {path!r}, whose input cannot be"
                " multiplied for one adapter; only down_proj's can. Merge the adapter into a base"
                " of its own with PEFT's merge_and_unload"
            )
        return ModuleInfo(site - _DOWN + _UP, 0, 1.0, ("g",))

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        return {_L: (1, in_size) if self.scales_input(path) else (out_size, 1)}


class Ia3:
    """`Method` of peft_type IA3."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        return _plan(_parse_config(keys), shape)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        return AdapterWeights(
            tuple(_read_module(module, base.shape, plan, tensors) for module in plan.modules),
            read_saved(plan, tensors, base),
        )


def _parse_config(keys: ConfigKeys) -> Ia3Config:
    keys.check(READ_KEYS, INERT_KEYS, {})
    # PEFT has a default for every kind of model, and writes it into the configs that it saves.
    if keys.get("feedforward_modules") is None:
        raise keys.refusal(
            "feedforward_modules", "name the modules whose input is multiplied, [] for none"
        )
    return Ia3Config(keys.selection(), keys.names("feedforward_modules"))


@lru_cache(maxsize=256)
def _plan(config: Ia3Config, shape: BaseShape) -> AdapterPlan:
    plan = plan_low_rank(config, shape)
    by_site = {module.site: module for module in plan.modules}
    return replace(plan, modules=tuple(by_site[site] for site in sorted(by_site)))


def _read_module(
    module: ModuleInfo, shape: BaseShape, plan: AdapterPlan, tensors: TensorReader
) -> ModuleWeights:
    """g is the product of the vectors of the module's own output and of down_proj's input."""
    name = tensor_name(shape.site_path(module.site), _L)
    found = [name] if name in plan.tensor_shapes else []
    if module.site < shape.num_linears and module.target == _UP:
        name = tensor_name(shape.site_path(module.site - _UP + _DOWN), _L)
        # As a vector on its output it is [out, 1].
        if plan.tensor_shapes.get(name, (0,))[0] == 1:
            found.append(name)
    g_O = tensors.wide(found[0]).flatten()
    for name in found[1:]:
        g_O = g_O * tensors.wide(name).flatten()
    return ModuleWeights(module, None, None, {"g": g_O})
