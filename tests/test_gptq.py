"""GPTQ checkpoints: our weights are the formula's, bit for bit, and what has no exact meaning is
refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_factory import CONFIG_FILE, WEIGHTS_FILE, save_random_adapter, write_adapter
from engine_factory import make_engine, mixed_requests, run_tokens
from loraswarm.commands.adapters import CheckOptions, check
from loraswarm.errors import ConfigError
from loraswarm.kernels import reference
from loraswarm.models.decoder import Decoder
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.quantization import quantization_of, without_quantization
from loraswarm.models.quantized.loading import load_quantized_decoder
from loraswarm.models.source import read_config
from quantized_checkpoints import Layout, change_quantization, save_quantized
from tolerance import assert_close

# name -> (layout, overrides of the model)
LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "4 bits, first format": (Layout(), {}),
    "4 bits, second format": (Layout(checkpoint_format="gptq_v2"), {}),
    "4 bits, symmetric": (Layout(sym=True, stored_zero=7), {}),
    "4 bits, symmetric, zeros as they are": (Layout(sym=True, stored_zero=8), {}),
    "4 bits, ordered by activation": (Layout(order="shared"), {}),
    "4 bits, one group, tied": (Layout(group_size=-1), {"variant": "qwen2-tied"}),
    "4 bits, biases of zeros": (Layout(has_zero_biases=True), {}),
    "8 bits": (Layout(bits=8), {}),
    "8 bits, symmetric, one group": (Layout(bits=8, sym=True, stored_zero=127, group_size=-1), {}),
    "8 bits, ordered by activation": (Layout(bits=8, order="shared"), {}),
}


def load(path: Path, dtype: torch.dtype) -> Decoder:
    config = read_config(path)
    quantization = quantization_of(config, None)
    assert quantization is not None
    backend = Backend(reference, dtype, torch.device("cpu"))
    sizes = decoder_config(without_quantization(config))
    return load_quantized_decoder(path, sizes, backend, quantization)


def weights_of(decoder: Decoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in decoder.weights()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_those_of_the_formula_bit_for_bit(name: str, tmp_path: Path) -> None:
    layout, overrides = LAYOUTS[name]
    save_quantized(tmp_path, layout, **overrides)
    expected = load_file(tmp_path / "floats" / "model.safetensors")
    weights = weights_of(load(tmp_path / "model", torch.float32))
    assert weights.keys() == expected.keys()
    for tensor, values in weights.items():
        assert torch.equal(values, expected[tensor]), tensor


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("num_rows", "dtype"),
    [(1, torch.bfloat16), (7, torch.bfloat16), (133, torch.bfloat16), (7, torch.float16)],
)
def test_rounded_products_are_those_of_the_exact_weights(
    name: str, num_rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    layout, overrides = LAYOUTS[name]
    save_quantized(tmp_path, layout, **overrides)
    exact = load(tmp_path / "model", torch.float32)
    decoder = load(tmp_path / "model", dtype)
    generator = torch.Generator().manual_seed(num_rows)
    for linear, exactly in zip(decoder.layers[1].linears(), exact.layers[1].linears(), strict=True):
        w_OI = exactly.weight.rows
        x_TI = torch.randn(num_rows, w_OI.shape[1], generator=generator).to(dtype)
        expected_TO = x_TI.float() @ w_OI.T
        has_kernel = linear.weight.max_kernel_rows > 0
        for limit in (0, 1000 if has_kernel else 0):
            linear.weight.max_kernel_rows = limit
            assert_close(linear.weight.multiply(x_TI), expected_TO, dtype)


@pytest.mark.parametrize("name", ["4 bits, ordered by activation", "8 bits"])
def test_the_engine_generates_what_it_does_from_floats(name: str, tmp_path: Path) -> None:
    layout, overrides = LAYOUTS[name]
    save_quantized(tmp_path, layout, **overrides)
    options: dict[str, Any] = {"adapters": (), "dtype": "float32", "num_threads": 1}
    requests = mixed_requests([None] * 3)
    quantized = make_engine(tmp_path, **options)
    tokens = run_tokens(quantized, requests)
    floats = make_engine(tmp_path, **(options | {"model": str(tmp_path / "floats")}))
    assert tokens == run_tokens(floats, requests)
    assert quantized.info.weight_bytes < floats.info.weight_bytes


def test_adapters_are_checked_against_a_checkpoint_of_integers_as_they_are_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DoRA needs the base's rows; what the integers mean is known to the check, too."""
    save_quantized(tmp_path, LAYOUTS["8 bits"][0], **LAYOUTS["8 bits"][1])
    shape = decoder_config(read_config(tmp_path / "floats")).shape()
    adapter = tmp_path / "adapters" / "dora"
    save_random_adapter(adapter, shape, targets=["q_proj"])
    tensors = load_file(adapter / WEIGHTS_FILE)
    for name in [name for name in tensors if "lora_B" in name]:
        magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[magnitude] = torch.ones(len(tensors[name]))
    config = json.loads((adapter / CONFIG_FILE).read_text())
    write_adapter(adapter, config | {"use_dora": True}, tensors)
    assert check([str(adapter)], CheckOptions(model=str(tmp_path / "model")), is_json=True) == 0
    assert json.loads(capsys.readouterr().out)[0]["verdict"] == "ok"
    change_quantization(tmp_path, quant_method="aqlm")
    with pytest.raises(ConfigError, match="quant_method of 'gptq' or 'awq'"):
        check([str(adapter)], CheckOptions(model=str(tmp_path / "model")), is_json=True)


