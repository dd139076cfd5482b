"""Every variant of LoRA that PEFT saves is applied as PEFT applies it, or as its paper says."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch

from adapter_factory import CONFIG_FILE, load_peft_adapter, shape_of
from general_form import ModelBase, applied, check_equals_peft, logits_of, read
from loraswarm.adapters.methods import lora_weights
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.core.base_shape import TARGETS
from tiny_models import (
    biased_model,
    change_config,
    change_tensors,
    normed_model,
    plain_model,
    save_lora,
    tensors_of,
)
from tolerance import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape"),
]
PREFIX = "base_model.model.model.layers.0.self_attn"
MODELS = {
    "biased and tied": biased_model,
    "biased and untied": lambda: biased_model(tied=False),
    "plain": plain_model,
    "with q and k norms": normed_model,
}
ATTENTION_AND_DOWN = ["q_proj", "k_proj", "o_proj", "down_proj"]
BLOCKS = {"target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_", "up_proj"]}
# Config, and the method that listings show.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "lora_bias": (
        {"lora_bias": True, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"]},
        "lora",
    ),
    "biases of adapted modules": (
        {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
        "lora",
    ),
    "all biases": ({"bias": "all", "target_modules": ["q_proj", "up_proj"]}, "lora"),
    "all biases and lora_bias": (
        {"bias": "all", "lora_bias": True, "use_rslora": True, "target_modules": ["v_proj"]},
        "rslora",
    ),
    "dora": ({"use_dora": True, "target_modules": ATTENTION_AND_DOWN}, "dora"),
    "dora of all linears": ({"use_dora": True, "r": 7, "target_modules": "all-linear"}, "dora"),
    "dora with rslora and patterns": (
        {
            "use_dora": True,
            "use_rslora": True,
            "target_modules": ATTENTION_AND_DOWN,
            "rank_pattern": {"o_proj": 5},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
        "dora",
    ),
    "dora with all biases": (
        {"use_dora": True, "bias": "all", "target_modules": ["q_proj"]},
        "dora",
    ),
    "dora on a decomposed base": (
        {"use_dora": True, "init_lora_weights": "pissa", "target_modules": ATTENTION_AND_DOWN},
        "dora",
    ),
    "block-diagonal A or B": (
        {"r": 4, "use_bdlora": BLOCKS | {"nblocks": 2}, "target_modules": ["q_proj", "o_proj"]},
        "bdlora",
    ),
    "block-diagonal in part": (
        {
            "r": 4,
            "use_bdlora": BLOCKS | {"nblocks": 4, "match_strict": False},
            "target_modules": ["q_proj", "o_proj", "gate_proj"],
        },
        "bdlora",
    ),
    "block-diagonal with lora_bias": (
        {
            "r": 4,
            "lora_bias": True,
            "use_bdlora": BLOCKS | {"nblocks": 2},
            "target_modules": ["q_proj", "o_proj"],
        },
        "bdlora",
    ),
    "velora": ({"velora_config": {"num_groups": 5}, "target_modules": ["q_proj"]}, "velora"),
    "monteclora": (
        {
            "monteclora_config": {"num_samples": 5, "buffer_size": 2},
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 4},
        },
        "monteclora",
    ),
    "velora of the lm_head": (
        {"velora_config": {"num_groups": 7}, "target_modules": ["lm_head"]},
        "velora",
    ),
    "monteclora under pissa": (
        {
            "monteclora_config": {"num_samples": 3, "buffer_size": 2},
            "init_lora_weights": "pissa",
            "target_modules": ["q_proj"],
        },
        "monteclora",
    ),
    "mica": ({"init_lora_weights": "mica", "target_modules": ["q_proj"]}, "lora"),
    "qalora on a base that is not quantised": (
        {"use_qalora": True, "target_modules": ["q_proj"]},
        "lora",
    ),
    "pissa": (
        {"init_lora_weights": "pissa", "lora_alpha": 5, "target_modules": ATTENTION_AND_DOWN},
        "pissa",
    ),
    "pissa with patterns": (
        {
            "init_lora_weights": "pissa",
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 5},
            "alpha_pattern": {"q_proj": 3},
        },
        "pissa",
    ),
    "olora": (
        {"init_lora_weights": "olora", "lora_alpha": 5, "target_modules": ATTENTION_AND_DOWN},
        "olora",
    ),
    "olora with all biases": (
        {"init_lora_weights": "olora", "bias": "all", "target_modules": ["q_proj", "o_proj"]},
        "olora",
    ),
    "embedding": ({"lora_alpha": 5, "target_modules": ["embed_tokens"]}, "lora"),
    "embedding and linears": (
        {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True},
        "rslora",
    ),
    "embedding by expression": ({"target_modules": r".*(embed_tokens|\.1\..*q_proj)"}, "lora"),
    "embedding under pissa": (
        {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": "pissa"},
        "pissa",
    ),
    "lm_head": ({"lora_alpha": 5, "target_modules": ["lm_head"]}, "lora"),
    "lm_head with lora_bias": (
        {"lora_bias": True, "target_modules": ["lm_head", "q_proj"]},
        "lora",
    ),
    "both tables": (
        {"target_modules": ["lm_head", "embed_tokens", "q_proj"], "rank_pattern": {"lm_head": 5}},
        "lora",
    ),
    "dora of both tables": (
        {"use_dora": True, "target_modules": ["lm_head", "embed_tokens", "q_proj"]},
        "dora",
    ),
}


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules")
@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("config", "method"), VARIANTS.values(), ids=VARIANTS.keys())
def test_a_variant_gives_the_logits_of_peft(make_model, tmp_path, config, method):
    model = make_model()
    save_lora(model, tmp_path, **config)
    assert check_equals_peft(model, tmp_path).info.method == method


@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head", "q_proj"], r".*(embed_tokens|q_proj)"]
)
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"init_lora_weights": "mica"},
        {"rank_pattern": {"embed_tokens": 5}},
    ],
)
def test_tied_tables_share_one_lora(tmp_path, targets, variant):
    model = biased_model(tied=True)
    patterns = {"alpha_pattern": {"lm_head": 5}}
    save_lora(
        model, tmp_path, target_modules=targets, ensure_weight_tying=True, **variant, **patterns
    )
    adapter = check_equals_peft(model, tmp_path)
    shape = shape_of(model)
    assert {shape.embedding_site, shape.head_site} <= {m.info.site for m in adapter.modules}


def test_a_linear_without_a_table_is_not_changed_by_ensure_weight_tying(tmp_path):
    model = biased_model(tied=True)
    with pytest.warns(UserWarning, match="no tied modules"):
        save_lora(model, tmp_path, target_modules=["q_proj"], ensure_weight_tying=True)
    adapter = read(model, tmp_path)
    assert [module.info.layer for module in adapter.modules] == [0, 1]


def test_all_linear_leaves_the_lm_head_alone(tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules="all-linear")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert "model.layers.0.mlp.up_proj" in config["target_modules"]
    change_config(tmp_path, target_modules="all-linear")
    adapter = check_equals_peft(model, tmp_path)
    assert len(adapter.modules) == 2 * len(TARGETS)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_dora": True, "bias": "all"},
        {"target_modules": ["q_proj"], "lora_bias": True},
    ],
)
def test_tensors_named_as_in_the_model_are_read_as_peft_reads_them(tmp_path, config):
    model = biased_model()
    save_lora(model, tmp_path, **config)
    expected = logits_of(applied(model, read(model, tmp_path)))
    ends = {
        ".lora_A.weight": ".lora_A.default.weight",
        ".lora_B.weight": ".lora_B.default.weight",
        ".lora_B.bias": ".lora_B.default.bias",
        ".lora_embedding_A": ".lora_embedding_A.default",
        ".lora_embedding_B": ".lora_embedding_B.default",
        ".lora_magnitude_vector": ".lora_magnitude_vector.default.weight",
    }
    changed: dict[str, torch.Tensor | None] = {}
    for name, tensor in tensors_of(tmp_path).items():
        for end, longer in ends.items():
            if name.endswith(end):
                changed |= {name: None, name.removesuffix(end) + longer: tensor}
    change_tensors(tmp_path, changed)
    assert torch.equal(logits_of(applied(model, check_equals_peft(model, tmp_path))), expected)


def test_activated_lora_acts_from_its_invocation_on(tmp_path):
    model = biased_model()
    invocation = [5, 21]
    save_lora(
        model,
        tmp_path,
        target_modules=["q_proj", "down_proj", "lm_head"],
        alora_invocation_tokens=invocation,
        use_rslora=True,
    )
    adapter = read(model, tmp_path)
    assert adapter.info.method == "alora"
    assert adapter.info.invocation_tokens == (5, 21)
    theirs = load_peft_adapter(model, tmp_path)
    whole = torch.tensor([[*invocation, 3, 7, 1, 132]])
    assert_close(logits_of(applied(model, adapter), whole), logits_of(theirs, whole), torch.float32)
    never = torch.tensor([[21, 5, 3, 7, 1, 132]])
    assert_close(logits_of(model, never), logits_of(theirs, never), torch.float32)
    assert not torch.allclose(logits_of(model, whole), logits_of(theirs, whole), atol=1e-2)


def test_empty_invocation_tokens_make_a_plain_adapter(tmp_path):
    model = biased_model()
    save_lora(model, tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, alora_invocation_tokens=[])
    assert check_equals_peft(model, tmp_path).info.invocation_tokens is None


def test_qalora_averages_inputs_over_groups_as_peft_does(tmp_path):
    """PEFT builds QALoRA layers on quantised bases only, so its own forward is called directly."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    model = biased_model()
    save_lora(model, tmp_path, lora_alpha=5, target_modules=["q_proj"])
    change_config(tmp_path, use_qalora=True, qalora_group_size=12)
    layer = load_peft_adapter(model, tmp_path).base_model.model.model.layers[0].self_attn.q_proj
    names = [f"{PREFIX.replace('.0.', f'.{i}.')}.q_proj.lora_A.weight" for i in (0, 1)]
    narrow = {name: torch.randn(3, 3, generator=torch.Generator().manual_seed(4)) for name in names}
    change_tensors(tmp_path, dict(narrow))
    adapter = read(model, tmp_path)
    assert adapter.info.method == "qalora"
    x = torch.randn(2, 5, 36, generator=torch.Generator().manual_seed(5))
    layer.lora_A["default"].weight = torch.nn.Parameter(narrow[names[0]])
    layer.qalora_group_size = {"default": 12}
    with torch.inference_mode():
        expected = QALoraLinearVariant.forward(layer, "default", x, layer.base_layer(x))
        ours = applied(model, adapter).model.layers[0].self_attn.q_proj(x)
        assert not torch.allclose(ours, layer.base_layer(x), atol=1e-2)
    assert_close(ours, expected, torch.float32)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_decomposed_base_costs_twice_the_rank_and_a_log_line(tmp_path, caplog, init):
    model = biased_model()
    save_lora(model, tmp_path, init_lora_weights=init, target_modules=["q_proj", "embed_tokens"])
    with caplog.at_level(logging.WARNING):
        adapter = read(model, tmp_path)
    assert [module.info.rank for module in adapter.modules] == [6, 6, 3]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "name='a'" in line
    assert f"init_lora_weights is {init!r}: each load decomposes 2 base weights" in line
    assert "path_initial_model_for_weight_conversion" in line


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_pissa_adapter_is_plain_lora(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = biased_model()
    config = LoraConfig(
        task_type="CAUSAL_LM", r=3, init_lora_weights="pissa", target_modules=["q_proj"]
    )
    adapted = get_peft_model(copy.deepcopy(model), config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(str(tmp_path / "start"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    adapted.peft_config["default"].init_lora_weights = "pissa"
    adapted.save_pretrained(
        str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    adapter = check_equals_peft(model, tmp_path / "end")
    assert adapter.info.method == "lora"
    assert adapter.info.max_rank == 6


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens"], ["lm_head"]])
def test_norms_of_large_weights_are_taken_in_chunks(tmp_path, monkeypatch, targets):
    model = biased_model()
    save_lora(model, tmp_path, use_dora=True, target_modules=targets)
    whole = read(model, tmp_path)
    monkeypatch.setattr(lora_weights, "CHUNK_ELEMENTS", 7 * 36)
    chunked = read(model, tmp_path)
    for one, other in zip(whole.modules, chunked.modules, strict=True):
        assert_close(one.vectors["g"], other.vectors["g"], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_folded_in_float32_and_rounded_once(tmp_path, dtype):
    model = biased_model().to(dtype)
    save_lora(model, tmp_path, use_dora=True, bias="all", target_modules=["q_proj", "up_proj"])
    adapter = read(model, tmp_path, dtype)
    wide = read(model.float(), tmp_path)
    for ours, exact in zip(adapter.modules, wide.modules, strict=True):
        assert ours.info == exact.info
        for name, vector in ours.vectors.items():
            assert vector.dtype == torch.float32
            assert_close(vector, exact.vectors[name], torch.float32)
        if ours.a_RI is not None:
            assert ours.a_RI.dtype == dtype
            assert torch.equal(ours.a_RI, exact.a_RI.to(dtype))


def test_a_trained_bias_alone_is_a_module_of_rank_zero(tmp_path):
    model = biased_model()
    save_lora(model, tmp_path, bias="all", target_modules=["q_proj"])
    base = ModelBase(model)
    adapter = read(model, tmp_path)
    biases = {m.info.site: m for m in adapter.modules if m.info.rank == 0}
    k_site = TARGETS.index("k_proj")
    assert sorted(site % len(TARGETS) for site in biases) == [1, 1, 2, 2]
    assert biases[k_site].a_RI is None
    assert biases[k_site].bt_RO is None
    trained = tensors_of(tmp_path)[f"{PREFIX}.k_proj.bias"]
    kept = base.bias("model.layers.0.self_attn.k_proj")
    assert_close(biases[k_site].vectors["c"], trained - kept, torch.float32)


def test_adapters_of_one_variant_share_their_plan(tmp_path):
    model = biased_model()
    infos = []
    for name in ("a", "b"):
        save_lora(model, tmp_path / name, use_dora=True, target_modules=["q_proj", "lm_head"])
        infos.append(read_adapter_info(tmp_path / name, name, shape_of(model)))
    assert infos[0].modules is infos[1].modules
