"""The decoder equals transformers and, with adapters, PEFT; however a prompt is cut or batched.

Both sides run in the same dtype: transformers with eager attention, PEFT with adapter weights that
the dtype can hold.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_factory import make_peft_adapter
from batch_factory import BatchFactory
from loraswarm.core.base_shape import TARGETS, module_path
from loraswarm.kernels import Kernels, cpu, reference
from loraswarm.kernels.overlay import Overlay, PagedRows
from loraswarm.models import loader
from loraswarm.models.batch import Batch
from loraswarm.models.decoder import Decoder
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.norm import QKNorm, RMSNorm
from loraswarm.models.layers.rope import RopeTable, rope_frequencies
from loraswarm.models.loader import load_decoder
from loraswarm.models.source import read_config
from model_factory import CPU, VARIANTS, VOCAB_SIZE, load_ours, load_reference, save_tiny_model
from tile_factory import SiteWeights, TilePool
from tolerance import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)
PROMPT_TOKENS = 61  # past every window, and past llama3-tied's original length of 32
ALPHA = 10.0


@pytest.fixture(params=[reference, cpu], ids=["reference", "cpu"])
def kernels(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def save(variant: str) -> Path:
        return save_tiny_model(tmp_path_factory.mktemp(variant), variant)

    return save


def prompt(num_tokens: int = PROMPT_TOKENS, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


@torch.inference_mode()
def run(decoder: Decoder, batch: Batch) -> Tensor:
    return decoder.forward(batch)


@torch.inference_mode()
def run_reference(model: Any, token_ids: list[int]) -> Tensor:
    return model(torch.tensor([token_ids])).logits[0]


def run_alone(decoder: Decoder, token_ids: list[int], dtype: torch.dtype) -> Tensor:
    return run(decoder, BatchFactory(decoder.config.shape(), dtype).batch({"a": token_ids}))


def differs(left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether two results are apart by far more than rounding."""
    relative, absolute = TOLERANCE[dtype]
    return not torch.allclose(left, right, rtol=5 * relative, atol=5 * absolute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, dtype, kernels, checkpoint):
    path = checkpoint(variant)
    logits_ZV = run_alone(load_ours(path, dtype, kernels), prompt(), dtype)
    expected_ZV = run_reference(load_reference(path, dtype), prompt())
    assert logits_ZV.shape == (PROMPT_TOKENS, VOCAB_SIZE)
    assert logits_ZV.dtype == torch.float32
    assert logits_ZV.std() > 0.4
    assert_close(logits_ZV, expected_ZV, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_weights_in_row_order_equal_transformers(dtype, checkpoint, monkeypatch):
    monkeypatch.setattr(loader, "can_pack", lambda dtype, device: False)
    path = checkpoint("qwen2-tied")
    logits_ZV = run_alone(load_ours(path, dtype, reference), prompt(), dtype)
    assert_close(logits_ZV, run_reference(load_reference(path, dtype), prompt()), dtype)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("mistral", {"windows": (None, None)}),
        ("mistral", {"windows": (6, 6)}),
        ("qwen2-sliding", {"windows": (7, None)}),
        ("qwen3-biased", {"windows": (None, 3)}),
        ("llama3-tied", {"rope_scaling": None}),
        ("llama", {"rope_theta": 20_000.0}),
        ("qwen3", {"rms_norm_eps": 1e-2}),
    ],
)
def test_each_setting_of_a_config_changes_the_logits(variant, changes, checkpoint):
    path = checkpoint(variant)
    config = dataclasses.replace(decoder_config(read_config(path)), **changes)
    changed = load_decoder(path, config, Backend(reference, torch.float32, CPU))
    right = run_alone(load_ours(path, torch.float32, reference), prompt(), torch.float32)
    assert differs(run_alone(changed, prompt(), torch.float32), right)


