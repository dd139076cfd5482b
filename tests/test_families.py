"""config.json of each family, in both spellings: read as transformers reads it, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch

from loraswarm.core.base_shape import TARGETS
from loraswarm.errors import ConfigError
from loraswarm.models.config import DecoderConfig, Llama3Scaling
from loraswarm.models.config_keys import ConfigKeys
from loraswarm.models.families import FAMILIES, decoder_config
from loraswarm.models.source import read_config
from model_factory import VARIANTS, load_reference, save_tiny_model

SIZES = {
    "vocab_size": 133,
    "hidden_size": 128,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIZES, **changes}


def spelled_as_before_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    old["torch_dtype"] = old.pop("dtype")
    return old


def assert_agrees_with_transformers(ours: DecoderConfig, config: dict[str, Any]) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(**config)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_size = getattr(theirs, "head_dim", None)
    assert ours.head_size == (head_size or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.ties_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    scaling = theirs.rope_parameters["rope_type"]
    assert (ours.rope_scaling is not None) == (scaling == "llama3")
    layer_types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.num_layers
    window = getattr(theirs, "sliding_window", None)
    assert ours.windows == tuple(
        window if name == "sliding_attention" else None for name in layer_types
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_config_is_read_as_transformers_reads_it(variant, tmp_path):
    config = read_config(save_tiny_model(tmp_path, variant))
    ours = decoder_config(config)
    assert_agrees_with_transformers(ours, config)
    assert (ours.vocab_size, ours.hidden_size, ours.num_layers) == (133, 48, 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_spellings_of_a_config_mean_the_same(variant, tmp_path):
    config = read_config(save_tiny_model(tmp_path, variant))
    old = spelled_as_before_transformers_5(config)
    assert "rope_parameters" not in old
    assert decoder_config(old) == decoder_config(config)
    assert ConfigKeys(old).dtype_name() == ConfigKeys(config).dtype_name() == "float32"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(model_type):
    config = config_of(model_type)
    assert_agrees_with_transformers(decoder_config(config), config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_null_kv_heads_mean_one_per_query_head(model_type):
    config = config_of(model_type, num_key_value_heads=None)
    assert decoder_config(config).num_kv_heads == 32


def test_mistral_without_a_window_attends_to_everything():
    assert decoder_config(config_of("mistral")).windows == (4096,) * 3
    assert decoder_config(config_of("mistral", sliding_window=None)).windows == (None,) * 3


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_windows_follow_switch_then_layer_types_then_first_layer(model_type):
    sliding = {"use_sliding_window": True, "sliding_window": 7}
    off = config_of(model_type, sliding_window=7, max_window_layers=0)
    by_count = config_of(model_type, max_window_layers=2, **sliding)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    by_name = config_of(model_type, max_window_layers=0, layer_types=types, **sliding)
    assert decoder_config(off).windows == (None, None, None)
    assert decoder_config(by_count).windows == (None, None, 7)
    assert decoder_config(by_name).windows == (7, None, 7)
    for config in (off, by_count, by_name):
        assert_agrees_with_transformers(decoder_config(config), config)


def test_biases_and_norms_follow_the_family():
    parts = ("has_qkv_bias", "has_o_bias", "has_mlp_bias", "has_qk_norm")

    def parts_of(model_type: str, **changes: Any) -> tuple[bool, ...]:
        config = decoder_config(config_of(model_type, **changes))
        return tuple(getattr(config, part) for part in parts)

    assert parts_of("llama") == (False, False, False, False)
    assert parts_of("llama", attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert parts_of("mistral") == (False, False, False, False)
    assert parts_of("qwen2") == (True, False, False, False)
    assert parts_of("qwen3") == (False, False, False, True)
    assert parts_of("qwen3", attention_bias=True) == (True, True, False, True)


def test_rope_scaling_of_llama_3_is_read_from_either_section():
    expected = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    old = config_of(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    new = config_of(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    for config in (old, new):
        assert decoder_config(config).rope_scaling == expected
        assert decoder_config(config).rope_theta == 5e5


def test_rope_theta_inside_a_section_wins_as_in_transformers():
    inside = {"rope_type": "default", "rope_theta": 3e4}
    config = config_of(rope_theta=5e5, rope_parameters=inside)
    assert decoder_config(config).rope_theta == 3e4
    assert_agrees_with_transformers(decoder_config(config), config)


def test_shape_gives_adapters_the_size_of_every_target():
    config = decoder_config(config_of("qwen3", num_key_value_heads=8, head_dim=10))
    shape = config.shape()
    sizes = dict(zip(TARGETS, shape.target_sizes, strict=True))
    assert sizes["q_proj"] == (128, 320)
    assert sizes["k_proj"] == sizes["v_proj"] == (128, 80)
    assert sizes["o_proj"] == (320, 128)
    assert sizes["gate_proj"] == sizes["up_proj"] == (128, 70)
    assert sizes["down_proj"] == (70, 128)
    assert (shape.num_layers, shape.num_kv_heads, shape.head_size) == (3, 8, 10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shape_names_every_module_an_adapter_can_change_as_transformers_does(variant, tmp_path):
    path = save_tiny_model(tmp_path, variant)
    shape = decoder_config(read_config(path)).shape()
    model = load_reference(path, torch.float32)
    weights = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if hasattr(module, "weight")
    }
    norms = {name: sizes[0] for name, sizes in weights.items() if len(sizes) == 1}
    assert shape.norm_sizes() == norms
    paths = {shape.site_path(site): site for site in range(shape.head_site + 1)}
    assert paths.keys() == weights.keys() - norms.keys()
    for name, site in paths.items():
        in_features, out_features = shape.site_sizes(site)
        is_linear = site != shape.embedding_site
        rows = (out_features, in_features) if is_linear else (in_features, out_features)
        assert weights[name] == rows, name
        has_bias = getattr(model.get_submodule(name), "bias", None) is not None
        assert shape.has_bias(site) == has_bias, name
    assert shape.ties_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    bounds = shape.head_bounds()
    assert (bounds[0], bounds[-1]) == (0, shape.vocab_size)
    assert all(0 < high - low <= shape.widest() for low, high in pairwise(bounds))
    assert len(bounds) == shape.num_sites() - shape.head_site + 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'.*llama, mistral, qwen2, qwen3"),
    ({"model_type": None}, "model_type is None"),
    ({"model_type": ["llama"]}, "model_type is"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu'"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": "128"}, "hidden_size is '128'"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"hidden_size": 97}, "hidden_size is 97.*multiple of 32"),
    ({"head_dim": 7}, "head_dim is 7.*even"),
    ({"num_key_value_heads": 5}, "num_attention_heads is 32.*multiple.*5"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    ({"rms_norm_eps": None}, "rms_norm_eps is null"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1.*true or false"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'.*'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor is 2.0 in rope_scaling"),
    ({"rope_parameters": {"full_attention": {}}}, "full_attention is {} in rope_parameters"),
    ({"rope_parameters": ["default"]}, "rope_parameters is"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no 'low_freq_factor'"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "more than"),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "a list of 3 names"),
    ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 3}, "linear_attention"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "no sliding_window"),
    ({"model_type": "qwen3", "max_window_layers": -1}, "max_window_layers is -1"),
    ({"model_type": "qwen3", "head_dim": None}, "head_dim is null"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_we_cannot_compute_is_refused_by_key_and_value(changes, message):
    with pytest.raises(ConfigError, match=message):
        decoder_config(config_of() | changes)


@pytest.mark.parametrize("key", [*SIZES, "model_type"])
def test_a_missing_size_is_refused_by_name(key):
    config = config_of()
    del config[key]
    with pytest.raises(ConfigError, match=key):
        decoder_config(config)


def test_a_dtype_we_do_not_compute_in_is_refused():
    with pytest.raises(ConfigError, match="torch_dtype is 'float64'"):
        ConfigKeys({"torch_dtype": "float64"}).dtype_name()


PUBLISHED = {
    "llama-3.2-1b": """{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": {"factor": 32.0,
        "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
        "original_max_position_embeddings": 8192}, "attention_bias": false, "mlp_bias": false,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "pretraining_tp": 1}""",
    "llama-2-7b": """{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "max_position_embeddings": 4096, "rope_scaling": null, "tie_word_embeddings": false,
        "torch_dtype": "float16"}""",
    "mistral-7b-v0.1": """{"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16"}""",
    "qwen2.5-0.5b": """{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-06,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": 32768,
        "use_sliding_window": false, "max_window_layers": 21, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16"}""",
    "qwen3-0.6b": """{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-06,
        "max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": null,
        "attention_bias": false, "sliding_window": null, "use_sliding_window": false,
        "max_window_layers": 28, "tie_word_embeddings": true, "torch_dtype": "bfloat16"}""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_as_transformers_reads_them(name):
    config = json.loads(PUBLISHED[name])
    assert_agrees_with_transformers(decoder_config(config), config)


def test_reading_a_config_needs_no_torch():
    program = "import sys, loraswarm.models.families, loraswarm.models.source; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loraswarm.models.families" in done.stdout.split()
    assert "torch" not in done.stdout.split()
