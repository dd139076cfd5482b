"""AdaLoRA: LoRA whose ranks have trained weights of their own, and are pruned while it is trained.

Knows its config keys and tensor names. The weights of ranks are folded into A, so that it is served
as plain LoRA. Called through adapters/methods.
Source    Zhang et al. 2023 (arXiv 2303.10512); peft 0.21: tuners/adalora.
Legend: R rank, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import (
    plan_low_rank,
    read_low_rank,
    refuse_bias,
    tensor_name,
)
from loraswarm.adapters.module_selection import ModuleSelection
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.printable import shortened
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = SELECTION_KEYS | {"bias", "init_r", "lora_alpha", "rank_pattern"}
# About training, or LoRA's own keys, which PEFT does not look at for AdaLoRA.
INERT_KEYS = frozenset(
    {
        "alpha_pattern",
        "beta1",
        "beta2",
        "corda_config",
        "deltaT",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "orth_reg_weight",
        "qalora_group_size",
        "r",
        "runtime_config",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
        "use_rslora",
    }
)
_NOT_COMBINED = "it is not a part of AdaLoRA; train with LoRA instead"
REFUSED_KEYS = {
    "alora_invocation_tokens": _NOT_COMBINED,
    "arrow_config": _NOT_COMBINED,
    "kasa_config": _NOT_COMBINED,
    "layer_replication": "it changes the depth of the base, which other adapters share",
    "lora_bias": _NOT_COMBINED,
    "megatron_config": "Megatron layers are not supported; save the adapter for transformers",
    "monteclora_config": _NOT_COMBINED,
    "target_parameters": _NOT_COMBINED,
    "trainable_token_indices": "trained token embeddings are applied with LoRA only; train with"
    " LoRA instead",
    "use_bdlora": _NOT_COMBINED,
    "use_dora": _NOT_COMBINED,
    "use_qalora": _NOT_COMBINED,
    "velora_config": _NOT_COMBINED,
}
_A, _B, _E, _RANK_NUMBER = ".lora_A", ".lora_B", ".lora_E", ".ranknum"
# PEFT adds it to the rank that it divides by.
_RANK_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class AdaLoraConfig:
    """delta W = scale * B diag(E) A. `ranks_left` has (path, rank) of modules that were pruned,
    `ranks_by_path` the same to look up."""

    selection: ModuleSelection
    initial_rank: int
    alpha: float
    ranks_left: tuple[tuple[str, int], ...]
    ranks_by_path: Mapping[str, int] = field(compare=False)
    has_rank_numbers: bool

    @property
    def method(self) -> str:
        return "adalora"

    def rank_of(self, path: str) -> int:
        """Rank of the module at `path`, 0 if nothing is left of it."""
        return self.ranks_by_path.get(path, self.initial_rank)

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`. What the update is divided by is not pruned with the rank."""
        rank = self.rank_of(path)
        alpha = self.alpha if self.alpha > 0 else float(rank)
        return ModuleInfo(site, rank, alpha / (self.initial_rank + _RANK_EPSILON))

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        rank = self.rank_of(path)
        shapes = {_A: (rank, in_size), _B: (out_size, rank), _E: (rank, 1)}
        return {**shapes, _RANK_NUMBER: (1,)} if self.has_rank_numbers else shapes


class AdaLora:
    """`Method` of peft_type ADALORA."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        has_rank_numbers = any(name.endswith(_RANK_NUMBER) for name in source.tensors)
        return _plan(_parse_config(keys, has_rank_numbers), shape)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        for name in plan.tensor_shapes:
            if name.endswith(_RANK_NUMBER):
                _check_rank_number(name, keys.rank("init_r", 12), tensors)
        return read_low_rank(
            plan, tensors, base, lambda module, path: _read_module(module, path, tensors)
        )


def _parse_config(keys: ConfigKeys, has_rank_numbers: bool) -> AdaLoraConfig:
    keys.check(READ_KEYS, INERT_KEYS, REFUSED_KEYS)
    refuse_bias(keys)
    if keys.get("ensure_weight_tying") and keys.get("modules_to_save"):
        raise keys.refusal("ensure_weight_tying", "with modules_to_save it is read of LoRA only")
    initial_rank = keys.rank("init_r", 12)
    ranks_by_path = _ranks_left(keys, initial_rank)
    return AdaLoraConfig(
        selection=keys.selection(),
        initial_rank=initial_rank,
        alpha=keys.number("lora_alpha", 8),
        ranks_left=tuple(ranks_by_path.items()),
        ranks_by_path=ranks_by_path,
        has_rank_numbers=has_rank_numbers,
    )


def _ranks_left(keys: ConfigKeys, initial_rank: int) -> dict[str, int]:
    """Ranks by path, from rank_pattern: which ranks of each lora_E were kept."""
    masks = keys.get("rank_pattern")
    if masks is None:
        return {}
    if not isinstance(masks, dict):
        raise keys.refusal("rank_pattern", "it must map names of lora_E to lists of true and false")
    ranks = {}
    for name, mask in masks.items():
        is_mask = isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask)
        if not name.endswith(_E) or not is_mask or len(mask) != initial_rank:
            raise AdapterError(
                f"{CONFIG_FILE}: rank_pattern[{shortened(name)}] is {shortened(mask)}: it must map"
                f" the name of a lora_E to true or false for each of init_r = {initial_rank} ranks"
            )
        ranks[name.removesuffix(_E)] = sum(mask)
    return ranks


@lru_cache(maxsize=256)
def _plan(config: AdaLoraConfig, shape: BaseShape) -> AdapterPlan:
    plan = plan_low_rank(config, shape)
    paths = {shape.site_path(module.site) for module in plan.modules}
    for path, _ in config.ranks_left:
        if path not in paths:
            raise AdapterError(
                f"{CONFIG_FILE}: rank_pattern[{shortened(path + _E)}] is of no linear of the base"
                " that target_modules selects"
            )
    # A module of which nothing is left has empty tensors in the file, and no update.
    return replace(plan, modules=tuple(module for module in plan.modules if module.rank > 0))


def _read_module(module: ModuleInfo, path: str, tensors: TensorReader) -> ModuleWeights:
    name_e = tensor_name(path, _E)
    e_R1 = tensors.wide(name_e)
    a_RI = tensors.fit(name_e, tensors.wide(tensor_name(path, _A)) * e_R1)
    return ModuleWeights(module, a_RI, tensors.cast(tensor_name(path, _B)).t().contiguous())


def _check_rank_number(name: str, initial_rank: int, tensors: TensorReader) -> None:
    found = tensors.wide(name).item()
    if found != initial_rank:
        raise AdapterError(
            f"tensor {name!r} is {found:g}, but init_r in {CONFIG_FILE}, which the update is"
            f" divided by, is {initial_rank}"
        )
