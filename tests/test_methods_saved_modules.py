"""modules_to_save beside methods other than LoRA: whole norms, embeddings and lm_heads, as PEFT
serves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from adapter_factory import shape_of
from general_form import applied, check_equals_peft, logits_of, read, save_peft
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.errors import AdapterError
from tiny_models import (
    biased_model,
    change_config,
    change_tensors,
    normed_model,
    plain_model,
    tensors_of,
)

# PEFT warns about what merging would need, and of copies of embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
PREFIX = "base_model.model."
TARGETS = ["q_proj", "down_proj"]
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "adalora": (peft.AdaLoraConfig, {"init_r": 3, "total_step": 10}),
    "beft": (peft.BeftConfig, {}),
    "delora": (peft.DeloraConfig, {"r": 3}),
    "gralora": (peft.GraloraConfig, {"r": 2}),
    "ia3": (peft.IA3Config, {"feedforward_modules": ["down_proj"]}),
    "loha": (peft.LoHaConfig, {"r": 2}),
    "lokr": (peft.LoKrConfig, {"r": 2}),
    "miss": (peft.MissConfig, {"r": 3}),
    "vblora": (peft.VBLoRAConfig, {"r": 3, "num_vectors": 7, "vector_length": 4}),
    "vera": (peft.VeraConfig, {"r": 5}),
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "plain": plain_model,
    "biased and tied": biased_model,
    "normed": normed_model,
}
# A plain "norm" would mean DeLoRA's own delora_w_norm, too: PEFT cannot load that.
SAVED = (
    ["model.norm", "layernorm"],
    ["input_layernorm", "lm_head"],
    ["embed_tokens"],
    ["embed_tokens", "lm_head"],
)


def save(model: PreTrainedModel, path: Any, method: str, **keys: Any) -> None:
    make_config, values = METHODS[method]
    arguments = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, **values, **keys}
    save_peft(model, path, make_config(**arguments))


def refusal(model: PreTrainedModel, path: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        read(model, path)
    return str(caught.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("saved", SAVED, ids=" ".join)
def test_saved_modules_stand_in_as_in_peft(method, model_name, saved, tmp_path):
    model = MODELS[model_name]()
    save(model, tmp_path, method, modules_to_save=saved)
    adapter = check_equals_peft(model, tmp_path)
    assert adapter.info.method == method
    assert adapter.overlays
    paths = [path for info in adapter.info.overlays for path in info.paths]
    assert all(any(path.endswith(name) for path in paths) for name in saved)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_module_is_not_adapted_as_well(method, tmp_path):
    model = plain_model()
    targets = [*TARGETS, "lm_head"]
    save(model, tmp_path, method, modules_to_save=["lm_head"], target_modules=targets)
    adapter = check_equals_peft(model, tmp_path)
    assert shape_of(model).head_site not in {module.info.site for module in adapter.modules}


def test_without_its_saved_modules_an_adapter_is_another(tmp_path):
    """The saved norm shows: the comparison above does not pass without it."""
    model = plain_model()
    save(model, tmp_path, "ia3", modules_to_save=["model.norm"])
    whole = logits_of(applied(model, read(model, tmp_path)))
    name = f"{PREFIX}model.norm.weight"
    change_tensors(tmp_path, {name: model.model.norm.weight.detach().clone()})
    assert not torch.allclose(logits_of(applied(model, read(model, tmp_path))), whole, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_module_that_is_missing_renamed_or_of_another_size_is_refused(method, tmp_path):
    model = plain_model()
    save(model, tmp_path, method, modules_to_save=["model.norm"])
    name = f"{PREFIX}model.norm.weight"
    weight = tensors_of(tmp_path)[name]
    change_tensors(tmp_path, {name: None})
    assert f"{name!r}, which the config calls for, is missing" in refusal(model, tmp_path)
    change_tensors(tmp_path, {name: torch.cat([weight, weight])})
    assert f"{name!r} has shape [72]" in refusal(model, tmp_path)
    change_tensors(tmp_path, {name: torch.full_like(weight, float("nan"))})
    assert f"{name!r} has NaN" in refusal(model, tmp_path)
    change_tensors(tmp_path, {name: weight})
    change_config(tmp_path, modules_to_save=None)
    assert f"{name!r} is none that the config calls for" in refusal(model, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_linear_is_refused(method, tmp_path):
    model = plain_model()
    save(model, tmp_path, method)
    change_config(tmp_path, modules_to_save=["v_proj"])
    message = refusal(model, tmp_path)
    assert "modules_to_save names 'v_proj'" in message
    assert "LoRA" in message


@pytest.mark.parametrize("method", METHODS)
def test_a_module_that_is_named_twice_over_is_refused(method, tmp_path):
    """PEFT's rules differ: modules_to_save means ends of names, what is adapted whole words."""
    model = plain_model()
    # The vocabulary of 133 is not divisible.
    keys = {"vblora": {"vector_length": 1}, "gralora": {"gralora_k": 1}}.get(method, {})
    save(model, tmp_path, method, target_modules=["lm_head", *TARGETS], **keys)
    change_config(tmp_path, modules_to_save=["m_head"])
    assert "'lm_head' is changed by target_modules and by modules_to_save" in refusal(
        model, tmp_path
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_an_embedding_must_be_the_bases(method, tmp_path):
    model = plain_model()
    save(model, tmp_path, method)
    name = f"{PREFIX}model.embed_tokens.weight"
    weight = model.model.embed_tokens.weight.detach().clone()
    change_tensors(tmp_path, {name: weight})
    check_equals_peft(model, tmp_path)
    change_tensors(tmp_path, {name: weight + 1})
    message = refusal(model, tmp_path)
    assert name in message
    assert "modules_to_save" in message


def test_adalora_with_tied_saved_modules_is_refused(tmp_path):
    model = biased_model()
    save(model, tmp_path, "adalora", modules_to_save=["embed_tokens"])
    read_adapter_info(tmp_path, "a", shape_of(model))
    change_config(tmp_path, ensure_weight_tying=True)
    assert "ensure_weight_tying is True" in refusal(model, tmp_path)
