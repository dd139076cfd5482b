"""PEFT's adapter_config.json, checked key by key: what the update is, or why we cannot compute it.

Every key is read, known to have no effect on the result, or refused by name when it is on; so is a
key that we do not know. Knows no tensors and no base. Called by adapters/peft.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loraswarm.adapters import module_selection
from loraswarm.adapters.module_selection import ModuleSelection, Value, find_pattern
from loraswarm.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 1_000_000
MAX_ALPHA = 1e30
MAX_LAYER = 1_000_000

READ_KEYS = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
    }
)
# About training, bookkeeping, or in effect only together with a key that is read or refused.
INERT_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
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

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80


@dataclass(frozen=True, slots=True)
class PeftLoraConfig:
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
        return "r" if found is None else f"rank_pattern[{_shortened.repr(found[0])}]"

    def scale_of(self, path: str) -> float:
        """What multiplies B A x of the module at `path`."""
        rank = self.rank_of(path)
        found = find_pattern(self.alpha_patterns, path)
        alpha = self.alpha if found is None else found[1]
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def parse_config(text: bytes) -> PeftLoraConfig:
    """Check a whole adapter_config.json; absent keys have PEFT's defaults.

    Raises    AdapterError naming the key, its value and what to do.
    """
    keys = _decode(text)
    _check_method(keys)
    _check_init(keys.get("init_lora_weights", True))
    return PeftLoraConfig(
        selection=_selection(keys),
        rank=_rank("r", keys.get("r", 8)),
        alpha=_alpha("lora_alpha", keys.get("lora_alpha", 8)),
        is_rank_stabilized=_flag(keys, "use_rslora"),
        rank_patterns=_patterns(keys, "rank_pattern", _rank),
        alpha_patterns=_patterns(keys, "alpha_pattern", _alpha),
    )


def _decode(text: bytes) -> dict[str, Any]:
    try:
        keys = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "not UTF-8 JSON"
        raise AdapterError(f"{CONFIG_FILE} cannot be read as JSON: {reason}") from None
    if not isinstance(keys, dict):
        raise AdapterError(f"{CONFIG_FILE} is not a JSON object")
    return keys


def _check_method(keys: Mapping[str, Any]) -> None:
    peft_type = keys.get("peft_type")
    if peft_type != "LORA":
        raise _refusal(
            "peft_type", peft_type, "only 'LORA' is supported; PEFT's save_as_lora converts many"
        )
    for key, reason in REFUSED_KEYS.items():
        value = keys.get(key)
        if not (value is None or value is False or value == [] or value == ""):
            raise _refusal(key, value, reason)
    if keys.get("bias", "none") != "none":
        raise _refusal("bias", keys["bias"], "trained biases are not supported yet; only 'none' is")
    for key in sorted(keys.keys() - READ_KEYS - INERT_KEYS - REFUSED_KEYS.keys()):
        value = keys[key]
        is_off = value is None or value is False or (value in ("", [], {}))
        if not is_off:
            raise _refusal(
                key, value, "this key is unknown and may change the result; set it to null if not"
            )


def _check_init(init: Any) -> None:
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
    raise _refusal("init_lora_weights", init, advice)


def _selection(keys: Mapping[str, Any]) -> ModuleSelection:
    targets = _names(keys, "target_modules")
    layers = _layers(keys.get("layers_to_transform"))
    patterns = _names(keys, "layers_pattern")
    if not targets:
        raise _refusal("target_modules", keys.get("target_modules"), "name the adapted modules")
    for key in ("layers_to_transform", "layers_pattern"):
        if isinstance(targets, str) and keys.get(key) is not None:
            raise _refusal(key, keys[key], "target_modules must then be a list")
    if patterns and keys.get("layers_to_transform") is None:
        raise _refusal("layers_pattern", keys["layers_pattern"], "layers_to_transform is missing")
    listed = keys.get("layers_pattern") or []
    ordered = (listed,) if isinstance(listed, str) else tuple(listed)
    for pattern in ordered:
        _check_expression("layers_pattern", module_selection.layer_expression(pattern))
    return ModuleSelection(targets, _names(keys, "exclude_modules"), layers, ordered)


def _names(keys: Mapping[str, Any], key: str) -> str | frozenset[str]:
    """A list of names, or one string: a regular expression."""
    value = keys.get(key)
    if value is None:
        return frozenset()
    if isinstance(value, str):
        _check_expression(key, value)
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    raise _refusal(key, value, "it must be a list of names or one regular expression")


def _layers(value: Any) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and abs(layer) <= MAX_LAYER for layer in layers):
        raise _refusal("layers_to_transform", value, "it must be a layer index or a list of them")
    return frozenset(layers)


def _patterns(
    keys: Mapping[str, Any], key: str, number: Callable[[str, Any], Value]
) -> tuple[tuple[str, Value], ...]:
    mapping = keys.get(key)
    if mapping is None:
        return ()
    if not isinstance(mapping, dict):
        raise _refusal(key, mapping, "it must map module names to numbers")
    patterns = []
    for pattern, value in mapping.items():
        label = f"{key}[{_shortened.repr(pattern)}]"
        _check_expression(label, module_selection.key_expression(pattern))
        patterns.append((pattern, number(label, value)))
    return tuple(patterns)


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _refusal(key, value, f"it must be a whole number from 1 to {MAX_RANK}")
    return value


def _alpha(key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_ALPHA:
        raise _refusal(key, value, f"it must be a number between -{MAX_ALPHA:g} and {MAX_ALPHA:g}")
    return float(value)


def _flag(keys: Mapping[str, Any], key: str) -> bool:
    value = keys.get(key)
    if value is not None and not isinstance(value, bool):
        raise _refusal(key, value, "it must be true or false")
    return bool(value)


def _check_expression(key: str, expression: str) -> None:
    try:
        module_selection.compiled(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{CONFIG_FILE}: {key} is not a valid regular expression: {error}"
        ) from None


def _refusal(key: str, value: Any, reason: str) -> AdapterError:
    return AdapterError(f"{CONFIG_FILE}: {key} is {_shortened.repr(value)}: {reason}")
