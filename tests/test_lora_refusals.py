"""A LoRA file that is not exactly what its config says, of whatever variant, is refused by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_factory import shape_of
from general_form import ModelBase, read, save_peft
from loraswarm.adapters.reading import read_adapter, read_adapter_info
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, BaseShape
from loraswarm.errors import AdapterError
from tiny_models import (
    biased_model,
    change_config,
    change_tensors,
    plain_model,
    save_lora,
    tensors_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape"),
]
PREFIX = "base_model.model."
Q_A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
BLOCKS = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
# What PEFT is asked to train; and a part of the name of one tensor of each kind in its file.
KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "biases": (
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"},
        ["1.self_attn.q_proj.lora_B.bias", "q_proj.base_layer.bias", "1.self_attn.k_proj.bias"],
    ),
    "dora": (
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        ["1.self_attn.q_proj.lora_magnitude_vector", "embed_tokens.lora_magnitude_vector"],
    ),
    "block-diagonal": (
        {"r": 4, "target_modules": ["q_proj", "o_proj"], "use_bdlora": BLOCKS},
        ["1.self_attn.q_proj.lora_B", "0.self_attn.o_proj.lora_A"],
    ),
    "pissa": (
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        ["1.self_attn.q_proj.lora_A", "0.self_attn.q_proj.lora_B"],
    ),
    "alora": (
        {"target_modules": ["q_proj"], "alora_invocation_tokens": [3, 5]},
        ["1.self_attn.q_proj.lora_A"],
    ),
    "tables": (
        {"target_modules": ["embed_tokens", "lm_head"]},
        ["embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_B", "lm_head.lora_B"],
    ),
    "saved modules": (
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens", "lm_head"]},
        ["1.input_layernorm.weight", "model.norm.weight", "embed_tokens.weight", "lm_head.weight"],
    ),
    "tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5]}},
        ["lm_head.token_adapter.trainable_tokens_delta"],
    ),
    "trained tokens alone": (
        {"token_indices": [3, 5], "target_modules": ["lm_head"]},
        ["lm_head.trainable_tokens_delta"],
    ),
    "tuned norms": (
        {"target_modules": ["post_attention_layernorm", "norm"]},
        ["1.post_attention_layernorm.ln_tuning_layers.weight", "model.norm.ln_tuning"],
    ),
}
CASES = [
    pytest.param(kind, part, id=f"{kind}: {part}")
    for kind, (_, parts) in KINDS.items()
    for part in parts
]


def save(kind: str, path: Path) -> None:
    from peft import LNTuningConfig, TrainableTokensConfig

    config = KINDS[kind][0]
    if kind == "trained tokens alone":
        save_peft(biased_model(), path, TrainableTokensConfig(task_type="CAUSAL_LM", **config))
    elif kind == "tuned norms":
        save_peft(biased_model(), path, LNTuningConfig(task_type="CAUSAL_LM", **config))
    else:
        save_lora(biased_model(), path, **config)


def refusal(path: Path, shape: BaseShape | None = None) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter_info(path, "a", shape_of(biased_model()) if shape is None else shape)
    message = str(caught.value)
    assert message.startswith("adapter 'a': ")
    assert "\n" not in message
    assert len(message) < 600
    return message


def named(path: Path, part: str) -> tuple[str, torch.Tensor]:
    return next((name, tensor) for name, tensor in tensors_of(path).items() if part in name)


@pytest.mark.parametrize(("kind", "part"), CASES)
def test_a_tensor_that_is_not_as_the_config_says_is_refused_by_name(tmp_path, kind, part):
    save(kind, tmp_path)
    read_adapter_info(tmp_path, "a", shape_of(biased_model()))
    name, tensor = named(tmp_path, part)
    change_tensors(tmp_path, {name: None})
    assert f"{name!r}, which the config calls for, is missing" in refusal(tmp_path)
    change_tensors(tmp_path, {name + "x": tensor})
    assert f"{name + 'x'!r} is none that the config calls for" in refusal(tmp_path)
    wrong = torch.cat([tensor, tensor[:1]])
    change_tensors(tmp_path, {name + "x": None, name: wrong})
    assert repr(name) in refusal(tmp_path)
    change_tensors(tmp_path, {name: tensor[:0]})
    assert repr(name) in refusal(tmp_path)
    change_tensors(tmp_path, {name: tensor.long()})
    assert f"{name!r} is I64" in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "part"), CASES)
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, kind, part, value):
    save(kind, tmp_path)
    name, tensor = named(tmp_path, part)
    tensor.view(-1)[-1] = value
    change_tensors(tmp_path, {name: tensor})
    with pytest.raises(AdapterError, match=rf"'{re.escape(name)}' has NaN or infinite"):
        read(biased_model(), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_is_refused_and_one_of_training_is_not(tmp_path, kind):
    save(kind, tmp_path)
    inert = {"tuned norms": "task_type", "trained tokens alone": "init_weights"}
    change_config(tmp_path, **{inert.get(kind, "lora_dropout"): 0.25})
    read_adapter_info(tmp_path, "a", shape_of(biased_model()))
    change_config(tmp_path, brand_new_key=1)
    assert "brand_new_key is 1" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["dora", "pissa", "tables", "alora"])
def test_rank_zero_and_another_rank_are_refused(tmp_path, kind):
    save(kind, tmp_path)
    change_config(tmp_path, r=0)
    assert "r is 0" in refusal(tmp_path)
    change_config(tmp_path, r=5)
    assert "has rank 3, but r in adapter_config.json is 5" in refusal(tmp_path)


COMBINATIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"use_dora": True, "use_bdlora": BLOCKS}, "use_bdlora", "use_dora"),
    ({"use_dora": True, "use_qalora": True}, "use_qalora", "use_dora"),
    ({"use_dora": True, "alora_invocation_tokens": [3]}, "alora_invocation_tokens", "use_dora"),
    ({"velora_config": {}, "monteclora_config": {}}, "monteclora_config", "velora_config"),
    ({"use_dora": True, "lora_bias": True}, "lora_bias", "dora"),
    ({"init_lora_weights": "pissa", "lora_bias": True}, "lora_bias", "pissa"),
    ({"alora_invocation_tokens": [3], "bias": "all"}, "bias", "before the invocation"),
    ({"alora_invocation_tokens": [3], "modules_to_save": ["norm"]}, "modules_to_save", "before"),
    (
        {"alora_invocation_tokens": [3], "trainable_token_indices": [3]},
        "trainable_token_indices",
        "before",
    ),
    (
        {"alora_invocation_tokens": [3], "init_lora_weights": "olora"},
        "init_lora_weights",
        "before",
    ),
    ({"alora_invocation_tokens": [3], "target_modules": ["embed_tokens"]}, "alora", EMBEDDING),
    ({"lora_bias": True, "target_modules": ["embed_tokens"]}, "lora_bias", EMBEDDING),
    ({"init_lora_weights": "pissa", "target_modules": ["lm_head"]}, "pissa", LM_HEAD),
    ({"init_lora_weights": "pissa", "lora_alpha": 0}, "pissa", "lora_alpha above 0"),
    ({"init_lora_weights": "olora", "r": 37}, "olora", "rank"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4", "path_initial_model"),
    ({"target_modules": ["embed_tokens"], "modules_to_save": ["tokens"]}, "changed by", EMBEDDING),
    (
        {"target_modules": ["embed_tokens"], "trainable_token_indices": [3]},
        "changed by",
        EMBEDDING,
    ),
    (
        {"target_modules": ["lm_head"], "trainable_token_indices": [3], "use_dora": True},
        "changed by",
        LM_HEAD,
    ),
    (
        {"target_modules": ["lm_head"], "trainable_token_indices": {"lm_head": [3]}},
        "changed by",
        LM_HEAD,
    ),
    ({"modules_to_save": ["lm_head"], "trainable_token_indices": [3]}, "changed by", LM_HEAD),
    ({"trainable_token_indices": {"tokens": [3], "embed_tokens": [5]}}, "changed by", EMBEDDING),
    ({"trainable_token_indices": [3, 3]}, "token 3", "twice"),
    ({"trainable_token_indices": [133]}, "token 133", "133 tokens"),
    (
        {
            "trainable_token_indices": {"embed_tokens": [3], "lm_head": [5]},
            "ensure_weight_tying": True,
        },
        "ensure_weight_tying",
        "other tokens",
    ),
    (
        {
            "target_modules": ["embed_tokens"],
            "exclude_modules": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        "ensure_weight_tying",
        "exclude_modules",
    ),
    ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size", "from 1"),
    ({"target_modules": "dummy-target-modules"}, "target_modules", "selects no linear"),
    ({"target_modules": ["c_attn"], "modules_to_save": ["norm"]}, "target_modules", "no linear"),
]


@pytest.mark.parametrize(("keys", "says", "also"), COMBINATIONS)
def test_a_combination_that_cannot_be_applied_is_refused(tmp_path, keys, says, also):
    save_lora(biased_model(), tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, **keys)
    message = refusal(tmp_path)
    assert says in message
    assert also in message


def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path):
    save_lora(biased_model(), tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, use_qalora=True, qalora_group_size=7)
    change_tensors(tmp_path, {Q_A: torch.zeros(3, 5)})
    assert "qalora_group_size is 7, which does not divide the 36" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({"use_dora": True}, "q_proj.lora_magnitude_vector"),
        ({"bias": "lora_only"}, "q_proj.base_layer.bias"),
        ({"bias": "all"}, "k_proj.bias"),
        ({"lora_bias": True}, "q_proj.lora_B.bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"modules_to_save": ["norm"]}, "input_layernorm.weight"),
        ({"trainable_token_indices": [3]}, "embed_tokens.token_adapter.trainable_tokens_delta"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.lora_A.weight"),
        ({"target_modules": ".*(q_proj|embed_tokens)"}, "embed_tokens.lora_embedding_A"),
    ],
)
def test_a_key_without_its_tensors_is_refused(tmp_path, keys, missing):
    save_lora(biased_model(), tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, **keys)
    message = refusal(tmp_path)
    assert missing in message
    assert "is missing" in message


@pytest.mark.parametrize(
    "part",
    ["q_proj.lora_magnitude_vector", "q_proj.lora_B.bias", "q_proj.base_layer.bias", "k_proj.bias"],
)
def test_tensors_without_their_key_are_refused(tmp_path, part):
    save_lora(biased_model(), tmp_path, target_modules=["q_proj"])
    name = f"{PREFIX}model.layers.1.self_attn.{part}"
    change_tensors(tmp_path, {name: torch.zeros(36)})
    assert f"{name!r} is none that the config calls for" in refusal(tmp_path)


def test_a_bias_under_its_old_name_which_peft_does_not_load_is_refused(tmp_path):
    save_lora(biased_model(), tmp_path, target_modules=["q_proj"], bias="lora_only")
    name, bias = named(tmp_path, "1.self_attn.q_proj.base_layer.bias")
    old = name.replace(".base_layer", "")
    change_tensors(tmp_path, {name: None, old: bias})
    assert f"{old!r} is none that the config calls for" in refusal(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_another_vocabulary_is_refused_naming_both_sizes(tmp_path, config):
    save_lora(biased_model(), tmp_path, **config)
    shape = dataclasses.replace(shape_of(biased_model()), vocab_size=140)
    message = refusal(tmp_path, shape)
    assert "vocabulary of 133 tokens; this base has 140" in message


def test_a_resized_copy_of_the_embedding_is_refused_naming_both_sizes(tmp_path):
    save_lora(biased_model(), tmp_path, target_modules=["q_proj"])
    change_tensors(tmp_path, {f"{PREFIX}{EMBEDDING}.weight": torch.zeros(140, 36)})
    message = refusal(tmp_path)
    assert f"{EMBEDDING}.weight" in message
    assert "vocabulary of 140 tokens; this base has 133" in message


def test_a_magnitude_over_a_norm_of_zero_is_refused(tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules=["q_proj"], use_dora=True)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3] = 0
    name, tensor = named(tmp_path, "1.self_attn.q_proj.lora_B")
    tensor[3] = 0
    change_tensors(tmp_path, {name: tensor})
    with pytest.raises(AdapterError, match=r"1\.self_attn\.q_proj\.lora_magnitude_vector.*norm"):
        read(model, tmp_path)


def test_a_folded_value_too_large_for_the_base_is_refused_by_name(tmp_path):
    model = biased_model()
    save_lora(model, tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, use_qalora=True, qalora_group_size=1 << 1)
    narrow = {name: t[:, :18] for name, t in tensors_of(tmp_path).items() if "lora_A" in name}
    change_tensors(tmp_path, {name: t.contiguous() * 60000 for name, t in narrow.items()})
    info = read_adapter_info(tmp_path, "a", shape_of(model))
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight.*float16"):
        read_adapter(info, ModelBase(model.half()), torch.float16)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"token_indices": []}, "token_indices is []"),
        ({"token_indices": None}, "token_indices is None"),
        ({"token_indices": [3, 133]}, "token 133"),
        ({"token_indices": [3, 3]}, "twice"),
        ({"target_modules": ["q_proj"]}, "q_proj"),
        ({"target_modules": ["norm"]}, "norm"),
        ({"target_modules": ["wte"]}, "neither embed_tokens nor lm_head"),
        ({"target_modules": ["embed_tokens", "lm_head"]}, "name embed_tokens only"),
    ],
)
def test_trained_tokens_that_cannot_be_applied_are_refused(tmp_path, keys, says):
    save("trained tokens alone", tmp_path)
    change_config(tmp_path, **keys)
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"target_modules": ["norm", "up_proj"]}, "up_proj"),
        ({"target_modules": ["ln_f"]}, "none of this base's norms"),
        ({"target_modules": None}, "name the adapted modules"),
        ({"modules_to_save": ["up_proj"]}, "up_proj"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
    ],
)
def test_tuned_norms_that_cannot_be_applied_are_refused(tmp_path, keys, says):
    save("tuned norms", tmp_path)
    change_config(tmp_path, **keys)
    assert says in refusal(tmp_path)
