"""Adapters saved by PEFT are read as PEFT itself reads them: modules, ranks, scales, weights."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from adapter_factory import (
    SMALL_SHAPE,
    WEIGHTS_FILE,
    load_peft_adapter,
    make_peft_adapter,
    random_tensors,
    save_random_adapter,
    shape_of,
    tiny_llama,
    write_adapter,
)
from general_form import ModelBase
from loraswarm.adapters.adapter import Adapter, AdapterInfo
from loraswarm.adapters.peft_directory import PeftDirectory
from loraswarm.adapters.reading import read_adapter, read_adapter_info
from loraswarm.adapters.safetensors_header import read_header
from loraswarm.core.base_shape import TARGETS, BaseShape, module_path
from loraswarm.errors import AdapterError
from tolerance import assert_close

PREFIX = "base_model.model."
LAYER_0_Q = "model.layers.0.self_attn.q_proj"
LORA_CONFIGS = {
    "one target": {"r": 1, "target_modules": ["q_proj"]},
    "default alpha and rank": {"target_modules": ["v_proj", "down_proj"]},
    "float alpha": {"r": 3, "lora_alpha": 2.5, "target_modules": ["k_proj"]},
    "zero alpha": {"r": 3, "lora_alpha": 0, "target_modules": ["k_proj"]},
    "seven targets": {"r": 7, "lora_alpha": 5, "target_modules": list(TARGETS)},
    "all-linear": {"r": 5, "target_modules": "all-linear"},
    "rslora": {"r": 7, "lora_alpha": 5, "use_rslora": True, "target_modules": ["o_proj"]},
    "rank pattern by name": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 9},
    },
    "alpha pattern by whole path": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {LAYER_0_Q: 3, "layers.1.mlp.up_proj": 5},
    },
    "patterns that are regular expressions": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {r"layers\.[01]\.self_attn\..*": 3, "down.*": 5},
        "alpha_pattern": {"[qk]_proj": 7, "self_attn.q_proj": 11},
    },
    "overlapping patterns: the first of the file wins": {
        "r": 4,
        "target_modules": ["q_proj"],
        "alpha_pattern": {"q_proj": 3, "layers.0.self_attn.q_proj": 5},
    },
    "pattern of part of a word does not apply": {
        "r": 4,
        "target_modules": ["q_proj", "o_proj"],
        "alpha_pattern": {"proj": 3, "^q_proj": 5, "o_proj": 7, "": 9},
    },
    "rslora with patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 9},
        "alpha_pattern": {"q_proj": 3},
    },
    "regular expression": {"r": 2, "target_modules": r".*layers\.[02]\..*\.(q|v|gate)_proj"},
    "whole paths": {"r": 2, "target_modules": [LAYER_0_Q, "1.mlp.up_proj"]},
    "exclude by name": {
        "r": 2,
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj", "v_proj"],
    },
    "exclude by regular expression": {
        "r": 2,
        "target_modules": "all-linear",
        "exclude_modules": r".*\.mlp\..*",
    },
    "layers": {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"r": 2, "target_modules": ["up_proj"], "layers_to_transform": 0},
    "layers do not restrict whole paths": {
        "r": 2,
        "target_modules": [LAYER_0_Q, "v_proj"],
        "layers_to_transform": [2],
    },
    "layers pattern": {
        "r": 2,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
    },
    "names that match nothing": {"r": 2, "target_modules": ["q_proj", "c_attn"]},
    "plain initialisations": {
        "r": 2,
        "target_modules": ["q_proj"],
        "init_lora_weights": "orthogonal",
    },
    "dropout": {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.5},
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


class WeightlessBase:
    """The sizes of SMALL_SHAPE; plain LoRA asks for no weights."""

    shape: BaseShape = SMALL_SHAPE

    def weight(self, path: str) -> torch.Tensor:
        raise AssertionError(f"{path} was asked for")

    def bias(self, path: str) -> torch.Tensor | None:
        raise AssertionError(f"{path} was asked for")


def read_small(info: AdapterInfo, dtype: torch.dtype) -> Adapter:
    return read_adapter(info, WeightlessBase(), dtype)


def delta_weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    """scale * B A of each module, by path."""
    return {
        module_path(module.info.layer, module.info.target): module.info.scale
        * (module.bt_RO.t() @ module.a_RI)
        for module in adapter.modules
    }


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("lora_config", LORA_CONFIGS.values(), ids=LORA_CONFIGS.keys())
def test_modules_ranks_scales_and_weights_are_those_of_peft(model, tmp_path, lora_config):
    make_peft_adapter(model, tmp_path, lora_config, seed=3)
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in load_peft_adapter(model, tmp_path).named_modules()
        if hasattr(module, "lora_A")
    }
    info = read_adapter_info(tmp_path, "a", shape_of(model))
    ours = {module_path(module.layer, module.target): module for module in info.modules}
    assert {path: module.rank for path, module in ours.items()} == {
        path: layer.r["default"] for path, layer in layers.items()
    }
    assert {path: module.scale for path, module in ours.items()} == {
        path: layer.scaling["default"] for path, layer in layers.items()
    }
    deltas = delta_weights(read_adapter(info, ModelBase(model), torch.float32))
    for path, layer in layers.items():
        expected = layer.get_delta_weight("default")
        assert bool(expected.any()) == (lora_config.get("lora_alpha") != 0)
        assert_close(deltas[path], expected, torch.float32)


def test_info_lists_modules_by_site_with_size_method_and_greatest_rank(tmp_path):
    save_random_adapter(
        tmp_path, SMALL_SHAPE, rank={"down_proj": 3, "q_proj": 5}, targets=["down_proj", "q_proj"]
    )
    info = read_adapter_info(tmp_path, "a", SMALL_SHAPE)
    assert [(module.layer, module.target) for module in info.modules] == [
        (0, 0),
        (0, 6),
        (1, 0),
        (1, 6),
    ]
    assert info.max_rank == 5
    assert info.method == "lora"
    assert info.num_bytes == (tmp_path / WEIGHTS_FILE).stat().st_size
    assert info.path == tmp_path


def test_rank_stabilised_adapters_say_so(tmp_path):
    save_random_adapter(tmp_path, SMALL_SHAPE, config_overrides={"use_rslora": True})
    assert read_adapter_info(tmp_path, "a", SMALL_SHAPE).method == "rslora"


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_absent_rank_and_alpha_are_those_of_peft(tmp_path, key):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=8, alpha=8)
    expected = read_adapter_info(tmp_path, "a", SMALL_SHAPE).modules
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(re.sub(rf'"{key}": 8,', "", config))
    assert read_adapter_info(tmp_path, "a", SMALL_SHAPE).modules == expected
    assert expected[0].scale == 1.0


def test_adapters_of_one_recipe_share_their_module_list(tmp_path):
    infos = []
    for seed in (1, 2):
        path = save_random_adapter(tmp_path / str(seed), SMALL_SHAPE, seed=seed)
        infos.append(read_adapter_info(path, str(seed), SMALL_SHAPE))
    assert infos[0].modules is infos[1].modules


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_cast_and_b_is_transposed(tmp_path, stored, dtype):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=3, dtype=stored, seed=5)
    tensors = random_tensors(SMALL_SHAPE, dict.fromkeys(TARGETS, 3), range(2), seed=5)
    adapter = read_small(read_adapter_info(tmp_path, "a", SMALL_SHAPE), dtype)
    assert len(adapter.modules) == SMALL_SHAPE.num_linears
    for module in adapter.modules:
        path = PREFIX + module_path(module.info.layer, module.info.target)
        a_RI = tensors[f"{path}.lora_A.weight"].to(stored).to(dtype)
        b_OR = tensors[f"{path}.lora_B.weight"].to(stored).to(dtype)
        assert module.a_RI.is_contiguous()
        assert module.bt_RO.is_contiguous()
        assert module.a_RI.dtype == module.bt_RO.dtype == dtype
        assert torch.equal(module.a_RI, a_RI)
        assert torch.equal(module.bt_RO, b_OR.t())


def test_a_file_may_mix_dtypes(tmp_path):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=3)
    tensors = random_tensors(SMALL_SHAPE, dict.fromkeys(TARGETS, 3), range(2))
    dtypes = {"lora_A": torch.bfloat16, "lora_B": torch.float32}
    _replace_tensors(tmp_path, {n: t.to(dtypes[n.split(".")[-2]]) for n, t in tensors.items()})
    adapter = read_small(read_adapter_info(tmp_path, "a", SMALL_SHAPE), torch.float32)
    for module in adapter.modules:
        path = PREFIX + module_path(module.info.layer, module.info.target)
        assert torch.equal(module.a_RI, tensors[f"{path}.lora_A.weight"].bfloat16().float())
        assert torch.equal(module.bt_RO, tensors[f"{path}.lora_B.weight"].t())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, value, side, stored):
    name = f"{PREFIX}model.layers.1.mlp.gate_proj.{side}.weight"
    info = _adapter_with_value(tmp_path, name, value, stored)
    with pytest.raises(AdapterError, match=rf"'a'.*{re.escape(name)}.*NaN or infinite"):
        read_small(info, torch.float32)


def test_a_weight_too_large_for_the_base_dtype_is_refused_by_name(tmp_path):
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"
    info = _adapter_with_value(tmp_path, name, 70000.0, torch.float32)
    with pytest.raises(AdapterError, match=rf"{re.escape(name)}.*70000.*float16.*65504"):
        read_small(info, torch.float16)
    assert read_small(info, torch.bfloat16).modules[0].bt_RO.max() > 65504


def _adapter_with_value(path: Path, name: str, value: float, dtype: torch.dtype):
    save_random_adapter(path, SMALL_SHAPE, rank=3)
    tensors = random_tensors(SMALL_SHAPE, dict.fromkeys(TARGETS, 3), range(2))
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    tensors[name][-1, -1] = value
    _replace_tensors(path, tensors)
    return read_adapter_info(path, "a", SMALL_SHAPE)


def _replace_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_adapter(path, json.loads((path / "adapter_config.json").read_text()), tensors)


def test_digest_changes_with_config_tensors_and_time_and_only_then(tmp_path):
    def digest() -> str:
        return read_adapter_info(tmp_path, "a", SMALL_SHAPE).digest

    save_random_adapter(tmp_path, SMALL_SHAPE, rank=3)
    digests = [digest()]
    assert digest() == digests[0]
    assert len(digests[0]) >= 16
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace("16", "17"))
    digests.append(digest())
    os.utime(tmp_path / WEIGHTS_FILE, ns=(1, 1))
    digests.append(digest())
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=4)
    digests.append(digest())
    assert len(set(digests)) == 4


@pytest.mark.parametrize("change", ["config", "weights", "time", "gone"])
def test_files_changed_since_the_scan_are_not_read(tmp_path, change):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=3)
    info = read_adapter_info(tmp_path, "a", SMALL_SHAPE)
    read_small(info, torch.float32)
    config, weights = tmp_path / "adapter_config.json", tmp_path / WEIGHTS_FILE
    if change == "config":
        config.write_text(config.read_text().replace("16", "32"))
    elif change == "weights":
        save_random_adapter(tmp_path, SMALL_SHAPE, rank=3, targets=["q_proj"])
    elif change == "time":
        os.utime(weights, ns=(1, 1))
    else:
        weights.unlink()
    with pytest.raises(AdapterError, match=r"'a'.*(changed|missing)"):
        read_small(info, torch.float32)


@pytest.mark.parametrize(("change", "says"), [("touch", "changed"), ("cut", "cut short while")])
def test_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch, change, says):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=3)
    info = read_adapter_info(tmp_path, "a", SMALL_SHAPE)

    read_tensor = PeftDirectory.read

    def change_then_read(source, name):
        if change == "touch":
            os.utime(tmp_path / WEIGHTS_FILE, ns=(1, 1))
        else:
            os.truncate(tmp_path / WEIGHTS_FILE, info.num_bytes - 1)
        return read_tensor(source, name)

    monkeypatch.setattr(PeftDirectory, "read", change_then_read)
    with pytest.raises(AdapterError, match=f"'a'.*{says}"):
        read_small(info, torch.float32)


def test_weights_survive_overwriting_the_file(tmp_path):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=3)
    info = read_adapter_info(tmp_path, "a", SMALL_SHAPE)
    adapter = read_small(info, torch.float32)
    before = [module.a_RI.clone() for module in adapter.modules]
    with (tmp_path / WEIGHTS_FILE).open("r+b") as file:
        file.write(bytes(info.num_bytes))
    assert all(
        torch.equal(module.a_RI, a) for module, a in zip(adapter.modules, before, strict=True)
    )


def test_header_agrees_with_the_safetensors_library(tmp_path):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=3, dtype=torch.bfloat16)
    with (tmp_path / WEIGHTS_FILE).open("rb") as file:
        _, entries = read_header(file)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as theirs:
        assert set(entries) == set(theirs.keys())
        for name, entry in entries.items():
            assert list(entry.shape) == theirs.get_slice(name).get_shape()
            assert entry.dtype == theirs.get_slice(name).get_dtype()