@pytest.mark.parametrize("part", ["qkv.bias_O", "o.bias_O", "qk_norm.k_weight_E"])
def test_biases_and_head_norms_change_the_logits(part, checkpoint):
    variant = "qwen3-biased"
    decoder = load_ours(checkpoint(variant), torch.float32, reference)
    right = run_alone(decoder, prompt(), torch.float32)
    owner, name = part.split(".")
    getattr(getattr(decoder.layers[0].attention, owner), name).zero_()
    assert differs(run_alone(decoder, prompt(), torch.float32), right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_round_where_transformers_does(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    generator = torch.Generator().manual_seed(0)
    x_TD = (torch.randn(7, 133, generator=generator) * 3).to(dtype)
    ours, theirs = RMSNorm(Backend(reference, dtype, CPU), "", 133, 1e-5), LlamaRMSNorm(133, 1e-5)
    ours.weight_D.copy_(torch.randn(133, generator=generator))
    theirs.weight.data = ours.weight_D
    assert torch.equal(ours.forward(x_TD, None, {}, x_TD.flatten()), theirs(x_TD))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_tokens_with_a_weight_of_their_own_keep_the_bits_of_that_norm(dtype):
    generator = torch.Generator().manual_seed(0)

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    backend = Backend(reference, dtype, CPU)
    base, other = (QKNorm(backend, "p", 3, 133, 1e-5) for _ in range(2))
    for norm in (base, other):
        norm.q_weight_E.copy_(numbers(133))
        norm.k_weight_E.copy_(numbers(133))
    pool = torch.cat([numbers(7), other.q_weight_E, numbers(1), other.k_weight_E, numbers(3)])
    rows = [PagedRows(torch.tensor([at]), (at,), 1, 1, 133) for at in (7, 141)]
    overlays = {
        "p.q_norm": (Overlay(5, 7, rows[0]), Overlay(1, 2, rows[0])),
        "p.k_norm": (Overlay(0, 3, rows[1]),),
        "other.q_norm": (Overlay(0, 7, rows[1]),),
    }
    qk_TNE = numbers(7, 5, 133)
    actual_TNE = base.forward(qk_TNE, overlays, pool)
    plain_TNE, changed_TNE = (norm.forward(qk_TNE, {}, pool) for norm in (base, other))
    for heads, tokens in ((slice(0, 3), (1, 5, 6)), (slice(3, 5), (0, 1, 2))):
        for token in range(7):
            expected_TNE = changed_TNE if token in tokens else plain_TNE
            assert torch.equal(actual_TNE[token, heads], expected_TNE[token, heads])
    assert differs(plain_TNE, changed_TNE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["llama", "llama3-tied"])
def test_rope_rounds_where_transformers_does(variant, dtype, checkpoint):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    path = checkpoint(variant)
    config = decoder_config(read_config(path))
    theirs = load_reference(path, dtype).model.rotary_emb
    assert torch.equal(rope_frequencies(config), theirs.inv_freq)
    positions_T = torch.tensor([0, 1, 31, 32, 133, 255])
    generator = torch.Generator().manual_seed(0)
    q_THE = torch.randn(6, 3, config.head_size, generator=generator).to(dtype)
    expected_THE, _ = apply_rotary_pos_emb(
        q_THE, q_THE, *(part[0] for part in theirs(q_THE, positions_T[None]))
    )
    RopeTable(Backend(reference, dtype, CPU), config).rotation(positions_T).apply_(q_THE)
    assert torch.equal(q_THE, expected_THE)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7])
@pytest.mark.parametrize("variant", ["mistral", "llama3-tied", "qwen3-biased"])
def test_a_prompt_in_chunks_equals_the_whole(variant, chunk_tokens, kernels, checkpoint):
    decoder = load_ours(checkpoint(variant), torch.float32, kernels)
    whole_ZV = run_alone(decoder, prompt(), torch.float32)
    factory = BatchFactory(decoder.config.shape(), torch.float32)
    chunks = [prompt()[at : at + chunk_tokens] for at in range(0, PROMPT_TOKENS, chunk_tokens)]
    parts = [run(decoder, factory.batch({"a": chunk})) for chunk in chunks]
    assert len(parts) > 1
    assert_close(torch.cat(parts), whole_ZV, torch.float32)


@pytest.mark.parametrize("variant", ["mistral-full", "qwen2-sliding", "qwen3"])
def test_sequences_in_one_batch_equal_each_alone(variant, kernels, checkpoint):
    decoder = load_ours(checkpoint(variant), torch.float32, kernels)
    prompts = {str(length): prompt(length, seed=length) for length in (7, 1, 33, 3, 16)}
    factory = BatchFactory(decoder.config.shape(), torch.float32)
    together = run(decoder, factory.batch(prompts))
    next_together = run(decoder, factory.batch({name: [5] for name in reversed(prompts)}))
    begin = 0
    for row, token_ids in enumerate(prompts.values()):
        alone = run_alone(decoder, [*token_ids, 5], torch.float32)
        end = begin + len(token_ids)
        assert_close(together[begin:end], alone[:-1], torch.float32)
        assert_close(next_together[len(prompts) - 1 - row], alone[-1], torch.float32)
        begin = end
    assert differs(next_together[0], next_together[1])


def test_only_logit_rows_are_computed(checkpoint):
    decoder = load_ours(checkpoint("llama"), torch.float32, reference)
    prompts = {"a": prompt(7), "b": prompt(3, seed=1)}
    shape = decoder.config.shape()
    every = run(decoder, BatchFactory(shape, torch.float32).batch(prompts))
    batch = BatchFactory(shape, torch.float32).batch(prompts, last_rows_only=True)
    assert_close(run(decoder, batch), every[[6, 9]], torch.float32)
    none = dataclasses.replace(batch, logit_rows=torch.empty(0, dtype=torch.int64))
    assert run(decoder, none).shape == (0, VOCAB_SIZE)


