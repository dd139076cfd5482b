"""AWQ checkpoints: our weights are the formula's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine_factory import make_engine, mixed_requests, run_tokens
from loraswarm.errors import ConfigError
from loraswarm.kernels import reference
from loraswarm.models.awq import unpack_weight
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.quantization import quantization_of, without_quantization
from loraswarm.models.quantized.loading import load_quantized_decoder
from loraswarm.models.source import read_config
from quantized_checkpoints import Layout, save_quantized

AWQ = Layout(method="awq")


def test_outputs_come_from_their_places_in_the_word() -> None:
    word = sum(output << (4 * place) for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    ints_OI = unpack_weight(torch.tensor([[word]]).to(torch.int32))
    assert ints_OI.flatten().tolist() == list(range(8))


@pytest.mark.parametrize("layout", [AWQ, Layout(method="awq", group_size=-1)])
def test_weights_are_those_of_the_formula_bit_for_bit(layout: Layout, tmp_path: Path) -> None:
    save_quantized(tmp_path, layout)
    config = read_config(tmp_path / "model")
    quantization = quantization_of(config, None)
    assert quantization is not None
    decoder = load_quantized_decoder(
        tmp_path / "model",
        decoder_config(without_quantization(config)),
        Backend(reference, torch.float32, torch.device("cpu")),
        quantization,
    )
    expected = load_file(tmp_path / "floats" / "model.safetensors")
    weights = dict(decoder.weights())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_engine_generates_what_it_does_from_floats(tmp_path: Path) -> None:
    save_quantized(tmp_path, AWQ)
    options: dict[str, Any] = {"adapters": (), "dtype": "float32", "num_threads": 1}
    requests = mixed_requests([None] * 3)
    tokens = run_tokens(make_engine(tmp_path, **options), requests)
    floats = make_engine(tmp_path, **(options | {"model": str(tmp_path / "floats")}))
    assert tokens == run_tokens(floats, requests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits is 8"),
        ({"version": "gemv"}, "version is 'gemv'"),
        ({"version": 1}, "version is 1"),
        ({"zero_point": False}, "zero_point is False"),
        ({"modules_to_not_convert": ["o_proj"]}, "modules_to_not_convert is"),
        ({"sym": True}, "sym is True"),
    ],
)
def test_keys_that_change_the_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        quantization_of({"quantization_config": AWQ.config() | changes}, None)
    assert message in str(refusal.value)
