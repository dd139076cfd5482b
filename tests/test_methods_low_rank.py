"""Methods whose update is an exact B A of their own making, against PEFT: MiSS, DeLoRA, LoHa, LoKr,
GraLoRA and BEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from adapter_factory import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_peft_adapter,
    shape_of,
    tiny_llama,
    write_adapter,
)
from general_form import applied, check_equals_peft, logits_of, read, save_peft
from loraswarm.adapters.methods.lokr import split_size
from loraswarm.core.base_shape import TARGETS
from tolerance import assert_close

# PEFT warns about what merging would need.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
ALL = list(TARGETS)
WIDE = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""k_proj and v_proj are too narrow for higher ranks to be smaller than the weight."""
MakeConfig = Callable[..., Any]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama(num_layers=2)


@pytest.fixture(scope="module")
def qwen() -> PreTrainedModel:
    """Biases on q, k and v, and a tied lm_head."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=133,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    config.head_dim = 6
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


# Configs that both models take; each with what it must be described as.
CASES: dict[str, tuple[MakeConfig, dict[str, Any], str]] = {
    "miss": (peft.MissConfig, {"r": 4}, "miss"),
    "miss of rank 1": (peft.MissConfig, {"r": 1}, "miss"),
    "miss of a rank that divides no size": (peft.MissConfig, {"r": 7}, "miss"),
    "miss mini": (peft.MissConfig, {"r": 5, "init_weights": "mini", "mini_r": 4}, "miss"),
    "miss without init": (peft.MissConfig, {"r": 3, "init_weights": False}, "miss"),
    "delora": (peft.DeloraConfig, {"r": 3}, "delora"),
    "delora with patterns": (
        peft.DeloraConfig,
        {"r": 3, "rank_pattern": {"k_proj": 1, "mlp.up_proj": 7}, "lambda_pattern": {"q_proj": 2}},
        "delora",
    ),
    "loha": (peft.LoHaConfig, {"r": 2, "alpha": 3}, "loha"),
    "loha of rank 1": (peft.LoHaConfig, {"r": 1}, "loha"),
    "loha with patterns": (
        peft.LoHaConfig,
        {"r": 1, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
        "loha",
    ),
    "lokr, w2 factored": (
        peft.LoKrConfig,
        {"r": 2, "alpha": 3, "target_modules": WIDE},
        "lokr",
    ),
    "lokr, both factored": (peft.LoKrConfig, {"r": 1, "decompose_both": True}, "lokr"),
    "lokr of one small factor": (peft.LoKrConfig, {"r": 3, "decompose_factor": 2}, "lokr"),
    "lokr of a factor that divides no size": (
        peft.LoKrConfig,
        {"r": 2, "decompose_factor": 5, "decompose_both": True},
        "lokr",
    ),
    "lokr with patterns": (
        peft.LoKrConfig,
        {
            "r": 2,
            "decompose_both": True,
            "rank_pattern": {"o_proj": 1},
            "alpha_pattern": {"layers.0.mlp.up_proj": 5},
            "target_modules": WIDE,
        },
        "lokr",
    ),
    "gralora": (peft.GraloraConfig, {"r": 4, "alpha": 3}, "gralora"),
    "gralora of 4 blocks": (
        peft.GraloraConfig,
        {"r": 4, "gralora_k": 4, "alpha": 3, "target_modules": WIDE},
        "gralora",
    ),
    "gralora with lora": (peft.GraloraConfig, {"r": 2, "hybrid_r": 3, "alpha": 3}, "gralora"),
    "beft": (peft.BeftConfig, {}, "beft"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_name", ["llama", "qwen"])
def test_logits_are_those_of_peft(case, model_name, tmp_path, request):
    model = request.getfixturevalue(model_name)
    make_config, values, method = CASES[case]
    save_peft(model, tmp_path, make_config(**{"target_modules": ALL, **values}))
    adapter = check_equals_peft(model, tmp_path)
    assert adapter.info.method == method
    assert len(adapter.info.modules) == 2 * len(values.get("target_modules", ALL))


@pytest.mark.parametrize(
    "config",
    [
        peft.MissConfig(r=7, target_modules=["lm_head", "q_proj"]),
        peft.DeloraConfig(r=3, target_modules=["lm_head"]),
        peft.LoHaConfig(r=3, target_modules=["lm_head"]),
        peft.LoKrConfig(r=3, target_modules="lm_head"),
        peft.BeftConfig(target_modules=["lm_head"]),
    ],
    ids=lambda config: config.peft_type.value,
)
@pytest.mark.parametrize("model_name", ["llama", "qwen"])
def test_the_lm_head_is_adapted_like_any_linear(config, model_name, tmp_path, request):
    model = request.getfixturevalue(model_name)
    save_peft(model, tmp_path, config)
    adapter = check_equals_peft(model, tmp_path)
    assert adapter.info.modules[-1].site == shape_of(model).head_site


def test_some_modules_of_some_layers_only(llama, tmp_path):
    config = peft.LoHaConfig(
        r=2,
        target_modules=["q_proj", "up_proj"],
        exclude_modules=["layers.0.mlp.up_proj"],
        layers_to_transform=[0, 1],
    )
    save_peft(llama, tmp_path, config)
    adapter = check_equals_peft(llama, tmp_path)
    assert [(module.layer, TARGETS[module.target]) for module in adapter.info.modules] == [
        (0, "q_proj"),
        (1, "q_proj"),
        (1, "up_proj"),
    ]


def test_miss_adapters_of_one_rank_share_the_matrix_that_sums(llama, tmp_path):
    first, second = (
        peft.MissConfig(r=5, target_modules=["q_proj"]),
        peft.MissConfig(r=5, target_modules=["down_proj"], init_weights="mini", mini_r=3),
    )
    save_peft(llama, tmp_path / "first", first)
    save_peft(llama, tmp_path / "second", second, seed=1)
    adapters = [read(llama, tmp_path / name) for name in ("first", "second")]
    assert len({matrix for a in adapters for matrix in a.info.shared_matrices()}) == 1
    digests = [tuple(adapter.shared) for adapter in adapters]
    assert digests[0] == digests[1] == (adapters[0].info.shared_matrices()[0].digest,)
    torch.testing.assert_close(*(a.shared[digests[0][0]] for a in adapters), rtol=0, atol=0)


def test_miss_adapters_of_other_ranks_do_not_share(llama, tmp_path):
    for rank in (3, 4):
        save_peft(llama, tmp_path / str(rank), peft.MissConfig(r=rank, target_modules=ALL))
    digests = {tuple(read(llama, tmp_path / str(rank)).shared) for rank in (3, 4)}
    assert len(digests) == 2


def test_delora_ranks_of_zeros_stay_zeros(llama, tmp_path):
    def randomize(name, parameter, generator):
        if "delora_A" not in name and "delora_B" not in name:
            return None
        values = torch.randn(parameter.shape, generator=generator)
        values[0] = 0
        return values

    save_peft(llama, tmp_path, peft.DeloraConfig(r=3, target_modules=ALL), randomize=randomize)
    adapter = check_equals_peft(llama, tmp_path)
    a_RI = adapter.modules[0].a_RI
    assert a_RI is not None
    assert a_RI[0].abs().max() == 0
    assert a_RI[1].abs().max() > 0


def test_delora_scales_inputs_by_the_norms_in_the_file(llama, tmp_path):
    save_peft(llama, tmp_path, peft.DeloraConfig(r=3, target_modules=ALL))
    weights = load_file(tmp_path / WEIGHTS_FILE)
    for name, tensor in weights.items():
        if name.endswith("delora_w_norm"):
            tensor.copy_(torch.linspace(0.1, 2, len(tensor)))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    check_equals_peft(llama, write_adapter(tmp_path, config, weights))


@pytest.mark.parametrize("case", [case for case in CASES if case != "beft"])
def test_a_bfloat16_base_gets_the_same_update_rounded_once(case, llama, tmp_path):
    make_config, values, _ = CASES[case]
    save_peft(llama, tmp_path, make_config(**{"target_modules": ALL, **values}))
    rounded, exact = (read(llama, tmp_path, dtype) for dtype in (torch.bfloat16, torch.float32))
    for short, long in zip(rounded.modules, exact.modules, strict=True):
        for side in ("a_RI", "bt_RO"):
            given, wanted = getattr(short, side), getattr(long, side)
            if wanted is not None:
                torch.testing.assert_close(given, wanted.to(torch.bfloat16), rtol=0, atol=0)
    expected = logits_of(load_peft_adapter(llama, tmp_path))
    assert_close(logits_of(applied(llama, rounded)), expected, torch.bfloat16)


def test_ranks_are_the_least_that_are_exact(llama, tmp_path):
    expected = {
        "loha": (peft.LoHaConfig(r=3, target_modules=["q_proj"]), 9),
        # 36 = 6 * 6: w1 [6, 6] whole, w2 a product of rank 2
        "lokr": (peft.LoKrConfig(r=2, target_modules=["q_proj"]), 12),
        "both": (peft.LoKrConfig(r=2, decompose_both=True, target_modules=["q_proj"]), 4),
        # 36 = 2 * 18 and 12 = 2 * 6: w2 [6, 18] is a product of 8, and of 6
        "over": (peft.LoKrConfig(r=8, decompose_factor=2, target_modules=["q_proj"]), 16),
        "gralora": (peft.GraloraConfig(r=4, hybrid_r=1, target_modules=["q_proj"]), 9),
    }
    for name, (config, rank) in expected.items():
        save_peft(llama, tmp_path / name, config)
        infos = read(llama, tmp_path / name).info.modules
        assert [info.rank for info in infos] == [rank, rank], name


@pytest.mark.parametrize("factor", [-2, -1, 0, 1, 2, 3, 5, 8, 16, 133])
def test_sizes_are_split_as_peft_splits_them(factor):
    for size in range(1, 300):
        assert split_size(size, factor) == factorization(size, factor), size
        assert math.prod(split_size(size, factor)) == size
