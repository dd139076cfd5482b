"""Loading checkpoints: every tensor in its place, in the dtype asked for, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraswarm.errors import ConfigError
from loraswarm.kernels import reference
from loraswarm.models import loader
from loraswarm.models.checkpoint import INDEX_FILE, SINGLE_FILE, stored_tensors
from loraswarm.models.decoder import Decoder
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.weight import Weight, can_pack
from loraswarm.models.loader import checkpoint_dtype, load_decoder
from loraswarm.models.source import read_config
from model_factory import CPU, VARIANTS, load_ours, load_reference, save_tiny_model
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_packing = pytest.mark.skipif(
    not can_pack(torch.float32, CPU), reason="oneDNN does not pack weights on this machine"
)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the tensors of a single-file checkpoint in place."""
    tensors = load_file(path / SINGLE_FILE)
    change(tensors)
    save_file(tensors, path / SINGLE_FILE)
    return path


def load(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_ours(path, dtype, reference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_the_file_lands_where_its_name_says(variant, tmp_path):
    path = save_tiny_model(tmp_path, variant)
    placed = dict(load(path).weights())
    stored = load_file(path / SINGLE_FILE)
    assert placed.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(placed[name], tensor), name


@pytest.mark.parametrize("source", [*DTYPES, torch.float64])
@pytest.mark.parametrize("target", DTYPES)
def test_any_float_dtype_is_rounded_once_to_the_one_asked_for(source, target, tmp_path):
    path = save_tiny_model(tmp_path, dtype=source)
    stored = load_file(path / SINGLE_FILE)
    for name, tensor in load(path, target).weights():
        assert stored[name].dtype == source
        assert tensor.dtype == target
        assert torch.equal(tensor, stored[name].to(target)), name


def test_shards_load_as_one_file_does(tmp_path):
    whole = dict(load(save_tiny_model(tmp_path / "whole")).weights())
    path = save_tiny_model(tmp_path / "sharded", max_shard_size="30KB")
    assert not (path / SINGLE_FILE).exists()
    assert len(list(path.glob("*.safetensors"))) > 2
    sharded = dict(load(path).weights())
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_parts_of_a_fused_linear_share_one_weight_in_order(tmp_path):
    decoder = load(save_tiny_model(tmp_path, "llama-biased"))
    layer = decoder.layers[1]
    qkv, gate_up = layer.attention.qkv, layer.mlp.gate_up
    assert qkv.out_bounds == (0, 84, 112, 140)
    assert gate_up.out_bounds == (0, 76, 152)
    for linear, num_parts in ((qkv, 3), (gate_up, 2)):
        parts = dict(linear.weights())
        weights = [tensor for name, tensor in parts.items() if name.endswith("weight")]
        biases = [tensor for name, tensor in parts.items() if name.endswith("bias")]
        assert len(weights) == len(biases) == num_parts
        assert torch.equal(torch.cat(weights), linear.weight.rows)
        assert torch.equal(torch.cat(biases), linear.bias_O)


@needs_packing
def test_tied_embeddings_are_one_tensor_until_a_packed_copy_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "can_pack", lambda dtype, device: False)
    tied = load(save_tiny_model(tmp_path / "tied", tie_word_embeddings=True))
    untied = load(save_tiny_model(tmp_path / "untied", tie_word_embeddings=False))
    assert tied.lm_head.rows is tied.embedding_VD
    assert untied.lm_head.rows is not untied.embedding_VD
    assert untied.num_bytes() - tied.num_bytes() == tied.embedding_VD.nbytes
    tied.lm_head.pack_()
    assert torch.equal(tied.lm_head.rows, tied.embedding_VD)
    assert untied.num_bytes() == tied.num_bytes()


def test_num_bytes_is_the_file_and_the_rope_table(tmp_path):
    path = save_tiny_model(tmp_path)
    stored = sum(tensor.nbytes for tensor in load_file(path / SINGLE_FILE).values())
    rope_bytes = 256 * 8 * 4  # positions, head size, float32
    assert load(path).num_bytes() == stored + rope_bytes


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 133])
def test_a_packed_matrix_keeps_its_bits_and_its_products(num_rows, dtype):
    if not can_pack(dtype, CPU):
        pytest.skip(f"oneDNN does not compute {dtype} here")
    generator = torch.Generator().manual_seed(0)
    rows_OI = torch.randn(76, 133, generator=generator).to(dtype)
    bias_O = torch.randn(76, generator=generator).to(dtype)
    x_TI = torch.randn(num_rows, 2 * 133, generator=generator).to(dtype)[:, 133:]
    weight = Weight(rows_OI)
    expected_TO = weight.multiply(x_TI, bias_O)
    weight.pack_()
    assert weight.is_packed
    assert torch.equal(weight.rows, rows_OI)
    assert_close(weight.multiply(x_TI, bias_O), expected_TO, dtype)
    assert_close(weight.multiply(x_TI), expected_TO - bias_O, dtype)


