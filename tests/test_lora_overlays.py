"""Whole modules and rows of tokens that adapters bring along are applied as PEFT applies them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapter_factory import shape_of
from general_form import check_equals_peft, read, save_peft
from loraswarm.adapters.adapter import EMBEDDING_A
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD
from loraswarm.errors import AdapterError
from tiny_models import (
    biased_model,
    change_config,
    change_tensors,
    normed_model,
    plain_model,
    save_lora,
    tensors_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
PREFIX = "base_model.model."
MODELS = {
    "tied": biased_model,
    "untied": lambda: biased_model(tied=False),
    "plain": plain_model,
    "with q and k norms": normed_model,
}
SAVED: dict[str, dict[str, Any]] = {
    "all norms": {"modules_to_save": ["norm"]},
    "norms of layers": {
        "modules_to_save": ["post_attention_layernorm", "layers.0.input_layernorm"]
    },
    "final norm": {"modules_to_save": ["model.norm"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "lm_head instead of its LoRA": {
        "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj", "lm_head"],
    },
    "both tables and norms": {"modules_to_save": ["norm", "embed_tokens", "lm_head"]},
    "names that match nothing": {"modules_to_save": ["classifier", "score", "model.norm"]},
    "norms beside embedding LoRA": {
        "modules_to_save": ["norm"],
        "target_modules": ["embed_tokens", "q_proj"],
    },
    "lm_head beside embedding LoRA": {
        "modules_to_save": ["lm_head"],
        "target_modules": ["embed_tokens", "q_proj"],
    },
    "nothing but norms": {
        "modules_to_save": ["norm"],
        "target_modules": "dummy-target-modules",
    },
    "dora with everything": {
        "modules_to_save": ["norm", "lm_head"],
        "use_dora": True,
        "bias": "all",
    },
    "tokens": {"trainable_token_indices": [132, 3, 7]},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": [7, 3]}},
    "tokens of the lm_head": {"trainable_token_indices": {"lm_head": [7, 3, 1]}},
    "equal tokens of both": {
        "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}
    },
    "other tokens of both": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [64]}},
    "tokens in another order": {
        "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [3, 7]}
    },
    "tokens beside lm_head LoRA": {
        "trainable_token_indices": [132, 3],
        "target_modules": ["q_proj", "lm_head"],
    },
    "tokens and norms": {"trainable_token_indices": [9], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("config", SAVED.values(), ids=SAVED.keys())
def test_trained_modules_and_tokens_give_the_logits_of_peft(make_model, tmp_path, config):
    model = make_model()
    save_lora(model, tmp_path, **({"target_modules": ["q_proj", "up_proj"]} | config))
    check_equals_peft(model, tmp_path)


@pytest.mark.parametrize(
    "names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "norm"]]
)
def test_tied_tables_are_one_overlay_if_weight_tying_is_ensured(tmp_path, names):
    model = biased_model(tied=True)
    save_lora(
        model,
        tmp_path,
        target_modules=["q_proj"],
        modules_to_save=names,
        ensure_weight_tying=True,
    )
    adapter = check_equals_peft(model, tmp_path)
    assert (EMBEDDING, LM_HEAD) in [overlay.paths for overlay in adapter.info.overlays]


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules")
@pytest.mark.parametrize("indices", [[5, 3], {"embed_tokens": [5, 3]}])
def test_tokens_of_tied_tables_are_one_overlay(tmp_path, indices):
    model = biased_model(tied=True)
    save_lora(
        model,
        tmp_path,
        target_modules=["q_proj"],
        trainable_token_indices=indices,
        ensure_weight_tying=True,
    )
    (overlay,) = check_equals_peft(model, tmp_path).info.overlays
    assert overlay.paths == (EMBEDDING, LM_HEAD)


def test_rows_of_tokens_are_ascending_and_hold_final_values(tmp_path):
    model = biased_model(tied=False)
    save_lora(model, tmp_path, target_modules=["q_proj"], trainable_token_indices=[132, 3, 7])
    stored = tensors_of(tmp_path)[f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"]
    adapter = read(model, tmp_path)
    (info,), (rows,) = adapter.info.overlays, adapter.overlays
    assert info.token_ids == (3, 7, 132)
    assert (info.num_rows, info.width) == (3, 36)
    assert torch.equal(rows, stored[[1, 2, 0]])


def test_a_norm_is_one_row_in_the_bases_dtype(tmp_path):
    model = normed_model()
    save_lora(model, tmp_path, target_modules=["q_proj"], modules_to_save=["norm"])
    adapter = read(model.bfloat16(), tmp_path, torch.bfloat16)
    sizes = shape_of(model).norm_sizes()
    assert len(adapter.overlays) == len(sizes) == 9
    for info, rows in zip(adapter.info.overlays, adapter.overlays, strict=True):
        assert (info.num_rows, info.width) == (1, sizes[info.paths[0]]) == tuple(rows.shape)
        assert rows.dtype == torch.bfloat16


def test_lora_on_the_embedding_keeps_its_wide_side_as_an_overlay(tmp_path):
    model = biased_model()
    save_lora(model, tmp_path, target_modules=["embed_tokens"])
    adapter = read(model, tmp_path)
    (module,), (info,), (rows,) = adapter.modules, adapter.info.overlays, adapter.overlays
    assert info.paths == (EMBEDDING_A,)
    assert (info.num_rows, info.width) == (133, 3) == tuple(rows.shape)
    assert rows.is_contiguous()
    assert module.a_RI is None
    assert module.bt_RO.shape == (3, 36)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [None, ["embed_tokens"], ["lm_head"]])
def test_trained_tokens_alone_give_the_logits_of_peft(tmp_path, tied, targets):
    from peft import TrainableTokensConfig

    model = biased_model(tied=tied)
    config = TrainableTokensConfig(
        task_type="CAUSAL_LM", token_indices=[64, 3, 7], target_modules=targets
    )
    save_peft(model, tmp_path, config)
    assert check_equals_peft(model, tmp_path).info.method == "trainable_tokens"


def test_trained_tokens_of_two_untied_tables_give_the_logits_of_peft(tmp_path):
    from peft import TrainableTokensConfig

    model = biased_model(tied=False)
    config = TrainableTokensConfig(
        task_type="CAUSAL_LM", token_indices=[64, 3], target_modules=["embed_tokens", "lm_head"]
    )
    save_peft(model, tmp_path, config)
    check_equals_peft(model, tmp_path)
    change_config(tmp_path, target_modules=None)
    with pytest.raises(AdapterError, match=r"lm_head.*would not be applied"):
        read_adapter_info(tmp_path, "a", shape_of(model))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["norm", "q_norm"]},
        {"target_modules": r".*\.(0|1)\..*norm", "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["embed_tokens", "input_layernorm"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["model.norm"]},
    ],
)
@pytest.mark.parametrize("make_model", [normed_model, lambda: biased_model(tied=False)])
def test_tuned_norms_give_the_logits_of_peft(make_model, tmp_path, config):
    from peft import LNTuningConfig

    model = make_model()
    save_peft(model, tmp_path, LNTuningConfig(task_type="CAUSAL_LM", **config))
    assert check_equals_peft(model, tmp_path).info.method == "ln_tuning"


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("name", [EMBEDDING, LM_HEAD])
def test_a_copy_of_the_bases_own_table_changes_nothing(tmp_path, name):
    model = biased_model(tied=False)
    save_lora(model, tmp_path, target_modules=["q_proj"])
    expected = read(model, tmp_path)
    weight = dict(model.named_modules())[name].weight.detach()
    for rounded in (weight, weight.bfloat16(), weight.half()):
        change_tensors(tmp_path, {f"{PREFIX}{name}.weight": rounded.clone()})
        adapter = read(model, tmp_path)
        assert adapter.info.modules == expected.info.modules
        assert adapter.info.overlays == ()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"target_modules": ["q_proj"]}, f"{PREFIX}{EMBEDDING}.weight"),
        ({"target_modules": ["embed_tokens"]}, f"{PREFIX}{EMBEDDING}.base_layer.weight"),
        ({"target_modules": ["lm_head"]}, f"{PREFIX}{LM_HEAD}.base_layer.weight"),
    ],
)
def test_a_table_that_is_not_the_bases_is_refused_by_name(tmp_path, config, name):
    model = biased_model()
    save_lora(model, tmp_path, **config)
    weight = model.get_input_embeddings().weight.detach().clone()
    weight[7, 3] += 0.5
    change_tensors(tmp_path, {name: weight})
    with pytest.raises(AdapterError, match=f"{name}.*not of this base.*modules_to_save"):
        read(model, tmp_path)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"modules_to_save": ["embed_tokens"]}, f"{PREFIX}{LM_HEAD}.weight"),
        ({"target_modules": ["embed_tokens"]}, f"{PREFIX}{LM_HEAD}.lora_A.weight"),
        ({"target_modules": ["embed_tokens"]}, f"{PREFIX}{LM_HEAD}.lora_B.weight"),
    ],
)
def test_tied_tensors_that_differ_are_refused(tmp_path, config, name):
    model = biased_model()
    config = {"target_modules": ["q_proj"]} | config
    save_lora(model, tmp_path, ensure_weight_tying=True, **config)
    check_equals_peft(model, tmp_path)
    change_tensors(tmp_path, {name: tensors_of(tmp_path)[name] + 1})
    with pytest.raises(AdapterError, match=r"lm_head.*differ.*ties"):
        read(model, tmp_path)
