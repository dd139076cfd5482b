"""AdaLoRA, VeRA, VB-LoRA, (IA)^3 and Tied-LoRA: what is not applied exactly is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from adapter_factory import shape_of, tiny_llama
from general_form import read, save_peft
from loraswarm.adapters.methods import adalora, ia3, tied_lora, vblora, vera
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.errors import AdapterError
from strict_loading import changed, refusal
from tied_lora import TiedLoraModel, TiedLoraRecipe

TARGETS = ["q_proj", "down_proj"]
PATH = "base_model.model.model.layers.0.self_attn.q_proj"
VBLORA = {"r": 3, "num_vectors": 7, "vector_length": 4, "target_modules": TARGETS}
CONFIGS: dict[str, Any] = {
    "adalora": peft.AdaLoraConfig(init_r=3, target_modules=TARGETS, total_step=10),
    "vera": peft.VeraConfig(r=3, target_modules=TARGETS),
    "vblora": peft.VBLoRAConfig(**VBLORA),
    "vblora-topk": peft.VBLoRAConfig(**VBLORA, save_only_topk_weights=True),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}
# Tensors of one module, and those that modules share.
TENSORS: dict[str, tuple[str, ...]] = {
    "adalora": (f"{PATH}.lora_A", f"{PATH}.lora_B", f"{PATH}.lora_E"),
    "vera": (
        f"{PATH}.vera_lambda_b",
        f"{PATH}.vera_lambda_d",
        "base_model.vera_A",
        "base_model.vera_B",
    ),
    "vblora": (
        f"{PATH}.vblora_logits_A",
        f"{PATH}.vblora_logits_B",
        "base_model.vblora_vector_bank",
    ),
    "vblora-topk": (
        f"{PATH}.vblora_logits_A_topk_weights",
        f"{PATH}.vblora_logits_B_topk_indices",
    ),
    "ia3": (f"{PATH}.ia3_l", PATH.replace("self_attn.q_proj", "mlp.down_proj.ia3_l")),
    "tied_lora": (
        f"{PATH}.tied_lora_u",
        f"{PATH}.tied_lora_v",
        "base_model.tied_lora_A.q_proj",
        "base_model.tied_lora_B.down_proj",
    ),
}
CASES = [(method, name) for method, names in TENSORS.items() for name in names]
FLOAT_CASES = [(method, name) for method, name in CASES if not name.endswith("indices")]
MODULES = {"adalora": adalora, "vera": vera, "vblora": vblora, "ia3": ia3, "tied_lora": tied_lora}
RANK_KEYS = {"adalora": "init_r", "vera": "r", "vblora": "r", "tied_lora": "r"}
# Method, key, value, what the message must say besides.
REFUSED_VALUES: list[tuple[str, str, Any, str]] = [
    ("adalora", "bias", "all", "'none'"),
    ("adalora", "lora_bias", True, "AdaLoRA"),
    ("adalora", "use_dora", True, "AdaLoRA"),
    ("adalora", "layer_replication", [[0, 1], [0, 1]], "depth"),
    ("adalora", "trainable_token_indices", [3], "LoRA"),
    ("adalora", "lora_alpha", "8", "number"),
    ("vera", "bias", "vera_only", "'none'"),
    ("vera", "save_projection", "no", "true or false"),
    ("vblora", "bias", "vblora_only", "'none'"),
    ("vblora", "num_vectors", 0, "from 1"),
    ("vblora", "topk", 2.0, "from 1"),
    ("ia3", "feedforward_modules", "(", "regular expression"),
    ("ia3", "feedforward_modules", [1], "list"),
    ("tied_lora", "bias", "all", "'none'"),
    ("tied_lora", "share_qkv_A", 1, "true or false"),
    ("tied_lora", "use_rslora", True, "unknown"),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(num_layers=1)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> dict[str, Path]:
    paths = {method: tmp_path_factory.mktemp(method) for method in TENSORS}
    for method, config in CONFIGS.items():
        save_peft(model, paths[method], config)
    tied = TiedLoraModel(model, TiedLoraRecipe(3, 6, TARGETS))
    tied.randomize()
    tied.save(paths["tied_lora"])
    return paths


@pytest.mark.parametrize("method", TENSORS)
def test_an_unchanged_adapter_is_accepted(method, model, saved):
    info = read_adapter_info(saved[method], "a", shape_of(model))
    assert info.method == method.removesuffix("-topk")


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_missing_tensor_is_refused_by_name(method, name, model, saved, tmp_path):
    path = changed(saved[method], tmp_path, tensors=lambda weights: weights.pop(name))
    assert f"{name!r}, which the config calls for, is missing" in refusal(model, path)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_renamed_tensor_is_refused_by_name(method, name, model, saved, tmp_path):
    def rename(weights):
        weights[f"{name}.default"] = weights.pop(name)

    path = changed(saved[method], tmp_path, tensors=rename)
    assert repr(f"{name}.default") in refusal(model, path)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_tensor_of_another_shape_is_refused_by_name(method, name, model, saved, tmp_path):
    def widen(weights):
        weights[name] = torch.cat([weights[name], weights[name]], dim=-1)

    message = refusal(model, changed(saved[method], tmp_path, tensors=widen))
    assert f"{name!r} has shape" in message


@pytest.mark.parametrize("method", TENSORS)
@pytest.mark.parametrize(
    "extra", [f"{PATH}.lora_magnitude_vector", f"{PATH}.base_layer.bias", "base_model.vera_C"]
)
def test_an_extra_tensor_is_refused_by_name(method, extra, model, saved, tmp_path):
    def add(weights):
        weights[extra] = torch.ones(2)

    assert repr(extra) in refusal(model, changed(saved[method], tmp_path, tensors=add))


@pytest.mark.parametrize("method", ["ia3", "tied_lora", "vera"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_a_tensor_of_another_dtype_is_refused_by_name(method, dtype, model, saved, tmp_path):
    name = TENSORS[method][0]

    def convert(weights):
        weights[name] = weights[name].to(dtype)

    message = refusal(model, changed(saved[method], tmp_path, tensors=convert))
    assert repr(name) in message
    assert "F32, F16, BF16" in message


@pytest.mark.parametrize(("method", "name"), FLOAT_CASES)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(
    method, name, value, model, saved, tmp_path
):
    def spoil(weights):
        weights[name].view(-1)[-1] = value

    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        read(model, changed(saved[method], tmp_path, tensors=spoil))
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("method", TENSORS)
@pytest.mark.parametrize("value", [1, "on", {"a": None}])
def test_an_unknown_key_that_is_on_is_refused(method, value, model, saved, tmp_path):
    path = changed(saved[method], tmp_path, {"brand_new_key": value})
    assert "brand_new_key" in refusal(model, path)


def test_trained_modules_are_refused_with_tied_lora(model, saved, tmp_path):
    path = changed(saved["tied_lora"], tmp_path, {"modules_to_save": ["norm"]})
    assert "modules_to_save" in refusal(model, path)


@pytest.mark.parametrize("method", MODULES)
def test_keys_about_training_change_nothing(method, model, saved, tmp_path):
    expected = read_adapter_info(saved[method], "a", shape_of(model))
    inert = {key: {"anything": 1} for key in MODULES[method].INERT_KEYS}
    path = changed(saved[method], tmp_path, inert)
    assert read_adapter_info(path, "a", shape_of(model)).modules == expected.modules


@pytest.mark.parametrize("method", CONFIGS)
def test_every_key_that_peft_saves_is_known(method):
    module = MODULES[method.removesuffix("-topk")]
    refused = getattr(module, "REFUSED_KEYS", {}).keys()
    known = module.READ_KEYS | module.INERT_KEYS | refused
    bookkeeping = {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
    assert set(CONFIGS[method].to_dict()) <= known | bookkeeping


@pytest.mark.parametrize("method", RANK_KEYS)
@pytest.mark.parametrize("rank", [0, -1, None, 2.0, "8"])
def test_a_rank_that_is_none_is_refused(method, rank, model, saved, tmp_path):
    key = RANK_KEYS[method]
    assert f"{key} is " in refusal(model, changed(saved[method], tmp_path, {key: rank}))


@pytest.mark.parametrize("method", RANK_KEYS)
def test_a_rank_other_than_the_tensors_is_refused(method, model, saved, tmp_path):
    path = changed(saved[method], tmp_path, {RANK_KEYS[method]: 4})
    assert "has shape" in refusal(model, path)


@pytest.mark.parametrize(("method", "key", "value", "said"), REFUSED_VALUES)
def test_a_value_that_cannot_be_applied_is_refused(
    method, key, value, said, model, saved, tmp_path
):
    message = refusal(model, changed(saved[method], tmp_path, {key: value}))
    assert key in message
    assert said in message


@pytest.mark.parametrize("method", TENSORS)
def test_the_embedding_is_refused(method, model, saved, tmp_path):
    path = changed(saved[method], tmp_path, {"target_modules": ["embed_tokens"]})
    assert "'model.embed_tokens'" in refusal(model, path)


@pytest.mark.parametrize("method", TENSORS)
def test_targets_that_select_nothing_are_refused(method, model, saved, tmp_path):
    path = changed(saved[method], tmp_path, {"target_modules": ["c_attn"]})
    assert "selects no linear" in refusal(model, path)


def test_adalora_products_beyond_float16_are_refused_by_name(model, saved, tmp_path):
    def enlarge(weights):
        for name, tensor in weights.items():
            if name.endswith(("lora_A", "lora_E")):
                tensor.mul_(3e3)

    path = changed(saved["adalora"], tmp_path, tensors=enlarge)
    read(model, path)
    with pytest.raises(AdapterError, match=r"lora_E.*float16 ends at"):
        read(model, path, torch.float16)