@needs_packing
def test_loading_packs_every_matrix_and_keeps_one_copy(tmp_path):
    decoder = load(save_tiny_model(tmp_path))
    assert len(decoder.matrices()) == 2 * 4 + 1
    assert all(weight.is_packed for weight in decoder.matrices())
    assert all(weight.rows is not weight.rows for weight in decoder.matrices())


def test_only_float_dtypes_on_a_cpu_are_packed():
    assert not can_pack(torch.float32, torch.device("meta"))
    assert not can_pack(torch.float32, torch.device("cuda"))
    assert not can_pack(torch.float64, CPU)


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    path = rewrite(save_tiny_model(tmp_path), lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(ConfigError, match=f"lacks tensor '{Q_PROJ}'$"):
        load(path)


def test_a_missing_lm_head_comes_with_advice(tmp_path):
    path = rewrite(save_tiny_model(tmp_path), lambda tensors: tensors.pop(LM_HEAD))
    with pytest.raises(ConfigError, match=r"lm_head\.weight'; set tie_word_embeddings"):
        load(path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "score.weight"])
def test_an_unexpected_tensor_is_refused_by_name(name, tmp_path):
    path = rewrite(save_tiny_model(tmp_path), lambda t: t.update({name: torch.zeros(48)}))
    with pytest.raises(ConfigError, match=f"holds tensor '{name}'"):
        load(path)


