"""NeMo's .nemo files are read as the PEFT adapter they were made from: fused, sharded, packed."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adapter_factory import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_peft_adapter,
    random_tensors,
    shape_of,
    tiny_llama,
    write_adapter,
)
from general_form import applied, check_equals_peft, logits_of, read
from loraswarm.adapters.catalog import Catalog
from loraswarm.adapters.convert import convert_to_peft
from loraswarm.adapters.describing import scan_now
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.adapters.source import open_source
from loraswarm.core.base_shape import TARGETS
from loraswarm.errors import AdapterError
from nemo_factory import (
    Layout,
    nemo_config,
    peft_to_nemo,
    shared_a,
    state_dicts,
    write_nemo,
    write_tar,
)
from tolerance import assert_close

RANK = 6
LAYOUTS = {
    "fused": Layout(),
    "unfused": Layout(is_fused=False),
    "module infix and ./": Layout(has_module_infix=True, has_dot_prefix=True),
    "gzipped": Layout(is_gzipped=True),
    "two tensor ranks": Layout(tensor_parallel=2),
    "two tensor ranks, unfused": Layout(is_fused=False, tensor_parallel=2),
    "two pipeline stages": Layout(pipeline_parallel=2),
    "four ranks": Layout(tensor_parallel=2, pipeline_parallel=2, has_dot_prefix=True),
    "four ranks, unfused, gzipped": Layout(False, 2, 2, True, False, True),
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_layers=4)


def save_peft_twin(model, path: Path, targets=TARGETS, **overrides: Any) -> Path:
    """A PEFT adapter that NeMo could have trained: q, k and v share A, gate and up too."""
    shape = shape_of(model)
    ranks = dict.fromkeys(targets, RANK)
    tensors = shared_a(random_tensors(shape, ranks, range(shape.num_layers), seed=5, std=0.2))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(targets),
        "inference_mode": True,
    }
    return write_adapter(path, config | overrides, tensors)


def stored(path: Path) -> dict[str, torch.Tensor]:
    with open_source(path) as source:
        return {name: source.read(name) for name in source.tensors}


def write_simple(path: Path, model, change=None, rename=None, layout=None) -> Path:
    """A fused .nemo in directory `path`; `change` edits the config, `rename` the state dicts."""
    layout = layout or Layout()
    shape = shape_of(model)
    tensors = shared_a(random_tensors(shape, dict.fromkeys(TARGETS, RANK), range(4), std=0.2))
    config = nemo_config(shape, set(TARGETS), RANK, layout)
    states = state_dicts(tensors, shape, layout)
    if change:
        change(config)
    if rename:
        rename(states)
    write_nemo(path / "a.nemo", config, states, layout)
    return path


def refusal(path: Path, model) -> str:
    with pytest.raises(AdapterError) as caught:
        read(model, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_nemo_file_holds_the_tensors_of_the_peft_adapter(model, tmp_path, layout):
    peft = save_peft_twin(model, tmp_path / "peft")
    peft_to_nemo(peft, tmp_path / "nemo" / "x.nemo", shape_of(model), layout)
    expected, found = stored(peft), stored(tmp_path / "nemo")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    with open_source(peft) as twin, open_source(tmp_path / "nemo") as source:
        names = sorted(expected)
        assert source.content_digest(names) == twin.content_digest(names)
        assert source.file_format == "nemo"


@pytest.mark.parametrize("layout", [LAYOUTS["fused"], LAYOUTS["four ranks, unfused, gzipped"]])
def test_a_nemo_file_gives_pefts_logits(model, tmp_path, layout):
    peft = save_peft_twin(model, tmp_path / "peft")
    peft_to_nemo(peft, tmp_path / "nemo" / "x.nemo", shape_of(model), layout)
    adapter = read(model, tmp_path / "nemo")
    logits = logits_of(applied(model, adapter))
    assert_close(logits, logits_of(load_peft_adapter(model, peft)), torch.float32)
    assert not torch.allclose(logits, logits_of(model), rtol=1e-2, atol=1e-2)
    assert adapter.info.file_format == "nemo"


def test_fused_tensors_are_cut_where_nemo_puts_the_parts(tmp_path):
    """Laid out by hand: 4 heads of 1 channel in 2 groups, 3 gate rows and 3 up rows."""
    q = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter"
    fc1 = "model.decoder.layers.0.mlp.adapter_layer.lora_hto4h_adapter"
    #                     q0  q1  k0  v0  q2  q3  k1  v1
    rows = torch.tensor([[10, 11, 20, 30, 12, 13, 21, 31]]).float().T
    state = {
        f"{q}.linear_in.weight": torch.tensor([[1.0, 2, 3, 4]]),
        f"{q}.linear_out.weight": rows,
        f"{fc1}.linear_in.weight": torch.tensor([[5.0, 6, 7, 8]]),
        f"{fc1}.linear_out.weight": torch.tensor([[40.0, 41, 42, 50, 51, 52]]).T,
    }
    config = {
        "hidden_size": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "peft": {
            "peft_scheme": "lora",
            "lora_tuning": {"adapter_dim": 1, "target_modules": ["attention_qkv", "mlp_fc1"]},
        },
    }
    write_nemo(tmp_path / "a.nemo", config, {"model_weights.ckpt": state})
    found = {
        name.removeprefix("base_model.model.model.layers.0.").removesuffix(".weight"): tensor
        for name, tensor in stored(tmp_path).items()
    }
    columns = {name: tensor.flatten().tolist() for name, tensor in found.items()}
    assert columns == {
        "self_attn.q_proj.lora_A": [1, 2, 3, 4],
        "self_attn.k_proj.lora_A": [1, 2, 3, 4],
        "self_attn.v_proj.lora_A": [1, 2, 3, 4],
        "self_attn.q_proj.lora_B": [10, 11, 12, 13],
        "self_attn.k_proj.lora_B": [20, 21],
        "self_attn.v_proj.lora_B": [30, 31],
        "mlp.gate_proj.lora_A": [5, 6, 7, 8],
        "mlp.up_proj.lora_A": [5, 6, 7, 8],
        "mlp.gate_proj.lora_B": [40, 41, 42],
        "mlp.up_proj.lora_B": [50, 51, 52],
    }


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (None, 1.0),
        (3, 0.5),
        (1.5, 0.25),
        ("${model.peft.lora_tuning.adapter_dim}", 1.0),
    ],
)
def test_alpha_is_divided_by_the_rank_and_equals_it_by_default(model, tmp_path, alpha, expected):
    def change(config):
        config["peft"]["lora_tuning"]["alpha"] = alpha

    info = read_adapter_info(write_simple(tmp_path, model, change), "a", shape_of(model))
    assert {module.scale for module in info.modules} == {expected}


def test_selected_layers_count_from_1(model, tmp_path):
    def change(config):
        config["peft"]["lora_tuning"]["layer_selection"] = [2, 4]

    def rename(states):
        for state in states.values():
            for name in list(state):
                if ".layers.0." in name or ".layers.2." in name:
                    del state[name]

    info = read_adapter_info(write_simple(tmp_path, model, change, rename), "a", shape_of(model))
    assert {module.layer for module in info.modules} == {1, 3}


def test_a_nemo_file_itself_can_be_opened_too(model, tmp_path):
    write_simple(tmp_path, model)
    assert read_adapter_info(tmp_path / "a.nemo", "a", shape_of(model)).modules


TUNING_REFUSALS = {
    "weight_tying": (True, "tied across layers"),
    "position_embedding_strategy": ("add", "layer positions"),
    "brand_new_key": (1, "unknown"),
    "adapter_dim": (0, "from 1 to"),
    "alpha": ("12", "must be a number"),
    "variant": ("other", "'nemo' or 'canonical'"),
    "target_modules": (["attention_kv"], "supported: attention_qkv"),
    "layer_selection": ([0], "count from 1"),
}
MODEL_REFUSALS = {
    "rotary_interleaved": (True, "rotary"),
    "virtual_pipeline_model_parallel_size": (2, "interleaved"),
    "num_layers_in_first_pipeline_stage": (1, "unequal"),
    "num_query_groups": (4, "must divide"),
    "tensor_model_parallel_size": (2, "tensor_model_parallel_size is 2 and"),
    "peft": ({"peft_scheme": "ia3"}, "only 'lora'"),
    "kv_channels": (5, "calls for 50"),
}


@pytest.mark.parametrize("key", TUNING_REFUSALS)
def test_a_key_that_changes_the_update_is_refused_by_name(model, tmp_path, key):
    value, message = TUNING_REFUSALS[key]

    def change(config):
        config["peft"]["lora_tuning"][key] = value

    text = refusal(write_simple(tmp_path, model, change), model)
    assert f"peft.lora_tuning.{key} is" in text
    assert message in text


@pytest.mark.parametrize("key", MODEL_REFUSALS)
def test_a_key_of_the_base_that_does_not_fit_is_refused_by_name(model, tmp_path, key):
    value, message = MODEL_REFUSALS[key]
    text = refusal(write_simple(tmp_path, model, lambda config: config.update({key: value})), model)
    assert message in text
    assert key in text or key == "peft" or "q_proj" in text or "kqv" in text


def test_keys_about_training_only_are_accepted(model, tmp_path):
    def change(config):
        config["peft"]["lora_tuning"]["adapter_dropout"] = 0.5
        config["peft"]["lora_tuning"]["dropout_position"] = "pre"

    assert read(model, write_simple(tmp_path, model, change))


QKV = "model.decoder.layers.1.self_attention.adapter_layer.lora_kqv_adapter"
TENSOR_REFUSALS = {
    "renamed": (f"{QKV}.linear_in.weight", "model.decoder.layers.1.x.weight", "none of a NeMo"),
    "experts": (
        f"{QKV}.linear_in.weight",
        "model.decoder.layers.1.mlp.adapter_layer.lora_moe_hto4h_adapter.expert_adapters.0"
        ".linear_in.weight",
        "experts",
    ),
    "cross attention": (
        f"{QKV}.linear_in.weight",
        f"{QKV}.linear_in.weight".replace("kqv", "q"),
        "cross attention",
    ),
    "in the wrong block": (
        f"{QKV}.linear_in.weight",
        f"{QKV}.linear_in.weight".replace("self_attention", "mlp"),
        "none of a NeMo",
    ),
    "missing": (f"{QKV}.linear_in.weight", None, "is missing"),
    "twice": (
        f"{QKV}.linear_in.weight",
        QKV.replace("kqv", "unfused_kqv") + ".q_adapter.linear_in.weight",
        "missing",
    ),
}


@pytest.mark.parametrize("case", TENSOR_REFUSALS)
def test_a_tensor_that_does_not_belong_is_refused_by_name(model, tmp_path, case):
    name, new_name, message = TENSOR_REFUSALS[case]

    def rename(states):
        (state,) = states.values()
        tensor = state.pop(name)
        if new_name:
            state[new_name] = tensor

    text = refusal(write_simple(tmp_path, model, rename=rename), model)
    assert message in text
    assert "layers.1" in text


def test_a_fused_and_an_unfused_adapter_of_one_module_are_refused(model, tmp_path):
    def rename(states):
        (state,) = states.values()
        unfused = QKV.replace("kqv", "unfused_kqv") + ".q_adapter.linear_in.weight"
        state[unfused] = state[f"{QKV}.linear_in.weight"].clone()

    assert "second adapter of q_proj" in refusal(write_simple(tmp_path, model, None, rename), model)


def test_a_wrong_shape_is_refused_by_name(model, tmp_path):
    def rename(states):
        (state,) = states.values()
        state[f"{QKV}.linear_in.weight"] = torch.ones(RANK, 35)

    assert "[6, 35]" in refusal(write_simple(tmp_path, model, rename=rename), model)


def test_nan_is_refused_by_name(model, tmp_path):
    def rename(states):
        (state,) = states.values()
        state[f"{QKV}.linear_in.weight"][2, 3] = torch.nan

    text = refusal(write_simple(tmp_path, model, rename=rename), model)
    assert "layers.1.self_attn.q_proj.lora_A.weight' has NaN" in text


def test_a_tensor_missing_on_one_rank_is_refused(model, tmp_path):
    def rename(states):
        del states["mp_rank_01/model_weights.ckpt"][f"{QKV}.linear_in.weight"]

    path = write_simple(tmp_path, model, rename=rename, layout=Layout(tensor_parallel=2))
    assert "rank 1: missing there" in refusal(path, model)


def test_target_modules_without_tensors_are_refused(model, tmp_path):
    def rename(states):
        (state,) = states.values()
        for name in list(state):
            if "4htoh" in name:
                del state[name]

    text = refusal(write_simple(tmp_path, model, rename=rename), model)
    assert "target_modules has mlp_fc2" in text


def test_a_rewritten_file_is_not_read_for_the_old_description(model, tmp_path):
    from general_form import ModelBase
    from loraswarm.adapters.reading import read_adapter

    info = read_adapter_info(write_simple(tmp_path, model), "a", shape_of(model))
    content = (tmp_path / "a.nemo").read_bytes()
    (tmp_path / "a.nemo").write_bytes(content + bytes(512))
    with pytest.raises(AdapterError, match="have changed"):
        read_adapter(info, ModelBase(model), torch.float32)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor_parallel=2)])
def test_a_file_that_is_cut_short_while_it_is_open_is_refused_by_tensor(model, tmp_path, layout):
    write_simple(tmp_path, model, layout=layout)
    with open_source(tmp_path) as source:
        os.truncate(tmp_path / "a.nemo", 4096)
        for name in list(source.tensors)[-3:]:
            with pytest.raises(AdapterError, match=f"cut short while tensor '{re.escape(name)}'"):
                source.read(name)
        with pytest.raises(AdapterError, match="cut short while tensor"):
            source.content_digest(source.tensors)


def test_a_distributed_checkpoint_is_refused_with_advice(model, tmp_path):
    config = nemo_config(shape_of(model), set(TARGETS), RANK, Layout())
    members = {
        "model_config.yaml": yaml.safe_dump(config).encode(),
        "model_weights/common.pt": b"",
    }
    write_tar(tmp_path / "a.nemo", members)
    assert "export the adapter from NeMo for Hugging Face PEFT" in refusal(tmp_path, model)


def test_converted_files_are_what_peft_reads(model, tmp_path):
    write_simple(tmp_path / "nemo", model, layout=Layout(tensor_parallel=2, is_gzipped=True))
    conversion = convert_to_peft(tmp_path / "nemo" / "a.nemo", tmp_path / "out")
    assert sorted(path.name for path in conversion.path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert conversion.source_format == "nemo"
    assert conversion.num_bytes == (tmp_path / "out" / WEIGHTS_FILE).stat().st_size
    expected = stored(tmp_path / "nemo")
    assert conversion.num_tensors == len(expected)
    written = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    check_equals_peft(model, tmp_path / "out")


def test_mixed_dtypes_are_converted_as_safetensors_itself_writes_them(tmp_path):
    tensors = {
        "b": torch.ones(3, dtype=torch.bfloat16),
        "a": torch.arange(7.0),
        "c": torch.tensor([[1, 2]], dtype=torch.int64),
        "empty": torch.ones(0, 4),
    }
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA"}))
    torch.save(tensors, tmp_path / "in" / "adapter_model.bin")
    convert_to_peft(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    assert (tmp_path / "out" / CONFIG_FILE).read_text() == json.dumps({"peft_type": "LORA"})


def test_convert_never_overwrites(model, tmp_path):
    write_simple(tmp_path / "nemo", model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(AdapterError, match="is not empty; give a new directory"):
        convert_to_peft(tmp_path / "nemo", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(AdapterError, match="cannot write to"):
        convert_to_peft(tmp_path / "nemo", tmp_path / "out" / "mine.txt")


def test_a_failed_conversion_leaves_no_half_adapter(model, tmp_path):
    write_simple(tmp_path / "nemo", model)
    path = tmp_path / "nemo" / "a.nemo"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(AdapterError, match=r"'nemo': a\.nemo"):
        convert_to_peft(tmp_path / "nemo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def catalog_of(root: Path, model) -> Catalog:
    return scan_now([str(root)], shape_of(model))


def test_the_catalog_serves_a_directory_with_one_nemo_file(model, tmp_path):
    write_simple(tmp_path / "sql", model)
    (tmp_path / "sql" / ".hidden.nemo").touch()
    catalog = catalog_of(tmp_path, model)
    assert list(catalog.served) == ["sql"]
    assert not catalog.refusals
    assert [row.file_format for row in catalog.summaries()] == ["nemo"]
    assert list(catalog_of(tmp_path / "sql", model).served) == ["sql"]


def test_the_catalog_refuses_what_could_be_two_adapters(model, tmp_path):
    write_simple(tmp_path / "two", model)
    write_simple(tmp_path / "both", model)
    write_simple(tmp_path / "stray", model)
    save_peft_twin(model, tmp_path / "both")
    content = (tmp_path / "two" / "a.nemo").read_bytes()
    (tmp_path / "two" / "b.nemo").write_bytes(content)
    (tmp_path / "stray.nemo").write_bytes(content)
    catalog = catalog_of(tmp_path, model)
    assert list(catalog.served) == ["stray"]
    reasons = {refused.name: refused.reason for refused in catalog.refusals}
    assert "there are 2 .nemo files" in reasons["two"]
    assert "'a.nemo' lies beside 'adapter_config.json'" in reasons["both"]
    assert "move it into a directory of its own" in reasons["stray.nemo"]


def test_a_nemo_file_of_another_base_is_refused(model, tmp_path):
    write_simple(tmp_path, model)
    other = tiny_llama(num_layers=3)
    with pytest.raises(AdapterError, match=r"layers\.3"):
        read_adapter_info(tmp_path, "a", shape_of(other))


def test_a_checkpoint_that_runs_code_is_refused(model, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    buffer = io.BytesIO()
    torch.save({"x": Runs()}, buffer)
    config = nemo_config(shape_of(model), set(TARGETS), RANK, Layout())
    members = {
        "model_config.yaml": yaml.safe_dump(config).encode(),
        "model_weights.ckpt": buffer.getvalue(),
    }
    write_tar(tmp_path / "a.nemo", members)
    text = refusal(tmp_path, model)
    assert "a.nemo: model_weights.ckpt asks for 'posix.mkdir'" in text
    assert not (tmp_path / "marker").exists()
