"""What cannot be applied exactly is refused; the message names the key, tensor or file at fault."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_factory import (
    CONFIG_FILE,
    SMALL_SHAPE,
    WEIGHTS_FILE,
    random_tensors,
    save_random_adapter,
)
from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.adapters.config_keys import BOOKKEEPING_KEYS
from loraswarm.adapters.methods.lora_config import INERT_KEYS, READ_KEYS, REFUSED_KEYS
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError

PREFIX = "base_model.model.model.layers"
Q_A = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
Q_B = f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"
UP_A = f"{PREFIX}.1.mlp.up_proj.lora_A.weight"
UP_B = f"{PREFIX}.1.mlp.up_proj.lora_B.weight"

# key, value, what the message must say besides
REFUSED_VALUES: list[tuple[str, Any, str]] = [
    ("peft_type", "NO_METHOD", "'NO_METHOD'"),
    ("peft_type", "lora", "'lora'"),
    ("peft_type", None, "None"),
    ("use_dora", "yes", "true or false"),
    ("bias", "some", "lora_only"),
    ("bias", None, "lora_only"),
    ("bias", ["all"], "lora_only"),
    ("lora_bias", 1, "true or false"),
    ("modules_to_save", "norm", "list"),
    ("modules_to_save", [7], "list"),
    ("modules_to_save", ["("], "regular expression"),
    ("modules_to_save", ["norm"] * 1001, "at most 1000"),
    ("modules_to_save", ["q_proj"], "'model.layers.0.self_attn.q_proj'"),
    ("modules_to_save", ["layers.1.mlp"], "'model.layers.1.mlp'"),
    ("modules_to_save", ["model"], "norms, embed_tokens and lm_head"),
    ("modules_to_save", [""], "the whole model"),
    ("trainable_token_indices", 3, "list of token ids"),
    ("trainable_token_indices", [-1], "list of token ids"),
    ("trainable_token_indices", {"embed_tokens": []}, "list of token ids"),
    ("trainable_token_indices", {"q_proj": [3]}, "q_proj"),
    ("trainable_token_indices", {"wte": [3]}, "no module"),
    ("alora_invocation_tokens", "5", "list of token ids"),
    ("alora_invocation_tokens", [1.5], "list of token ids"),
    ("alora_invocation_tokens", [5, 133], "133"),
    ("layer_replication", [[0, 1], [0, 1]], "depth"),
    ("target_parameters", ["experts.down_proj"], "experts.down_proj"),
    ("use_qalora", 1, "true or false"),
    ("use_bdlora", {}, "block-diagonal"),
    ("use_bdlora", True, "object"),
    ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}, "match_strict"),
    ("use_bdlora", {"target_modules_bd_a": ["_proj"], "target_modules_bd_b": ["q"]}, "A and B"),
    ("use_bdlora", {"target_modules_bd_a": ["_proj"], "nblocks": 2}, "nblocks"),
    ("use_bdlora", {"target_modules_bd_a": ["_proj"], "brand_new": 2}, "use_bdlora.brand_new"),
    ("arrow_config", {"top_k": 3}, "top_k"),
    ("kasa_config", {"beta": 1e-4}, "KaSA"),
    ("velora_config", True, "object"),
    ("velora_config", {"brand_new": 1}, "velora_config.brand_new"),
    ("monteclora_config", {"brand_new": 1}, "monteclora_config.brand_new"),
    ("velora_config", {"num_groups": 0}, "velora_config.num_groups"),
    ("monteclora_config", {"num_samples": "8"}, "monteclora_config.num_samples"),
    ("megatron_config", {"x": 1}, "Megatron"),
    ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "loftq", "quantised"),
    ("init_lora_weights", "something", "gaussian"),
    ("init_lora_weights", 1, "gaussian"),
    ("use_rslora", "yes", "true or false"),
    ("r", 0, "from 1"),
    ("r", -1, "from 1"),
    ("r", True, "from 1"),
    ("r", 8.0, "from 1"),
    ("r", 10**40, "from 1"),
    ("r", None, "from 1"),
    ("lora_alpha", "16", "number"),
    ("lora_alpha", True, "number"),
    ("lora_alpha", float("nan"), "number"),
    ("lora_alpha", float("inf"), "number"),
    ("lora_alpha", 10**400, "number"),
    ("rank_pattern", [4], "map"),
    ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] is 0"),
    ("rank_pattern", {"q_proj(": 4}, "regular expression"),
    ("alpha_pattern", {"q_proj": None}, "alpha_pattern['q_proj'] is None"),
    ("alpha_pattern", {"*": 4}, "regular expression"),
    ("target_modules", None, "name the adapted modules"),
    ("target_modules", [], "name the adapted modules"),
    ("target_modules", 7, "list"),
    ("target_modules", ["q_proj", 7], "list"),
    ("target_modules", "(", "regular expression"),
    ("target_modules", ["c_attn"], "no linear of the base"),
    ("exclude_modules", "[", "regular expression"),
    ("exclude_modules", {"a": 1}, "list"),
    ("layers_to_transform", "0", "layer index"),
    ("layers_to_transform", [0, 1.5], "layer index"),
    ("layers_to_transform", [True], "layer index"),
    ("layers_pattern", "layers", "layers_to_transform"),
    ("brand_new_key", True, "True"),
    ("brand_new_key", 0, "unknown"),
    ("brand_new_key", "on", "unknown"),
    ("brand_new_key", {"a": None}, "unknown"),
]


@pytest.fixture
def adapter_path(tmp_path) -> Path:
    """A good adapter of rank 3 for every linear of SMALL_SHAPE."""
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=3)
    assert len(read(tmp_path).modules) == SMALL_SHAPE.num_linears
    return tmp_path


def read(path: Path, shape: BaseShape = SMALL_SHAPE) -> AdapterInfo:
    return read_adapter_info(path, "a", shape)


def refusal(path: Path, shape: BaseShape = SMALL_SHAPE) -> str:
    """The message, which must be one line and name the adapter."""
    with pytest.raises(AdapterError) as caught:
        read(path, shape)
    message = str(caught.value)
    assert message.startswith("adapter 'a': ")
    assert "\n" not in message
    assert len(message) < 600
    return message


def change_config(path: Path, **keys: Any) -> None:
    config = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps(config | keys))


def change_tensors(path: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """Put tensors into the file, or take out those that are None."""
    changed = load_file(path / WEIGHTS_FILE) | tensors
    save_file({k: v for k, v in changed.items() if v is not None}, path / WEIGHTS_FILE)


@pytest.mark.parametrize(("key", "value", "also"), REFUSED_VALUES)
def test_a_config_value_we_cannot_honour_is_refused_by_name(adapter_path, key, value, also):
    change_config(adapter_path, **{key: value})
    message = refusal(adapter_path)
    assert key in message
    assert also in message


@pytest.mark.parametrize("key", [*sorted(REFUSED_KEYS), "brand_new_key"])
@pytest.mark.parametrize("value", [None, False, []])
def test_an_unsupported_or_unknown_key_that_is_off_is_ignored(adapter_path, key, value):
    expected = read(adapter_path).modules
    change_config(adapter_path, **{key: value})
    assert read(adapter_path).modules == expected


@pytest.mark.parametrize("key", sorted(INERT_KEYS))
def test_keys_without_effect_are_ignored_whatever_they_say(adapter_path, key):
    expected = read(adapter_path).modules
    change_config(adapter_path, **{key: {"anything": 1}})
    assert read(adapter_path).modules == expected


def test_every_key_that_peft_saves_is_known():
    from peft import LoraConfig

    assert (
        set(LoraConfig().to_dict())
        <= READ_KEYS | INERT_KEYS | REFUSED_KEYS.keys() | BOOKKEEPING_KEYS
    )


def test_layers_cannot_restrict_a_regular_expression(adapter_path):
    change_config(adapter_path, target_modules=".*proj", layers_to_transform=[0])
    assert "layers_to_transform is [0]" in refusal(adapter_path)


def test_a_missing_method_is_refused(adapter_path):
    (adapter_path / CONFIG_FILE).write_text('{"r": 3}')
    assert "peft_type" in refusal(adapter_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_a_config_that_is_no_json_object_is_refused(adapter_path, text):
    (adapter_path / CONFIG_FILE).write_bytes(text)
    assert CONFIG_FILE in refusal(adapter_path)


def test_rank_that_disagrees_with_r_is_refused_naming_both(adapter_path):
    change_config(adapter_path, r=4)
    message = refusal(adapter_path)
    assert f"{Q_A!r} has rank 3" in message
    assert f"but r in {CONFIG_FILE} is 4" in message


def test_rank_that_disagrees_with_a_pattern_is_refused_naming_both(adapter_path):
    change_config(adapter_path, rank_pattern={"layers.1.mlp.up_proj": 5})
    message = refusal(adapter_path)
    assert f"{UP_A!r} has rank 3" in message
    assert "rank_pattern['layers.1.mlp.up_proj']" in message
    assert "is 5" in message


def test_ranks_of_a_and_b_that_differ_are_refused(adapter_path):
    change_tensors(adapter_path, {UP_B: torch.zeros(33, 2)})
    assert f"{UP_B!r} has rank 2" in refusal(adapter_path)


def test_rank_zero_is_refused(adapter_path):
    change_tensors(adapter_path, {UP_A: torch.zeros(0, 21), UP_B: torch.zeros(33, 0)})
    assert f"{UP_A!r} has rank 0" in refusal(adapter_path)


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        (UP_A, (3, 22), "[rank, 21]"),
        (UP_B, (32, 3), "[33, rank]"),
        (UP_A, (21, 3), "[rank, 21]"),
        (UP_A, (63,), "[rank, 21]"),
        (UP_B, (33, 3, 1), "[33, rank]"),
    ],
)
def test_a_shape_that_is_not_the_bases_is_refused(adapter_path, name, found, expected):
    change_tensors(adapter_path, {name: torch.zeros(found)})
    message = refusal(adapter_path)
    assert f"{name!r} has shape {list(found)}" in message
    assert expected in message


def test_an_adapter_of_a_wider_base_is_refused(adapter_path):
    sizes = tuple((out_size, in_size) for in_size, out_size in SMALL_SHAPE.target_sizes)
    message = refusal(adapter_path, BaseShape(2, 1, 7, 133, sizes))
    assert "needs" in message
    assert "another base model" in message


def test_an_adapter_of_a_deeper_base_is_refused(adapter_path):
    shape = BaseShape(1, 1, 7, 133, SMALL_SHAPE.target_sizes)
    message = refusal(adapter_path, shape)
    assert f"{PREFIX}.1." in message
    assert "1 layers" in message


def test_an_adapter_of_a_shallower_base_is_refused(adapter_path):
    shape = BaseShape(3, 1, 7, 133, SMALL_SHAPE.target_sizes)
    message = refusal(adapter_path, shape)
    assert f"{PREFIX}.2.mlp.down_proj.lora_A.weight" in message
    assert "missing" in message


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector",
        f"{PREFIX}.0.self_attn.q_proj.lora_B.bias",
        f"{PREFIX}.0.self_attn.q_proj.lora_A.default.weight",
        f"{PREFIX}.0.self_attn.q_proj.base_layer.bias",
        f"{PREFIX}.0.self_attn.rotary.lora_A.weight",
        f"{PREFIX}.7.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}.{'7' * 5000}.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}.00.self_attn.q_proj.lora_A.weight",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.norm.weight",
        f"{PREFIX}.0.self_attn.q_proj.lora_diag",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "x" * 10_000,
    ],
)
def test_a_tensor_that_would_not_be_applied_is_refused(adapter_path, name):
    change_tensors(adapter_path, {name: torch.zeros(3, 21)})
    message = refusal(adapter_path)
    assert name[:200] in message
    assert "would not be applied" in message


def test_a_tensor_of_a_module_that_is_not_selected_is_refused(adapter_path):
    change_config(adapter_path, exclude_modules=["layers.1.mlp.up_proj"])
    message = refusal(adapter_path)
    assert UP_A in message
    assert "would not be applied" in message


@pytest.mark.parametrize("lost", [UP_A, UP_B])
def test_half_a_pair_is_refused(adapter_path, lost):
    change_tensors(adapter_path, {lost: None})
    message = refusal(adapter_path)
    assert f"{lost!r}, which the config calls for, is missing" in message


def test_a_selected_module_without_tensors_is_refused(adapter_path):
    change_tensors(adapter_path, {UP_A: None, UP_B: None})
    message = refusal(adapter_path)
    assert UP_A in message
    assert "missing" in message


def test_a_file_without_tensors_is_refused(adapter_path):
    save_file({}, adapter_path / WEIGHTS_FILE)
    assert "model.layers.0.mlp.down_proj.lora_A" in refusal(adapter_path)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8, torch.float8_e4m3fn])
def test_a_tensor_of_another_dtype_is_refused(adapter_path, dtype):
    change_tensors(adapter_path, {UP_A: torch.zeros(3, 21).to(dtype)})
    message = refusal(adapter_path)
    assert UP_A in message
    assert "F32, F16, BF16" in message


def test_missing_files_are_refused_by_name(adapter_path):
    (adapter_path / WEIGHTS_FILE).unlink()
    assert f"{WEIGHTS_FILE} is missing" in refusal(adapter_path)
    (adapter_path / "adapter_model.bin").write_bytes(b"pickle")
    assert "adapter_model.bin" in refusal(adapter_path)
    (adapter_path / CONFIG_FILE).unlink()
    assert f"{CONFIG_FILE} is missing" in refusal(adapter_path)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_pipe_or_directory_is_refused_without_waiting(adapter_path, file):
    (adapter_path / file).unlink()
    os.mkfifo(adapter_path / file)
    assert f"{file} is not a regular file" in refusal(adapter_path)
    (adapter_path / file).unlink()
    (adapter_path / file).mkdir()
    assert f"{file} is not a regular file" in refusal(adapter_path)


def test_a_file_cut_short_anywhere_is_refused(adapter_path):
    whole = (adapter_path / WEIGHTS_FILE).read_bytes()
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, header_bytes, header_bytes + 8, len(whole) - 1):
        (adapter_path / WEIGHTS_FILE).write_bytes(whole[:length])
        assert "cut short" in refusal(adapter_path)
    (adapter_path / WEIGHTS_FILE).write_bytes(whole + b"\0")
    assert "too long" in refusal(adapter_path)


def entry(**changes: Any) -> dict[str, Any]:
    """One tensor of 4 bytes as a header has it."""
    return {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} | changes


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "not a JSON object"),
        ({"t": 7}, "'t' lacks"),
        ({"t": {"dtype": "F32"}}, "'t' lacks"),
        ({"t": entry(data_offsets=[0])}, "'t' lacks"),
        ({"t": entry(dtype="F99")}, "'F99'"),
        ({"t": entry(dtype=["F32"])}, "unknown dtype"),
        ({"t": entry(shape=[2, 1])}, "'t' has 4 bytes"),
        ({"t": entry(shape=[-1, -1])}, "whole numbers"),
        ({"t": entry(shape=[True, 1])}, "whole numbers"),
        ({"t": entry(shape=[1.0, 1])}, "whole numbers"),
        ({"t": entry(shape="ab")}, "whole numbers"),
        ({"t": entry(data_offsets=[10**4000, 4])}, "whole numbers"),
        ({"t": entry(data_offsets=[4, 0])}, "'t' has -4 bytes"),
        ({"t": entry(data_offsets=[1, 5])}, "'t' begins"),
        ({"t": entry(data_offsets=[4, 8])}, "'t' begins"),
        ({"t": entry(), "u": entry()}, "'u' begins"),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(adapter_path, header, says):
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(4)
    (adapter_path / WEIGHTS_FILE).write_bytes(data)
    assert says in refusal(adapter_path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff" * 9, b"[" * 100_000])
def test_a_header_that_is_no_json_is_refused(adapter_path, text):
    (adapter_path / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text)
    assert "not valid JSON" in refusal(adapter_path)


def test_damaged_files_are_read_or_refused_and_never_crash(adapter_path):
    chooser = random.Random(0)
    originals = {file: (adapter_path / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
    num_refused = 0
    for _ in range(200):
        file = chooser.choice(list(originals))
        damaged = bytearray(originals[file])
        for _ in range(chooser.randint(1, 3)):
            damaged[chooser.randrange(min(len(damaged), 3000))] = chooser.randrange(256)
        (adapter_path / file).write_bytes(damaged)
        try:
            read(adapter_path)
        except AdapterError:
            num_refused += 1
        (adapter_path / file).write_bytes(originals[file])
    assert num_refused > 100


def test_random_tensors_of_the_factory_are_what_the_plan_expects(adapter_path):
    names = random_tensors(SMALL_SHAPE, {"q_proj": 3}, [0]).keys()
    assert list(names) == [Q_A, Q_B]
