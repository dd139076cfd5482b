"""The config of a LoRA adapter, checked key by key: what the update is, or why it is refused.

Knows no tensors and no base. Called by adapters/methods/lora.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loraswarm.adapters.config_keys import SELECTION_KEYS, ConfigKeys, shortened
from loraswarm.adapters.module_selection import ModuleSelection, find_pattern

READ_KEYS = SELECTION_KEYS | {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "bias",
}
# About training, or in effect only together with a key that is read or refused.
INERT_KEYS = frozenset(
    {
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)
REFUSED_KEYS = {
    "alora_invocation_tokens": "activated LoRA is not supported yet",
    "arrow_config": "routing between adapters is not supported",
    "fan_in_fan_out": "the base stores weights as [out, in]; save the adapter with it set to false",
    "kasa_config": "KaSA changes the base weights, which other adapters share",
    "layer_replication": "it changes the depth of the base, which other adapters share",
    "lora_bias": "a bias in lora_B is not supported yet",
    "megatron_config": "Megatron layers are not supported; save the adapter for transformers",
    "modules_to_save": "fully trained modules are not supported; train without modules_to_save",
    "monteclora_config": "MonteCLoRA is not supported yet",
    "target_parameters": "adapted parameters outside linear modules are not supported yet",
    "trainable_token_indices": "trained token embeddings are not supported yet",
    "use_bdlora": "block-diagonal LoRA is not supported yet",
    "use_dora": "DoRA is not supported yet",
    "use_qalora": "QALoRA is not supported yet",
    "velora_config": "VeLoRA is not supported yet",
}
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The update a config describes: B A x times a scale, for the selected modules.

    Patterns are (key, value) pairs in file order; the first that applies to a module wins.
    """

    selection: ModuleSelection
    rank: int
    alpha: float
    is_rank_stabilized: bool
    rank_patterns: tuple[tuple[str, int], ...]
    alpha_patterns: tuple[tuple[str, float], ...]

    @property
    def method(self) -> str:
        return "rslora" if self.is_rank_stabilized else "lora"

    def rank_of(self, path: str) -> int:
        """Rank of the module at `path`."""
        found = find_pattern(self.rank_patterns, path)
        return self.rank if found is None else found[1]

    def rank_source(self, path: str) -> str:
        """The config key that sets the rank of the module at `path`, as messages name it."""
        found = find_pattern(self.rank_patterns, path)
        return "r" if found is None else f"rank_pattern[{shortened(found[0])}]"

    def scale_of(self, path: str) -> float:
        """What multiplies B A x of the module at `path`."""
        rank = self.rank_of(path)
        found = find_pattern(self.alpha_patterns, path)
        alpha = self.alpha if found is None else found[1]
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def parse_lora_config(keys: ConfigKeys) -> LoraConfig:
    """Check every key; absent ones have PEFT's defaults.

    Raises    AdapterError naming the key, its value and what to do.
    """
    keys.check(READ_KEYS, INERT_KEYS, REFUSED_KEYS)
    if keys.get("bias", "none") != "none":
        raise keys.refusal("bias", "trained biases are not supported yet; only 'none' is")
    _check_init(keys, keys.get("init_lora_weights", True))
    return LoraConfig(
        selection=keys.selection(),
        rank=keys.rank("r", 8),
        alpha=keys.number("lora_alpha", 8),
        is_rank_stabilized=keys.flag("use_rslora"),
        rank_patterns=keys.rank_patterns("rank_pattern"),
        alpha_patterns=keys.number_patterns("alpha_pattern"),
    )


def _check_init(keys: ConfigKeys, init: Any) -> None:
    if init is None or isinstance(init, bool):
        return
    name = init.lower() if isinstance(init, str) else ""
    if name in PLAIN_INITS:
        return
    if name.startswith(CONVERTIBLE_INITS):
        advice = (
            "it changed the base weights; save the adapter as plain LoRA with PEFT's"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    elif name == "loftq":
        advice = "it belongs to a quantised base, not to this one; train it on the base as it is"
    else:
        advice = f"it must be true, false or one of {', '.join(PLAIN_INITS)}"
    raise keys.refusal("init_lora_weights", advice)
