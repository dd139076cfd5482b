"""AdaLoRA, VB-LoRA and (IA)^3, and each method on the lm_head, give the logits that PEFT gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, VBLoRAConfig, VeraConfig
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
)

from adapter_factory import WEIGHTS_FILE, shape_of, tiny_llama
from general_form import ModelBase, check_equals_peft, read, save_peft
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.core.base_shape import TARGETS, module_path
from loraswarm.errors import AdapterError
from tiny_models import change_config, change_tensors, tiny_biased_llama, tiny_qwen
from tolerance import assert_close

PREFIX = "base_model.model."
Q_PROJ, UP, DOWN = (TARGETS.index(name) for name in ("q_proj", "up_proj", "down_proj"))


@pytest.fixture(scope="module", params=[tiny_llama, tiny_qwen])
def model(request) -> PreTrainedModel:
    return request.param()


def refusal(model: PreTrainedModel, path: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read(model, path)
    return str(caught.value)


# PEFT looks for names of modules in rank_pattern; AdaLoRA's are names of tensors.
pruned = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")


def adalora(**keys: Any) -> AdaLoraConfig:
    return AdaLoraConfig(
        **{"init_r": 5, "lora_alpha": 32, "target_modules": list(TARGETS), "total_step": 10} | keys
    )


def kept(layer: int, target: str, *mask: int) -> dict[str, list[bool]]:
    """An entry of rank_pattern, under the name that PEFT gives."""
    path = module_path(layer, TARGETS.index(target))
    return {f"{path}.lora_E": [bool(is_kept) for is_kept in mask]}


def test_adalora_equals_peft(tmp_path, model):
    save_peft(model, tmp_path, adalora())
    adapter = check_equals_peft(model, tmp_path)
    assert adapter.info.method == "adalora"
    assert adapter.info.max_rank == 5
    assert len(adapter.modules) == 7 * model.config.num_hidden_layers


@pruned
def test_adalora_pruned_to_fewer_ranks_keeps_the_divisor(tmp_path, model):
    pattern = kept(0, "q_proj", 1, 0, 0, 1, 0) | kept(1, "down_proj", 0, 0, 0, 0, 1)
    save_peft(
        model, tmp_path, adalora(rank_pattern=pattern, target_modules=["q_proj", "down_proj"])
    )
    adapter = check_equals_peft(model, tmp_path)
    ranks = {module.info.site: module.info.rank for module in adapter.modules}
    assert ranks[Q_PROJ] == 2
    assert ranks[7 + DOWN] == 1
    assert ranks[DOWN] == 5
    assert {module.info.scale for module in adapter.modules} == {32 / (5 + 1e-5)}


@pruned
def test_an_adalora_module_pruned_to_nothing_has_no_update(tmp_path, model):
    pattern = kept(0, "q_proj", 0, 0, 0, 0, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid shape.*")
        save_peft(model, tmp_path, adalora(rank_pattern=pattern, target_modules=["q_proj"]))
    assert load_file(tmp_path / WEIGHTS_FILE)[f"{PREFIX}{module_path(0, 0)}.lora_E"].shape == (0, 1)
    adapter = check_equals_peft(model, tmp_path)
    assert Q_PROJ not in {module.info.site for module in adapter.modules}


@pruned
@pytest.mark.parametrize("alpha", [0, -3])
def test_adalora_without_a_positive_alpha_is_scaled_by_its_own_rank(tmp_path, alpha):
    model = tiny_llama()
    pattern = kept(0, "v_proj", 1, 0, 1, 0, 1)
    config = adalora(lora_alpha=alpha, rank_pattern=pattern, target_modules=["v_proj"])
    save_peft(model, tmp_path, config)
    adapter = check_equals_peft(model, tmp_path)
    assert adapter.modules[0].info.scale == 3 / (5 + 1e-5)


def test_adalora_keys_of_lora_that_peft_ignores_are_ignored(tmp_path):
    model = tiny_llama()
    keys = {"r": 3, "use_rslora": True, "alpha_pattern": {"q_proj": 99}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Note that `r` is not used")
        save_peft(model, tmp_path, adalora(**keys))
        check_equals_peft(model, tmp_path)


def test_adalora_rank_numbers_in_the_file_must_agree_with_the_config(tmp_path):
    model = tiny_llama()
    save_peft(model, tmp_path, adalora(target_modules=["q_proj"]))
    names = [f"{PREFIX}{module_path(layer, Q_PROJ)}.ranknum" for layer in range(3)]
    change_tensors(tmp_path, {name: torch.tensor([5.0]) for name in names})
    check_equals_peft(model, tmp_path)
    change_tensors(tmp_path, {names[1]: torch.tensor([4.0])})
    message = refusal(model, tmp_path)
    assert f"{names[1]!r} is 4, but init_r" in message


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (kept(0, "q_proj", 1, 0), "init_r = 5"),
        ({f"{module_path(0, 0)}.lora_E": [1, 0, 0, 0, 0]}, "true or false"),
        ({f"{module_path(0, 0)}.lora_A": [True] * 5}, "lora_A"),
        (kept(0, "k_proj", 1, 0, 0, 0, 0), "k_proj.lora_E'"),
        ([True] * 5, "rank_pattern is"),
        (kept(0, "q_proj", 1, 0, 0, 0, 0), "has shape [5, 36]"),
    ],
)
def test_an_adalora_rank_pattern_that_does_not_fit_is_refused(tmp_path, pattern, says):
    model = tiny_llama()
    save_peft(model, tmp_path, adalora(target_modules=["q_proj"]))
    change_config(tmp_path, rank_pattern=pattern)
    assert says in refusal(model, tmp_path)


def vblora(**keys: Any) -> VBLoRAConfig:
    defaults = {"r": 3, "num_vectors": 7, "vector_length": 4, "target_modules": list(TARGETS)}
    return VBLoRAConfig(**defaults | keys)


@pytest.mark.parametrize("has_topk", [False, True])
@pytest.mark.parametrize("topk", [1, 2, 3])
def test_vblora_equals_peft_in_both_forms(tmp_path, model, has_topk, topk):
    save_peft(model, tmp_path, vblora(save_only_topk_weights=has_topk, topk=topk))
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert any(name.endswith("_topk_indices") for name in stored) == has_topk
    adapter = check_equals_peft(model, tmp_path)
    assert adapter.info.method == "vblora"
    assert adapter.info.max_rank == 3


@pytest.mark.parametrize(
    ("num_vectors", "dtype"), [(255, torch.uint8), (256, torch.int16), (2**15, torch.int32)]
)
def test_vblora_indices_may_have_any_width_that_peft_chooses(tmp_path, num_vectors, dtype):
    model = tiny_llama(num_layers=1)
    config = vblora(num_vectors=num_vectors, save_only_topk_weights=True, target_modules=["v_proj"])
    save_peft(model, tmp_path, config)
    name = f"{PREFIX}{module_path(0, 2)}.vblora_logits_A_topk_indices"
    assert load_file(tmp_path / WEIGHTS_FILE)[name].dtype == dtype
    check_equals_peft(model, tmp_path)


def test_vblora_choices_that_are_no_mixture_are_refused_by_name(tmp_path):
    model = tiny_llama()
    save_peft(model, tmp_path, vblora(save_only_topk_weights=True))
    name = f"{PREFIX}{module_path(1, Q_PROJ)}.vblora_logits_B_topk"
    stored = load_file(tmp_path / WEIGHTS_FILE)
    indices, shares = stored[f"{name}_indices"], stored[f"{name}_weights"]
    change_tensors(tmp_path, {f"{name}_indices": indices + 7})
    assert f"'{name}_indices' holds" in refusal(model, tmp_path)
    change_tensors(tmp_path, {f"{name}_indices": torch.zeros_like(indices)})
    assert f"'{name}_indices' chooses a vector twice" in refusal(model, tmp_path)
    change_tensors(tmp_path, {f"{name}_indices": indices, f"{name}_weights": shares + 1})
    assert f"'{name}_weights'" in refusal(model, tmp_path)
    change_tensors(tmp_path, {f"{name}_weights": -shares})
    assert "shares of a mixture" in refusal(model, tmp_path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"vector_length": 5}, "vector_length is 5"),
        ({"topk": 8}, "topk is 8"),
        ({"topk": 0}, "topk is 0"),
        ({"num_vectors": 6}, "vblora"),
        ({"save_only_topk_weights": True}, "is none that the config calls for"),
    ],
)
def test_a_vblora_config_that_does_not_fit_is_refused(tmp_path, keys, says):
    model = tiny_llama()
    save_peft(model, tmp_path, vblora())
    change_config(tmp_path, **keys)
    assert says in refusal(model, tmp_path)


def ia3(targets: Any, feedforward: Any) -> IA3Config:
    return IA3Config(target_modules=targets, feedforward_modules=feedforward)


@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [
        (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        (["q_proj", "o_proj", "gate_proj"], []),
        (list(TARGETS), ["down_proj"]),
        (["up_proj", "down_proj"], []),
        (["up_proj", "down_proj"], ["down_proj"]),
        (r".*\.(q_proj|down_proj)", r".*layers\.1.*down_proj"),
        (["v_proj", "mlp.down_proj"], ["mlp.down_proj"]),
        (r".*\.(up_proj|down_proj)", ["wn_proj"]),
    ],
)
def test_ia3_equals_peft_with_biases_and_inputs_of_down_proj(tmp_path, model, targets, feedforward):
    save_peft(model, tmp_path, ia3(targets, feedforward))
    adapter = check_equals_peft(model, tmp_path)
    assert adapter.info.method == "ia3"
    assert adapter.info.max_rank == 0
    sites = [module.info.site for module in adapter.modules]
    assert sites == sorted(set(sites))


def test_ia3_multiplies_biases_of_the_mlp_too(tmp_path):
    model = tiny_biased_llama()
    save_peft(model, tmp_path, ia3(list(TARGETS), ["down_proj"]))
    adapter = check_equals_peft(model, tmp_path)
    assert {module.info.vectors for module in adapter.modules} == {("g",)}


# PEFT warns of what merging would do to a tied embedding, and that it copies the lm_head.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "make_config",
    [
        lambda targets: adalora(target_modules=targets),
        lambda targets: vblora(target_modules=targets, vector_length=1),
        lambda targets: ia3(targets, []),
        lambda targets: VeraConfig(r=5, target_modules=targets),
    ],
    ids=["adalora", "vblora", "ia3", "vera"],
)
@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "v_proj"]])
def test_the_lm_head_is_adapted_as_peft_adapts_it(tmp_path, model, make_config, targets):
    save_peft(model, tmp_path, make_config(targets))
    adapter = check_equals_peft(model, tmp_path)
    assert adapter.modules[-1].info.site == shape_of(model).head_site


def test_ia3_on_the_input_of_down_proj_is_a_gain_of_up_proj(tmp_path):
    model = tiny_llama(num_layers=1)
    save_peft(model, tmp_path, ia3(["up_proj", "down_proj"], ["down_proj"]))
    stored = load_file(tmp_path / WEIGHTS_FILE)
    (module,) = read(model, tmp_path).modules
    up, down = (stored[f"{PREFIX}{module_path(0, i)}.ia3_l"].flatten() for i in (UP, DOWN))
    assert module.info.site == UP
    assert_close(module.vectors["g"], up * down, torch.float32)


@pytest.mark.parametrize("target", TARGETS[:6])
def test_ia3_on_another_modules_input_is_refused_by_name(tmp_path, target):
    model = tiny_llama()
    save_peft(model, tmp_path, ia3([target], [target]))
    message = refusal(model, tmp_path)
    assert f"feedforward_modules selects {module_path(0, TARGETS.index(target))!r}" in message
    assert "merge" in message


@pytest.mark.parametrize("key", ["layers_to_transform", "layers_pattern"])
def test_ia3_has_no_choice_of_layers(tmp_path, key):
    model = tiny_llama()
    save_peft(model, tmp_path, ia3(["k_proj"], []))
    change_config(tmp_path, **{key: [0]})
    assert f"{key} is [0]" in refusal(model, tmp_path)


def test_ia3_without_feedforward_modules_is_refused(tmp_path):
    model = tiny_llama()
    save_peft(model, tmp_path, ia3(["k_proj"], []))
    change_config(tmp_path, feedforward_modules=None)
    assert "feedforward_modules is None" in refusal(model, tmp_path)


@pytest.mark.parametrize("config", [adalora(), vblora()], ids=["adalora", "vblora"])
def test_adapters_of_one_recipe_share_their_modules(tmp_path, config):
    model = tiny_llama()
    infos = []
    for seed in (1, 2):
        save_peft(model, tmp_path / str(seed), config, seed=seed)
        infos.append(read_adapter_info(tmp_path / str(seed), str(seed), ModelBase(model).shape))
    assert infos[0].modules is infos[1].modules
    assert infos[0].digest != infos[1].digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_weights_are_in_the_bases_dtype(tmp_path, dtype):
    model = tiny_llama(num_layers=1)
    save_peft(model, tmp_path, adalora(target_modules=["q_proj"]))
    (exact,) = read(model, tmp_path).modules
    (module,) = read(model, tmp_path, dtype).modules
    assert module.a_RI.dtype == module.bt_RO.dtype == dtype
    assert torch.equal(module.a_RI, exact.a_RI.to(dtype))
    assert torch.equal(module.bt_RO, exact.bt_RO.to(dtype))
