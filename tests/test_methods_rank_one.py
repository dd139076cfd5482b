"""Rank 1, where matrices are single rows and columns: every method that has one, against PEFT."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from adapter_factory import peft_warnings_ignored
from general_form import applied, check_equals_peft, logits_of, read, save_peft
from loraswarm.core.base_shape import TARGETS
from tied_lora import TiedLoraModel, TiedLoraRecipe
from tiny_models import biased_model, plain_model
from tolerance import assert_close

# PEFT warns about what merging would need.
pytestmark = pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias")
ADALORA = {"init_r": 1, "target_r": 1, "total_step": 10}
VBLORA = {"r": 1, "num_vectors": 5, "vector_length": 4, "topk": 2}
# Config class, its arguments, and the rank that is served.
CASES: dict[str, tuple[type[peft.PeftConfig], dict[str, Any], int | None]] = {
    "lora": (peft.LoraConfig, {"r": 1}, 1),
    "dora": (peft.LoraConfig, {"r": 1, "use_dora": True}, 1),
    "pissa": (peft.LoraConfig, {"r": 1, "init_lora_weights": "pissa"}, 2),
    "olora": (peft.LoraConfig, {"r": 1, "init_lora_weights": "olora"}, 2),
    "qalora": (peft.LoraConfig, {"r": 1, "use_qalora": True, "qalora_group_size": 4}, 1),
    "adalora": (peft.AdaLoraConfig, ADALORA, 1),
    "vera": (peft.VeraConfig, {"r": 1}, 1),
    "vera regenerated": (peft.VeraConfig, {"r": 1, "save_projection": False}, 1),
    "vblora": (peft.VBLoRAConfig, VBLORA, 1),
    "vblora top k": (peft.VBLoRAConfig, {**VBLORA, "save_only_topk_weights": True}, 1),
    "miss": (peft.MissConfig, {"r": 1}, 1),
    "miss mini": (peft.MissConfig, {"r": 1, "init_weights": "mini", "mini_r": 1}, 1),
    "delora": (peft.DeloraConfig, {"r": 1}, 1),
    "loha": (peft.LoHaConfig, {"r": 1}, 1),
    "lokr": (peft.LoKrConfig, {"r": 1}, None),
    "lokr, both factored": (peft.LoKrConfig, {"r": 1, "decompose_both": True}, 1),
    "lokr of one small factor": (peft.LoKrConfig, {"r": 1, "decompose_factor": 2}, None),
    "lokr of a factor of 1": (
        peft.LoKrConfig,
        {"r": 1, "decompose_factor": 1, "decompose_both": True},
        1,
    ),
    "gralora": (peft.GraloraConfig, {"r": 1, "gralora_k": 1}, 1),
    "gralora with lora": (peft.GraloraConfig, {"r": 1, "gralora_k": 1, "hybrid_r": 1}, 2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make_model", [plain_model, biased_model])
def test_rank_1_gives_the_logits_of_peft(case, make_model, tmp_path):
    model = make_model()
    make_config, values, rank = CASES[case]
    with_defaults = {"task_type": "CAUSAL_LM", "target_modules": list(TARGETS), **values}
    with peft_warnings_ignored():
        config = make_config(**with_defaults)
    save_peft(model, tmp_path, config)
    adapter = check_equals_peft(model, tmp_path)
    assert rank is None or {module.rank for module in adapter.info.modules} == {rank}


def test_rank_1_of_tied_lora_gives_the_logits_of_its_reference(tmp_path):
    model = plain_model()
    reference = TiedLoraModel(model, TiedLoraRecipe(1, 3, TARGETS))
    reference.randomize()
    reference.save(tmp_path)
    adapter = read(model, tmp_path)
    assert {module.rank for module in adapter.info.modules} == {1}
    expected = logits_of(reference)
    assert not expected.equal(logits_of(model))
    assert_close(logits_of(applied(model, adapter)), expected, torch.float32)
