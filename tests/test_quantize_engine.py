"""A quantized base serves as the same base with its weights replaced by the dequantized ones does,
adapters included, in fewer bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_factory import make_peft_adapter
from engine_factory import make_engine, mixed_requests, run_tokens, save_swarm
from loraswarm.config import Quantize
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD
from loraswarm.errors import ConfigError
from loraswarm.kernels import reference
from loraswarm.models.checkpoint_base import ConvertedBase
from loraswarm.models.decoder import Decoder
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.quantization import quantization_of
from loraswarm.models.quantized.base import open_base
from loraswarm.models.quantized.loading import load_quantized_decoder
from loraswarm.models.source import read_config
from model_factory import load_ours, load_reference, save_tiny_model
from quantized_checkpoints import Layout, save_quantized

METHODS: tuple[Quantize, ...] = ("int8", "int4")
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "head_dim": 16,
}
VARIANTS = ("llama-biased", "qwen2-tied")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def load(path: Path, method: Quantize, dtype: torch.dtype = torch.float32) -> Decoder:
    config = read_config(path)
    quantization = quantization_of(config, method)
    assert quantization is not None
    backend = Backend(reference, dtype, torch.device("cpu"))
    return load_quantized_decoder(path, decoder_config(config), backend, quantization)


def save_dequantized(path: Path, target: Path, method: Quantize) -> None:
    """The checkpoint in `path`/model with the weights that are multiplied by, untied, and links to
    the adapters, in `target`."""
    decoder = load(path / "model", method)
    shutil.copytree(path / "model", target / "model")
    (target / "adapters").symlink_to(path / "adapters")
    tensors = {name: tensor.clone() for name, tensor in decoder.weights()}
    tensors[f"{LM_HEAD}.weight"] = decoder.lm_head.rows
    save_file(tensors, target / "model" / "model.safetensors")
    config = read_config(path / "model") | {"tie_word_embeddings": False}
    (target / "model" / "config.json").write_text(json.dumps(config))


def save_dora(path: Path) -> None:
    """`path`/adapters/dora, for the base in floats."""
    model = load_reference(path / "model", torch.float32)
    targets = ["q_proj", "down_proj"]
    config = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": targets}
    make_peft_adapter(model, path / "adapters" / "dora", config)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_act_as_on_the_dequantized_base(
    method: Quantize, variant: str, tmp_path: Path
) -> None:
    save_swarm(tmp_path, 2, ranks=(4, 17), variant=variant, **SIZES)
    save_dora(tmp_path)
    save_dequantized(tmp_path, tmp_path / "dequantized", method)
    requests = mixed_requests([None, "a000", "dora", "a001"])
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1}
    tokens = run_tokens(make_engine(tmp_path, quantize=method, **options), requests)
    assert tokens == run_tokens(make_engine(tmp_path / "dequantized", **options), requests)
    assert len({tuple(found) for found in tokens.values()}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_readers_of_adapters_see_the_decoders_bits(
    method: Quantize, variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = save_tiny_model(tmp_path, variant, **SIZES)
    decoder = load(path, method, dtype)
    shape = decoder.config.shape()
    base = open_base(path, shape, dtype, method)
    floats = ConvertedBase(path, shape, dtype)
    try:
        for site in range(shape.num_sites()):
            module = shape.site_path(site)
            rows_OI = base.weight(module)
            assert torch.equal(rows_OI, decoder.weight(module)), module
            assert torch.equal(rows_OI, floats.weight(module)) == (module == EMBEDDING), module
    finally:
        base.close()
        floats.close()


def test_readers_of_adapters_see_stored_integers(tmp_path: Path) -> None:
    save_quantized(tmp_path, Layout(order="shared"))
    expected = load_file(tmp_path / "floats" / "model.safetensors")
    shape = decoder_config(read_config(tmp_path / "floats")).shape()
    base = open_base(tmp_path / "model", shape, torch.float32, None)
    for site in range(shape.num_sites()):
        module = shape.site_path(site)
        assert torch.equal(base.weight(module), expected[f"{module}.weight"]), module
    assert base.bias(Q_PROJ) is None
    base.close()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("method", "share"), [("int8", 0.53), ("int4", 0.36)])
def test_the_bytes_shrink(method: Quantize, share: float, variant: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    sizes["head_dim"] = 64
    path = save_tiny_model(tmp_path, variant, **sizes)
    floats = load_ours(path, torch.bfloat16, reference)
    quantized = load(path, method, torch.bfloat16)
    embedding_bytes = quantized.embedding_VD.nbytes
    kept = quantized.num_bytes() - embedding_bytes - quantized.rope.table_LE.nbytes
    assert kept < share * (floats.num_bytes() - embedding_bytes - floats.rope.table_LE.nbytes)
    linears = sum(weight.nbytes for weight in quantized.matrices())  # type: ignore[attr-defined]
    assert kept > linears


def test_the_lm_head_has_8_bits_and_the_embedding_its_own(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "qwen2-tied", **SIZES)
    floats = load_ours(path, torch.float32, reference)
    for method in METHODS:
        decoder = load(path, method)
        assert torch.equal(decoder.embedding_VD, floats.embedding_VD)
        assert torch.equal(decoder.weight(EMBEDDING), floats.embedding_VD)
        rows_VD = decoder.weight(LM_HEAD)
        assert not torch.equal(rows_VD, floats.embedding_VD)
        largest_V = floats.embedding_VD.abs().amax(1)
        assert bool(((rows_VD - floats.embedding_VD).abs().amax(1) < largest_V / 200).all())


def test_where_no_kernel_serves_the_report_says_so(tmp_path: Path) -> None:
    save_swarm(tmp_path, 0, **SIZES)
    lines: list[str] = []
    options: dict[str, Any] = {"adapters": (), "quantize": "int8", "num_threads": 1}
    make_engine(tmp_path, lines.append, dtype="float32", **options)
    assert any("kernel=none" in line for line in lines)
    lines.clear()
    make_engine(tmp_path, lines.append, dtype="bfloat16", **options)
    assert any("max_kernel_rows[int8]=" in line for line in lines)
    assert not any("kernel=none" in line for line in lines)


def test_a_width_without_groups_is_refused_by_name(tmp_path: Path) -> None:
    save_swarm(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj has 48 inputs"):
        make_engine(tmp_path, adapters=(), quantize="int4")


def test_images_of_the_base_in_floats_are_not_taken_for_the_quantized(tmp_path: Path) -> None:
    save_swarm(tmp_path, 0, **SIZES)
    save_dora(tmp_path)
    cached: dict[str, Any] = {
        "dtype": "float32",
        "num_threads": 1,
        "host_cache_dir": str(tmp_path / "cache"),
    }
    requests = mixed_requests(["dora"])
    run_tokens(make_engine(tmp_path, **cached), requests)
    engine = make_engine(tmp_path, quantize="int4", **cached)
    run_tokens(engine, requests)
    fresh = make_engine(
        tmp_path, quantize="int4", **(cached | {"host_cache_dir": str(tmp_path / "other")})
    )
    run_tokens(fresh, requests)
    images = [sorted((tmp_path / name).rglob("*.image")) for name in ("cache", "other")]
    assert [file.read_bytes() for file in images[0]] == [file.read_bytes() for file in images[1]]
    assert images[0]