def test_rope_buffers_of_old_checkpoints_are_left_out(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = save_tiny_model(tmp_path)
    before = dict(load(path).weights())
    rewrite(path, lambda tensors: tensors.update({name: torch.zeros(4)}))
    after = dict(load(path).weights())
    assert name in stored_tensors(path)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("shape", [(48, 47), (47, 48), (48,), (48, 48, 1)])
def test_a_tensor_of_another_shape_is_refused(shape, tmp_path):
    path = rewrite(save_tiny_model(tmp_path), lambda t: t.update({Q_PROJ: torch.zeros(shape)}))
    with pytest.raises(ConfigError, match=rf"'{Q_PROJ}' has shape \[.*calls for \[48, 48\]"):
        load(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_a_tensor_that_is_no_plain_float_is_refused(dtype, tmp_path):
    bad = torch.zeros(48, 48).to(dtype)
    path = rewrite(save_tiny_model(tmp_path), lambda tensors: tensors.update({Q_PROJ: bad}))
    with pytest.raises(ConfigError, match=f"'{Q_PROJ}' is .*weights must be one of"):
        load(path)


def test_values_beyond_float16_are_refused_only_for_float16(tmp_path):
    def grow(tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ][3, 7] = 70_000.0

    path = rewrite(save_tiny_model(tmp_path), grow)
    assert dict(load(path, torch.bfloat16).weights())[Q_PROJ][3, 7] > 65_504
    with pytest.raises(ConfigError, match=f"'{Q_PROJ}' has values that float16 cannot hold"):
        load(path, torch.float16)


def test_a_tied_model_may_repeat_its_embeddings_but_not_contradict_them(tmp_path):
    path = save_tiny_model(tmp_path, tie_word_embeddings=True)
    rewrite(path, lambda tensors: tensors.update({LM_HEAD: tensors[EMBEDDING].clone()}))
    decoder = load(path)
    assert torch.equal(decoder.lm_head.rows, decoder.embedding_VD)
    rewrite(path, lambda tensors: tensors[LM_HEAD][132, 47].add_(1.0))
    with pytest.raises(ConfigError, match=f"'{LM_HEAD}' differs from '{EMBEDDING}'"):
        load(path)
    rewrite(path, lambda tensors: tensors.update({LM_HEAD: tensors[EMBEDDING].half()}))
    with pytest.raises(ConfigError, match=f"'{LM_HEAD}' differs"):
        load(path)


def test_a_checkpoint_of_bin_files_is_refused_with_advice(tmp_path):
    path = save_tiny_model(tmp_path)
    (path / SINGLE_FILE).unlink()
    with pytest.raises(ConfigError, match=f"neither {SINGLE_FILE} nor {INDEX_FILE}"):
        load(path)
    (path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"\.bin weights only.*save_pretrained"):
        load(path)


def test_a_truncated_file_is_refused_by_name(tmp_path):
    path = save_tiny_model(tmp_path)
    content = (path / SINGLE_FILE).read_bytes()
    (path / SINGLE_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        load(path)


def sharded(path: Path) -> tuple[Path, dict[str, str]]:
    save_tiny_model(path, max_shard_size="30KB")
    return path, json.loads((path / INDEX_FILE).read_text())["weight_map"]


def test_a_shard_that_the_index_names_but_is_missing_is_refused(tmp_path):
    path, weight_map = sharded(tmp_path)
    (path / weight_map[Q_PROJ]).unlink()
    with pytest.raises(ConfigError, match=f"names {weight_map[Q_PROJ]}, which is not in"):
        load(path)


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path):
    path, weight_map = sharded(tmp_path)
    other = next(file for file in weight_map.values() if file != weight_map[Q_PROJ])
    index = {"weight_map": weight_map | {Q_PROJ: other}}
    (path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"places tensor '{Q_PROJ}' in {other}"):
        load(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    path, weight_map = sharded(tmp_path)
    shutil.copy(path / weight_map[Q_PROJ], path / "model-again.safetensors")
    index = {"weight_map": weight_map | {"extra": "model-again.safetensors"}}
    (path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"is both in .* and "):
        load(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(content, tmp_path):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(ConfigError, match="weight_map"):
        stored_tensors(tmp_path)


def test_away_from_a_terminal_each_file_is_one_line(tmp_path, capsys):
    path, weight_map = sharded(tmp_path)
    lines: list[str] = []
    config = decoder_config(read_config(path))
    capsys.readouterr()
    load_decoder(path, config, Backend(reference, torch.float32, CPU), lines.append)
    assert len(lines) == len(set(weight_map.values()))
    assert all(line.startswith("loaded file=model-") for line in lines)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_dtype_is_the_configs_and_else_the_embeddings(dtype, tmp_path):
    path = save_tiny_model(tmp_path, dtype=dtype)
    config = read_config(path)
    name = str(dtype).removeprefix("torch.")
    assert config["dtype"] == name
    assert checkpoint_dtype(path, config) == dtype
    del config["dtype"]
    assert checkpoint_dtype(path, config) == dtype
    assert checkpoint_dtype(path, {**config, "torch_dtype": "float32"}) == torch.float32


def test_auto_dtype_without_an_answer_is_refused(tmp_path):
    path = save_tiny_model(tmp_path, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"is F64.*--dtype"):
        checkpoint_dtype(path, {})
    rewrite(path, lambda tensors: tensors.pop(EMBEDDING))
    with pytest.raises(ConfigError, match=f"no tensor '{EMBEDDING}'"):
        checkpoint_dtype(path, {})


def test_the_reference_loads_the_same_values(tmp_path):
    path = save_tiny_model(tmp_path, "qwen3-biased")
    theirs = dict(load_reference(path, torch.bfloat16).named_parameters())
    for name, tensor in load(path, torch.bfloat16).weights():
        assert torch.equal(tensor, theirs[name]), name
