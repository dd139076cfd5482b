"""MiSS, DeLoRA, LoHa, LoKr, GraLoRA and BEFT: what is not applied exactly is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from adapter_factory import shape_of, tiny_llama
from general_form import read, save_peft
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.errors import AdapterError
from strict_loading import changed, refusal

pytestmark = pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias")
TARGETS = ["q_proj", "down_proj"]
PATH = "base_model.model.model.layers.0.self_attn.q_proj"
# What PEFT makes, and the tensors of one module by the end of their names.
METHODS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "miss": (peft.MissConfig(r=5, target_modules=TARGETS), ("miss_block",)),
    "delora": (
        peft.DeloraConfig(r=3, target_modules=TARGETS),
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    ),
    "loha": (
        peft.LoHaConfig(r=2, target_modules=TARGETS),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ),
    "lokr": (
        peft.LoKrConfig(r=2, decompose_both=True, target_modules=TARGETS),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    ),
    "gralora": (
        peft.GraloraConfig(r=2, hybrid_r=1, target_modules=TARGETS),
        ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
    ),
    "beft": (peft.BeftConfig(target_modules=TARGETS), ("beft_bias",)),
}
TENSORS = [(method, suffix) for method, (_, suffixes) in METHODS.items() for suffix in suffixes]
WITH_RANK = [method for method in METHODS if method != "beft"]
# What is about training only: accepted with any value.
TRAINING_KEYS: dict[str, dict[str, Any]] = {
    "miss": {"miss_dropout": 0.5, "init_weights": False, "mini_r": 3},
    "delora": {"delora_lambda": 3, "lambda_pattern": {"q_proj": 2}, "module_dropout": 0.5},
    "loha": {"rank_dropout": 0.5, "module_dropout": 0.5, "use_effective_conv2d": True},
    "lokr": {"rank_dropout": 0.5, "rank_dropout_scale": True, "init_weights": "lycoris"},
    "gralora": {"gralora_dropout": 0.5, "init_weights": False},
    "beft": {"init_weights": False},
}
# Method, key, value, what the message must say besides.
REFUSED_VALUES: list[tuple[str, str, Any, str]] = [
    ("miss", "init_weights", "bat", "full rank"),
    ("miss", "init_weights", "other", "'mini'"),
    ("miss", "r", 37, "36 inputs"),
    ("miss", "bias", "MiSS_only", "'none'"),
    ("delora", "bias", "all", "'none'"),
    ("gralora", "bias", "gralora_only", "'none'"),
    ("gralora", "gralora_k", 3, "divide r"),
    ("gralora", "gralora_k", 0, "from 1"),
    ("gralora", "hybrid_r", -1, "from 1"),
    ("lokr", "decompose_factor", 2.0, "whole number"),
    ("lokr", "decompose_factor", True, "whole number"),
    ("lokr", "decompose_both", "yes", "true or false"),
    ("loha", "alpha", "8", "number"),
    ("lokr", "alpha", None, "number"),
    ("gralora", "alpha", float("nan"), "number"),
    ("loha", "rank_pattern", {"q_proj": 0}, "from 1"),
    ("lokr", "alpha_pattern", {"q_proj": "x"}, "number"),
    ("delora", "rank_pattern", [3], "map"),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(num_layers=1)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> dict[str, Path]:
    paths = {}
    for method, (config, _) in METHODS.items():
        paths[method] = tmp_path_factory.mktemp(method)
        save_peft(model, paths[method], config)
    return paths


@pytest.mark.parametrize("method", METHODS)
def test_an_unchanged_adapter_is_accepted(method, model, saved):
    assert read_adapter_info(saved[method], "a", shape_of(model)).method == method


@pytest.mark.parametrize(("method", "suffix"), TENSORS)
def test_a_missing_tensor_is_refused_by_name(method, suffix, model, saved, tmp_path):
    name = f"{PATH}.{suffix}"
    path = changed(saved[method], tmp_path, tensors=lambda weights: weights.pop(name))
    assert f"{name!r}, which the config calls for, is missing" in refusal(model, path)


@pytest.mark.parametrize(("method", "suffix"), TENSORS)
def test_a_renamed_tensor_is_refused_by_name(method, suffix, model, saved, tmp_path):
    name, other = f"{PATH}.{suffix}", f"{PATH}.{suffix}_other"

    def rename(weights):
        weights[other] = weights.pop(name)

    assert repr(other) in refusal(model, changed(saved[method], tmp_path, tensors=rename))


@pytest.mark.parametrize(("method", "suffix"), TENSORS)
def test_a_tensor_of_another_shape_is_refused_by_name(method, suffix, model, saved, tmp_path):
    name = f"{PATH}.{suffix}"

    def widen(weights):
        weights[name] = torch.cat([weights[name], weights[name]], dim=-1)

    message = refusal(model, changed(saved[method], tmp_path, tensors=widen))
    assert repr(name) in message
    assert "shape" in message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extra", [f"{PATH}.lokr_t2", f"{PATH}.base_layer.bias", "hada_t1"])
def test_an_extra_tensor_is_refused_by_name(method, extra, model, saved, tmp_path):
    def add(weights):
        weights[extra] = torch.ones(2)

    assert repr(extra) in refusal(model, changed(saved[method], tmp_path, tensors=add))


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_key_that_is_on_is_refused(method, model, saved, tmp_path):
    path = changed(saved[method], tmp_path, {"brand_new_key": 1})
    assert "brand_new_key" in refusal(model, path)


@pytest.mark.parametrize("method", METHODS)
def test_keys_about_training_change_nothing(method, model, saved, tmp_path):
    path = changed(saved[method], tmp_path, TRAINING_KEYS[method])
    assert read_adapter_info(path, "a", shape_of(model)).method == method


@pytest.mark.parametrize("method", WITH_RANK)
@pytest.mark.parametrize("rank", [0, -1, None, 2.0, "8"])
def test_a_rank_that_is_none_is_refused(method, rank, model, saved, tmp_path):
    assert "r is " in refusal(model, changed(saved[method], tmp_path, {"r": rank}))


@pytest.mark.parametrize(("method", "key", "value", "said"), REFUSED_VALUES)
def test_a_value_that_cannot_be_applied_is_refused(
    method, key, value, said, model, saved, tmp_path
):
    message = refusal(model, changed(saved[method], tmp_path, {key: value}))
    assert key in message
    assert said in message


@pytest.mark.parametrize("method", METHODS)
def test_the_embedding_is_refused(method, model, saved, tmp_path):
    path = changed(saved[method], tmp_path, {"target_modules": ["embed_tokens"]})
    assert "'model.embed_tokens'" in refusal(model, path)


@pytest.mark.parametrize("method", METHODS)
def test_targets_that_select_nothing_are_refused(method, model, saved, tmp_path):
    path = changed(saved[method], tmp_path, {"target_modules": ["c_attn"]})
    assert "selects no linear" in refusal(model, path)


@pytest.mark.parametrize(("method", "suffix"), TENSORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(
    method, suffix, value, model, saved, tmp_path
):
    name = f"{PATH}.{suffix}"

    def spoil(weights):
        weights[name].view(-1)[-1] = value

    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        read(model, changed(saved[method], tmp_path, tensors=spoil))
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("method", ["loha", "lokr", "delora"])
def test_products_beyond_float16_are_refused(method, model, saved, tmp_path):
    def enlarge(weights):
        for tensor in weights.values():
            tensor.mul_(1e4)

    path = changed(saved[method], tmp_path, tensors=enlarge)
    read(model, path)
    with pytest.raises(AdapterError, match="float16 ends at"):
        read(model, path, torch.float16)


@pytest.mark.parametrize(
    ("config", "module", "rank", "limit"),
    [
        # 36 x 36: 18 ranks take as much as the weight; 52 x 36: 21
        (peft.LoHaConfig(r=5, target_modules=["q_proj"]), "q_proj", 25, 18),
        (peft.LoKrConfig(r=4, target_modules=["q_proj"]), "q_proj", 36, 18),
        (peft.GraloraConfig(r=8, hybrid_r=3, target_modules=["q_proj"]), "q_proj", 19, 18),
        (peft.LoHaConfig(r=5, target_modules=["down_proj"]), "down_proj", 25, 21),
    ],
    ids=lambda value: getattr(value, "peft_type", None),
)
def test_an_update_larger_than_the_weight_is_refused(config, module, rank, limit, model, tmp_path):
    save_peft(model, tmp_path, config)
    message = refusal(model, tmp_path)
    assert module in message
    assert f"rank {rank}; up to {limit} " in message
    assert "save_as_lora" in message


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=4, target_modules=["q_proj"]),
        peft.LoKrConfig(r=3, target_modules=["q_proj"], decompose_both=True, decompose_factor=4),
        peft.GraloraConfig(r=8, hybrid_r=2, target_modules=["q_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_an_update_as_large_as_the_weight_is_accepted(config, model, tmp_path):
    save_peft(model, tmp_path, config)
    (module,) = read(model, tmp_path).info.modules
    assert 12 <= module.rank <= 18


def test_miss_blocks_that_do_not_divide_the_outputs_are_refused(model, tmp_path):
    config = peft.MissConfig(r=5, init_weights="mini", mini_r=4, target_modules=TARGETS)
    save_peft(model, tmp_path / "saved", config)
    path = changed(tmp_path / "saved", tmp_path / "changed", {"mini_r": 5})
    message = refusal(model, path)
    assert "mini_r is 5" in message
    assert "36 outputs" in message


def test_gralora_blocks_that_do_not_divide_the_sizes_are_refused(model, saved, tmp_path):
    path = changed(saved["gralora"], tmp_path, {"gralora_k": 8, "r": 8})
    assert "gralora_k is 8" in refusal(model, path)