REFUSED_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"bits": 3}, "bits is 3"),
    ({"bits": True}, "bits is True"),
    ({"group_size": 20}, "group_size is 20"),
    ({"group_size": 0}, "group_size is 0"),
    ({"group_size": None}, "group_size is null"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    ({"is_marlin_format": True}, "is_marlin_format is True"),
    ({"lm_head": True}, "lm_head is True"),
    ({"dynamic": {"-:q_proj": {}}}, "dynamic is"),
    ({"modules_in_block_to_quantize": [["q_proj"]]}, "modules_in_block_to_quantize is"),
    ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
    ({"rotation": "hadamard"}, "rotation is 'hadamard'"),
    ({"quant_method": "bitsandbytes"}, "quant_method of 'gptq' or 'awq'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_KEYS)
def test_keys_that_change_the_meaning_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"quantization_config": Layout().config() | changes}
    with pytest.raises(ConfigError) as refusal:
        quantization_of(config, None)
    assert message in str(refusal.value)


REFUSED_LAYOUTS: list[tuple[Layout, str]] = [
    (Layout(stored_zero=15), r"model\.layers\.0\.self_attn\.q_proj: qzeros hold 15"),
    (Layout(sym=True, stored_zero=5), "qzeros are not all 7 or all 8"),
    (Layout(order="own"), r"g_idx of .*k_proj orders columns otherwise than that of .*q_proj"),
    (Layout(group_size=64), r"down_proj has 96 inputs; they must divide into groups of 64"),
]


@pytest.mark.parametrize(("layout", "message"), REFUSED_LAYOUTS)
def test_integers_without_one_exact_meaning_are_refused(
    layout: Layout, message: str, tmp_path: Path
) -> None:
    save_quantized(tmp_path, layout)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "model", torch.float32)


def test_the_second_format_may_hold_the_largest_zero(tmp_path: Path) -> None:
    save_quantized(tmp_path, Layout(checkpoint_format="gptq_v2", stored_zero=15))
    expected = load_file(tmp_path / "floats" / "model.safetensors")
    weights = weights_of(load(tmp_path / "model", torch.float32))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


Q_PROJ = "model.layers.1.self_attn.q_proj"
REFUSED_TENSORS = [
    ("qweight", None, f"lacks tensor '{Q_PROJ}.qweight'"),
    ("qweight", torch.zeros(8, 65, dtype=torch.int32), r"has shape \[8, 65\]"),
    ("qzeros", torch.zeros(2, 8), r"is F32; it must be I32"),
    ("scales", torch.full((2, 64), float("inf")), "scales' has values that are not finite"),
    ("g_idx", torch.zeros(64, dtype=torch.int32), "every group the same number of inputs"),
    ("g_idx", torch.arange(64, dtype=torch.int32) // 32 - 1, "the same number of inputs"),
    ("bias", torch.ones(64), f"holds tensor '{Q_PROJ}.bias'"),
]


@pytest.mark.parametrize(("part", "tensor", "message"), REFUSED_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(
    part: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    save_quantized(tmp_path, Layout())
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(f"{Q_PROJ}.{part}", None)
    if tensor is not None:
        tensors[f"{Q_PROJ}.{part}"] = tensor
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "model", torch.float32)


def test_the_option_is_refused_for_a_checkpoint_of_integers(tmp_path: Path) -> None:
    save_quantized(tmp_path, Layout())
    with pytest.raises(ConfigError, match="it must be absent with --quantize int8"):
        make_engine(tmp_path, adapters=(), quantize="int8")


def test_a_format_named_otherwise_changes_the_weights(tmp_path: Path) -> None:
    save_quantized(tmp_path, Layout())
    change_quantization(tmp_path, checkpoint_format="gptq_v2")
    expected = load_file(tmp_path / "floats" / "model.safetensors")
    weights = weights_of(load(tmp_path / "model", torch.float32))
    assert not torch.equal(weights[f"{Q_PROJ}.weight"], expected[f"{Q_PROJ}.weight"])
