"""What dtypes an adapter may be saved in, and two of them in one file."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from adapter_factory import shape_of
from general_form import check_equals_peft, read, save_peft
from loraswarm.adapters.reading import read_adapter_info
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
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def refusal(model: Any, path: Any, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(AdapterError) as caught:
        read(model, path, dtype)
    return str(caught.value)


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_read_as_peft_reads_it(keys, dtype, tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules=["q_proj", "up_proj"], **keys)
    change_tensors(tmp_path, {n: t.to(dtype) for n, t in tensors_of(tmp_path).items()})
    check_equals_peft(model, tmp_path)


def test_float64_is_rounded_to_the_nearest(tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules=["q_proj"])
    precise = torch.randn(3, 36, generator=torch.Generator().manual_seed(1)).double() / 3
    change_tensors(tmp_path, {NAME: precise})
    a_RI = read(model, tmp_path).modules[0].a_RI
    assert a_RI is not None
    assert not a_RI.double().equal(precise)
    assert (a_RI.double() - precise).abs().max() <= precise.abs().max() * 2.0**-24


def test_float64_beyond_float32_is_refused_by_name(tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules=["q_proj"], use_dora=True)
    change_tensors(tmp_path, {NAME: torch.full((3, 36), 1e300, dtype=torch.float64)})
    message = refusal(model, tmp_path)
    assert f"{NAME!r} has values up to 1e+300; float32 ends at" in message
    change_tensors(tmp_path, {NAME: torch.full((3, 36), float("nan"), dtype=torch.float64)})
    assert f"{NAME!r} has NaN" in refusal(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_other_dtypes_are_refused_with_what_to_do(dtype, tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules=["q_proj"])
    change_tensors(tmp_path, {NAME: torch.ones(3, 36).to(dtype)})
    message = refusal(model, tmp_path)
    assert repr(NAME) in message
    assert "save it in float32 or bfloat16" in message


def rounded(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Those with `part` in their names, in bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in tensors.items() if part in name}


@pytest.mark.parametrize("part", ["lora_embedding_A", "lora_embedding_B", "lm_head.lora_"])
def test_tied_ends_in_two_dtypes_are_those_that_peft_keeps(part, tmp_path):
    model = biased_model()
    save_lora(model, tmp_path, target_modules=["embed_tokens"], ensure_weight_tying=True)
    short = rounded(tensors_of(tmp_path), part)
    assert short
    change_tensors(tmp_path, short)
    check_equals_peft(model, tmp_path)
    name = next(iter(short))
    change_tensors(tmp_path, {name: short[name] * 1.02})
    assert "ensure_weight_tying" in refusal(model, tmp_path)


@pytest.mark.parametrize("part", ["embed_tokens.weight", "lm_head.weight"])
def test_tied_saved_tables_in_two_dtypes_are_those_that_peft_keeps(part, tmp_path):
    model = biased_model()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    save_peft(model, tmp_path, config)
    short = rounded(tensors_of(tmp_path), part)
    assert short
    change_tensors(tmp_path, short)
    check_equals_peft(model, tmp_path)


def test_a_group_size_of_null_is_one_where_nothing_is_grouped(tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, qalora_group_size=None)
    check_equals_peft(model, tmp_path)
    change_config(tmp_path, use_qalora=True)
    with pytest.raises(AdapterError, match="qalora_group_size is None"):
        read_adapter_info(tmp_path, "a", shape_of(model))


@pytest.mark.parametrize("init", ["PISSA", "Eva", "Orthogonal", "LoftQ", "CorDA", "LORA_GA"])
def test_an_initialisation_that_peft_does_not_know_in_capitals_is_refused(init, tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, init_lora_weights=init)
    assert f"init_lora_weights is {init!r}" in refusal(model, tmp_path)


@pytest.mark.parametrize("init", ["Gaussian", "MiCA", "OLoRA"])
def test_an_initialisation_that_peft_knows_in_any_letters_is_read(init, tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules=["q_proj"], init_lora_weights=init)
    check_equals_peft(model, tmp_path)
