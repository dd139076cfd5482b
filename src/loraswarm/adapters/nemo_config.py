"""The model_config.yaml of a NeMo LoRA adapter, checked, and the PEFT config that says the same.

Knows no tensors. Called by adapters/nemo_archive.
Source    NVIDIA/NeMo 2.0: nemo/collections/nlp/parts/peft_config.py (what each key means),
          .../adapters/parallel_adapters.py (the update: alpha / adapter_dim * out(in(x))).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loraswarm.adapters.bounded_yaml import read_yaml
from loraswarm.adapters.config_keys import MAX_ALPHA, MAX_LAYER, MAX_RANK
from loraswarm.adapters.printable import one_line, shortened
from loraswarm.errors import AdapterError

CONFIG_MEMBER = "model_config.yaml"
MAX_RANKS = 1024
TARGET_GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention_qkv": ("q_proj", "k_proj", "v_proj"),
    "attention_dense": ("o_proj",),
    "mlp_fc1": ("gate_proj", "up_proj"),
    "mlp_fc2": ("down_proj",),
}
_TARGETS = {
    **TARGET_GROUPS,
    "attention": (*TARGET_GROUPS["attention_qkv"], *TARGET_GROUPS["attention_dense"]),
    "mlp": (*TARGET_GROUPS["mlp_fc1"], *TARGET_GROUPS["mlp_fc2"]),
    "all": tuple(target for targets in TARGET_GROUPS.values() for target in targets),
}
_READ_KEYS = {"adapter_dim", "alpha", "variant", "target_modules", "layer_selection"}
_INERT_KEYS = {
    "a2a_experimental",
    "adapter_dropout",
    "column_init_method",
    "dropout_position",
    "row_init_method",
}
_REFUSED_KEYS = {
    "position_embedding_strategy": "embeddings of layer positions are not supported",
    "weight_tying": "adapters tied across layers are not supported",
}
_REFUSED_MODEL_KEYS = {
    "account_for_embedding_in_pipeline_split": "stages then have layers of unequal number",
    "account_for_loss_in_pipeline_split": "stages then have layers of unequal number",
    "num_layers_in_first_pipeline_stage": "stages then have layers of unequal number",
    "num_layers_in_last_pipeline_stage": "stages then have layers of unequal number",
    "rotary_interleaved": "this base pairs the halves of a head in its rotary embedding",
}
# How configs write that alpha follows adapter_dim; NeMo's own default.
_SAME_AS_DIM = ("${model.peft.lora_tuning.adapter_dim}", "${peft.lora_tuning.adapter_dim}")


@dataclass(frozen=True, slots=True)
class NemoConfig:
    """What the tensors are, and how they were cut for training.

    `heads` is (heads, groups of heads, channels of a head), None where the config does not say;
    only fused adapters of q, k and v need it. `layers` counts from 0; None is all.
    """

    rank: int
    alpha: float
    targets: frozenset[str]
    layers: tuple[int, ...] | None
    heads: tuple[int, int, int] | None
    num_layers: int | None
    tensor_parallel: int
    pipeline_parallel: int

    def checkpoints(self) -> list[list[str]]:
        """Names of the weights' members: for each pipeline stage, one for each tensor rank."""
        if self.tensor_parallel == self.pipeline_parallel == 1:
            return [["model_weights.ckpt"]]
        if self.pipeline_parallel == 1:
            folders = [[f"mp_rank_{rank:02d}" for rank in range(self.tensor_parallel)]]
        else:
            folders = [
                [f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" for rank in range(self.tensor_parallel)]
                for stage in range(self.pipeline_parallel)
            ]
        return [[f"{folder}/model_weights.ckpt" for folder in stage] for stage in folders]

    def peft_config(self, targets: Iterable[str]) -> bytes:
        """The adapter_config.json of the same update, for the `targets` that have tensors."""
        config: dict[str, Any] = {
            "base_model_name_or_path": None,
            "bias": "none",
            "inference_mode": True,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": sorted(targets),
            "task_type": "CAUSAL_LM",
        }
        if self.layers is not None:
            config["layers_to_transform"] = list(self.layers)
        return json.dumps(config, indent=2).encode()


def parse_nemo_config(text: bytes, label: str) -> NemoConfig:
    """Check every key that bears on the update.

    Raises    AdapterError naming `label`, the key and its value.
    """
    keys = _Keys(read_yaml(text, f"{label}: {CONFIG_MEMBER}"), "", label)
    scheme = keys.section("peft").get("peft_scheme")
    if scheme != "lora":
        raise keys.section("peft").refusal("peft_scheme", "only 'lora' is supported")
    for key, reason in _REFUSED_MODEL_KEYS.items():
        if keys.get(key) not in (None, False, 0):
            raise keys.refusal(key, reason)
    if keys.get("virtual_pipeline_model_parallel_size") not in (None, 1):
        raise keys.refusal("virtual_pipeline_model_parallel_size", "stages are then interleaved")
    tuning = keys.section("peft").section("lora_tuning")
    tuning.check(_READ_KEYS | _INERT_KEYS, _REFUSED_KEYS)
    if tuning.get("variant", "nemo") not in ("nemo", "canonical"):
        raise tuning.refusal("variant", "it must be 'nemo' or 'canonical'")
    rank = tuning.count("adapter_dim", MAX_RANK)
    config = NemoConfig(
        rank=rank,
        alpha=_alpha(tuning, rank),
        targets=_targets(tuning),
        layers=_layers(tuning),
        heads=_heads(keys),
        num_layers=keys.count("num_layers", MAX_LAYER) if "num_layers" in keys.values else None,
        tensor_parallel=keys.count("tensor_model_parallel_size", MAX_RANKS, default=1),
        pipeline_parallel=keys.count("pipeline_model_parallel_size", MAX_RANKS, default=1),
    )
    _check_cut(keys, config)
    return config


class _Keys:
    """A mapping in the config; `prefix` is the path to it."""

    def __init__(self, values: Mapping[str, Any], prefix: str, label: str) -> None:
        self.values = values
        self._prefix = prefix
        self._label = label

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def section(self, key: str) -> _Keys:
        values = self.values.get(key)
        if not isinstance(values, dict):
            raise self.refusal(key, "it must be a mapping, as NeMo writes it for LoRA")
        return _Keys(values, f"{self._prefix}{key}.", self._label)

    def refusal(self, key: str, reason: str) -> AdapterError:
        value = shortened(self.values.get(key))
        # YAML has keys that are no text.
        name = one_line(self._prefix + (key if isinstance(key, str) else shortened(key)))
        return AdapterError(f"{self._label}: {CONFIG_MEMBER}: {name} is {value}: {reason}")

    def count(self, key: str, limit: int, default: int | None = None) -> int:
        """A whole number from 1 on; `default` where the key is absent or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= limit:
            raise self.refusal(key, f"it must be a whole number from 1 to {limit}")
        return value

    def check(self, known: set[str], refused: Mapping[str, str]) -> None:
        """Refuse `refused` keys that are on, and keys that nobody knows."""
        for key, value in self.values.items():
            if key in known or value is None or value is False or value in ("", [], {}):
                continue
            reason = "this key is unknown and may change the result; set it to null if not"
            raise self.refusal(key, refused.get(key, reason))


def _alpha(tuning: _Keys, rank: int) -> float:
    value = tuning.get("alpha")
    if value is None or value in _SAME_AS_DIM:
        return rank
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_ALPHA:
        raise tuning.refusal("alpha", "it must be a number")
    return float(value)


def _targets(tuning: _Keys) -> frozenset[str]:
    names = tuning.get("target_modules", ["attention_qkv"])
    if not isinstance(names, list) or not names:
        raise tuning.refusal("target_modules", "it must be a list of modules")
    for name in names:
        if not isinstance(name, str) or name not in _TARGETS:
            raise tuning.refusal("target_modules", f"supported: {', '.join(_TARGETS)}")
    return frozenset(target for name in names for target in _TARGETS[name])


def _layers(tuning: _Keys) -> tuple[int, ...] | None:
    """From 1 on in the file, from 0 on here."""
    layers = tuning.get("layer_selection")
    if layers is None:
        return None
    if not isinstance(layers, list) or not layers:
        raise tuning.refusal("layer_selection", "it must be null or a list of layers")
    if not all(type(layer) is int and 1 <= layer <= MAX_LAYER for layer in layers):
        raise tuning.refusal("layer_selection", "layers count from 1")
    return tuple(sorted({layer - 1 for layer in layers}))


def _heads(keys: _Keys) -> tuple[int, int, int] | None:
    if keys.get("num_attention_heads") is None:
        return None
    heads = keys.count("num_attention_heads", MAX_RANK)
    groups = keys.count("num_query_groups", MAX_RANK, default=heads)
    if heads % groups:
        raise keys.refusal("num_query_groups", f"it must divide num_attention_heads, {heads}")
    if keys.get("kv_channels") is not None:
        return heads, groups, keys.count("kv_channels", MAX_RANK)
    hidden_size = keys.count("hidden_size", MAX_RANK)
    if hidden_size % heads:
        raise keys.refusal("hidden_size", f"num_attention_heads, {heads}, does not divide it")
    return heads, groups, hidden_size // heads


def _check_cut(keys: _Keys, config: NemoConfig) -> None:
    stages = config.pipeline_parallel
    if stages > 1 and (config.num_layers is None or config.num_layers % stages):
        raise keys.refusal("num_layers", f"it must be a multiple of {stages}, the pipeline stages")
    if config.heads is not None and config.heads[1] % config.tensor_parallel:
        raise keys.refusal(
            "num_query_groups",
            f"groups of heads cannot be told apart in {config.tensor_parallel} parts",
        )