def peft_adapter(
    path: Path, where: Path, rank: int, seed: int, dtype: torch.dtype
) -> tuple[Any, dict[int, SiteWeights]]:
    """PEFT's model, its adapter rounded to `dtype`, and the adapter's matrices by site."""
    base = load_reference(path, dtype)
    options = {"r": rank, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    model = make_peft_adapter(base, where, options, seed=seed)
    state = model.state_dict()
    for name, tensor in state.items():
        if ".lora_" in name:
            tensor.copy_(tensor.to(dtype))
    sites = {}
    for site in range(base.config.num_hidden_layers * len(TARGETS)):
        prefix = f"base_model.model.{module_path(*divmod(site, len(TARGETS)))}"
        a_RI, b_OR = (state[f"{prefix}.lora_{side}.default.weight"] for side in "AB")
        sites[site] = SiteWeights(a_RI, b_OR, ALPHA / rank)
    return model, sites


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["llama-biased", "mistral", "qwen2-tied", "qwen3"])
def test_an_adapter_of_two_tiles_equals_peft(variant, dtype, kernels, checkpoint, tmp_path):
    path = checkpoint(variant)
    model, sites = peft_adapter(path, tmp_path, rank=20, seed=1, dtype=dtype)
    decoder = load_ours(path, dtype, kernels)
    tiles = TilePool({"a": sites}, dtype)
    table = tiles.table(decoder.config.shape().num_sites(), [("a", PROMPT_TOKENS)])
    factory = BatchFactory(decoder.config.shape(), dtype)
    adapted_ZV = run(decoder, factory.batch({"a": prompt()}, tiles=table, pool=tiles.pool))
    assert max(table.max_tiles) == 2
    assert differs(adapted_ZV, run_alone(decoder, prompt(), dtype), dtype)
    assert_close(adapted_ZV, run_reference(model, prompt()), dtype)


def test_a_mixed_batch_equals_each_adapter_alone(kernels, checkpoint, tmp_path):
    dtype, path = torch.float32, checkpoint("qwen2-sliding")
    ranks = {"x": 1, "y": 20, "z": 33}
    peft = {
        name: peft_adapter(path, tmp_path / name, rank, seed=rank, dtype=dtype)
        for name, rank in ranks.items()
    }
    tiles = TilePool({name: sites for name, (_, sites) in peft.items()}, dtype)
    decoder = load_ours(path, dtype, kernels)
    shape, before = decoder.config.shape(), weights_of(decoder)
    rows = [("z", 7), (None, 3), ("x", 1), ("y", 33), (None, 1)]
    prompts = {str(row): prompt(length, seed=row) for row, (_, length) in enumerate(rows)}
    table = tiles.table(shape.num_sites(), rows)
    batch = BatchFactory(shape, dtype).batch(prompts, tiles=table, pool=tiles.pool)
    parts = run(decoder, batch).split([length for _, length in rows])
    base = load_reference(path, dtype)
    for (name, _), logits_ZV, token_ids in zip(rows, parts, prompts.values(), strict=True):
        model = base if name is None else peft[name][0]
        assert_close(logits_ZV, run_reference(model, token_ids), dtype)
        assert (name is None) != differs(logits_ZV, run_reference(base, token_ids))
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.weights())


def weights_of(decoder: Decoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in decoder.weights()}


def recording_kernels(calls: list[tuple[int, int]]) -> Kernels:
    """The reference, noting (first site, parts) of each shrink."""

    def lora_shrink(x_TI: Tensor, pool: Tensor, tiles: Any, first_site: int, parts: int) -> Tensor:
        calls.append((first_site, parts))
        return reference.lora_shrink(x_TI, pool, tiles, first_site, parts)

    return SimpleNamespace(**(vars(reference) | {"lora_shrink": lora_shrink}))  # type: ignore


def test_linears_without_tiles_call_no_lora_kernel(checkpoint, tmp_path):
    path = checkpoint("llama")
    _, sites = peft_adapter(path, tmp_path, rank=3, seed=1, dtype=torch.float32)
    chosen = {site: sites[site] for site in (2, 7 + 3, 7 + 5)}  # v of layer 0; o and up of layer 1
    tiles = TilePool({"a": chosen}, torch.float32)
    calls: list[tuple[int, int]] = []
    decoder = load_ours(path, torch.float32, recording_kernels(calls))
    shape = decoder.config.shape()
    table = tiles.table(shape.num_sites(), [("a", 7)])
    run_alone(decoder, prompt(7), torch.float32)
    assert calls == []
    batch = BatchFactory(shape, torch.float32).batch({"a": prompt(7)}, tiles=table, pool=tiles.pool)
    run(decoder, batch)
    assert calls == [(0, 3), (7 + 3, 1), (7 + 4, 2)]
