"""The model families we serve: config.json of each, read into the one DecoderConfig.

Knows no tensors and no files beyond the dictionary it is given. A family differs from the others in
defaults for absent keys, which are those of its transformers config class, and in optional parts.
Called by engine/setup and by whatever checks adapters against a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from loraswarm.errors import ConfigError
from loraswarm.models.config import DecoderConfig
from loraswarm.models.config_keys import SLIDING_ATTENTION, ConfigKeys


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json of any known family.

    Raises    ConfigError naming the key, its value and what is allowed.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ConfigError(
            f"model_type is {model_type!r} in config.json; we serve {', '.join(sorted(FAMILIES))}"
        )
    keys = ConfigKeys(config)
    keys.require("quantization_config", None)
    keys.require("hidden_act", "silu", default="silu")
    return family(keys)


def _llama(keys: ConfigKeys) -> DecoderConfig:
    """Llama 2, 3, 3.1 and 3.2."""
    has_attention_bias = keys.flag("attention_bias")
    return dataclasses.replace(
        _base(keys, max_position=2048, num_kv_heads=None),
        has_qkv_bias=has_attention_bias,
        has_o_bias=has_attention_bias,
        has_mlp_bias=keys.flag("mlp_bias"),
    )


def _mistral(keys: ConfigKeys) -> DecoderConfig:
    """Mistral: one sliding window in every layer, or none."""
    keys.require("layer_types", None)
    base = _base(keys, max_position=131_072, num_kv_heads=8)
    window = keys.optional_size("sliding_window", 4096)
    return dataclasses.replace(base, windows=(window,) * base.num_layers)


def _qwen2(keys: ConfigKeys) -> DecoderConfig:
    """Qwen 2 and 2.5: biases on q, k and v; sliding windows in some layers, if switched on."""
    base = _base(keys, max_position=32_768, num_kv_heads=32)
    return dataclasses.replace(base, has_qkv_bias=True, windows=_windows(keys, base.num_layers))


def _qwen3(keys: ConfigKeys) -> DecoderConfig:
    """Qwen 3: norms on q and k, and a head size of its own."""
    has_attention_bias = keys.flag("attention_bias")
    base = _base(keys, max_position=32_768, num_kv_heads=32, head_size=128)
    return dataclasses.replace(
        base,
        has_qk_norm=True,
        has_qkv_bias=has_attention_bias,
        has_o_bias=has_attention_bias,
        windows=_windows(keys, base.num_layers),
    )


FAMILIES: Mapping[str, Callable[[ConfigKeys], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def _base(
    keys: ConfigKeys, max_position: int, num_kv_heads: int | None, head_size: int | None = None
) -> DecoderConfig:
    """What every family has. The arguments stand in for absent keys; None derives the value."""
    num_heads = keys.size("num_attention_heads")
    num_layers = keys.size("num_hidden_layers")
    theta, scaling = keys.rope()
    return DecoderConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=keys.size("hidden_size"),
        intermediate_size=keys.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.optional_size("num_key_value_heads", num_kv_heads) or num_heads,
        head_size=_head_size(keys, head_size, num_heads),
        max_position=keys.size("max_position_embeddings", max_position),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        ties_embeddings=keys.flag("tie_word_embeddings"),
        windows=(None,) * num_layers,
    )


def _head_size(keys: ConfigKeys, default: int | None, num_heads: int) -> int:
    if default is not None:
        return keys.size("head_dim", default)
    given = keys.optional_size("head_dim", None)
    if given is not None:
        return given
    hidden_size = keys.size("hidden_size")
    if hidden_size % num_heads:
        raise keys.refusal("hidden_size", hidden_size, f"a multiple of {num_heads} attention heads")
    return hidden_size // num_heads


def _windows(keys: ConfigKeys, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's windows: from `max_window_layers` on, unless `layer_types` names the layers."""
    window = keys.optional_size("sliding_window", 4096)
    if not keys.flag("use_sliding_window"):
        window = None
    layer_types = keys.layer_types(num_layers)
    if layer_types is None:
        first = keys.count("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if window is None and SLIDING_ATTENTION in layer_types:
        raise keys.refusal(
            "layer_types", layer_types, "without sliding_attention while no sliding_window is used"
        )
    return tuple(window if name == SLIDING_ATTENTION else None for name in layer_types)
