"""Merging of everything the general form has, against the same adapter applied to a model plainly.

Adapters are made by hand, so that no method's reading is involved.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from general_form import applied, logits_of
from loraswarm.adapters.adapter import (
    EMBEDDING_A,
    Adapter,
    AdapterInfo,
    ModuleInfo,
    ModuleWeights,
    OverlayInfo,
    SharedMatrix,
)
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, TARGETS, BaseShape
from loraswarm.errors import AdapterError
from loraswarm.kernels import cpu
from loraswarm.models import merge as merge_module
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from model_factory import load_ours, load_reference, save_tiny_model
from tolerance import TOLERANCE, assert_close

RANK = 3


class Builder:
    """Random parts of an adapter for one base."""

    def __init__(self, model: Path) -> None:
        self.shape: BaseShape = decoder_config(read_config(model)).shape()
        self.modules: list[ModuleWeights] = []
        self.overlays: list[tuple[OverlayInfo, Tensor]] = []
        self.shared: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self._generator) * 0.3

    def module(self, site: int, vectors: str = "", rank: int = RANK) -> Builder:
        """A module with these of the vectors u, v, g, c."""
        in_size, out_size = self.shape.site_sizes(site)
        info = ModuleInfo(site, rank, 1.5, tuple(vectors))
        a_RI = bt_RO = None
        if rank > 0:
            bt_RO = self.random(rank, out_size)
            if site == self.shape.embedding_site:
                overlay = OverlayInfo((EMBEDDING_A,), in_size, rank)
                self.overlays.append((overlay, self.random(in_size, rank)))
            else:
                a_RI = self.random(rank, in_size)
        made = {name: self.random(rank if name == "u" else out_size) + 1 for name in vectors}
        self.modules.append(ModuleWeights(info, a_RI, bt_RO, made))
        return self

    def sharing(self, site: int, width: int) -> Builder:
        """A module whose A and Bt are the first columns of shared matrices that are wider."""
        for digest in ("a", "bt"):
            self.shared[digest] = self.random(RANK, width)
        first, second = (SharedMatrix(digest, RANK, width) for digest in ("a", "bt"))
        info = ModuleInfo(site, RANK, 0.5, (), first, second)
        self.modules.append(ModuleWeights(info, None, None))
        return self

    def overlay(
        self, *paths: str, rows: int, width: int, ids: tuple[int, ...] | None = None
    ) -> Builder:
        info = OverlayInfo(paths, rows, width, ids)
        self.overlays.append((info, self.random(rows, width) + (1.0 if rows == 1 else 0.0)))
        return self

    def adapter(self, invocation_tokens: tuple[int, ...] | None = None) -> Adapter:
        modules = tuple(sorted(self.modules, key=lambda module: module.info.site))
        info = AdapterInfo(
            name="hand-made",
            path=Path("hand-made"),
            digest="0",
            method="hand-made",
            modules=tuple(module.info for module in modules),
            num_bytes=0,
            overlays=tuple(overlay for overlay, _ in self.overlays),
            invocation_tokens=invocation_tokens,
        )
        return Adapter(info, modules, tuple(rows for _, rows in self.overlays), self.shared)


@pytest.fixture
def merge_with(monkeypatch, tmp_path):
    """Merges a model with an adapter in memory; returns the directory written."""

    def run(model: Path, adapter: Adapter) -> Path:
        monkeypatch.setattr(merge_module, "read_adapter_info", lambda *_: adapter.info)
        monkeypatch.setattr(merge_module, "read_adapter", lambda *_: adapter)
        out = tmp_path / "merged"
        merge_module.merge(model, Path("hand-made"), out, "auto", lambda line: None)
        return out

    return run


def tiny_model(tmp_path: Path, variant: str = "llama") -> Path:
    """A checkpoint whose config names the head size, which tests ask of transformers."""
    return save_tiny_model(tmp_path / "model", variant, head_dim=8)


def check(model: Path, adapter: Adapter, merged: Path) -> None:
    """transformers' logits of `merged` are those of the adapter applied plainly; ours loads it."""
    base = load_reference(model, torch.float32)
    expected = logits_of(applied(base, adapter))
    relative, absolute = TOLERANCE[torch.float32]
    assert not torch.allclose(expected, logits_of(base), rtol=10 * relative, atol=10 * absolute)
    assert_close(logits_of(load_reference(merged, torch.float32)), expected, torch.float32)
    load_ours(merged, torch.float32, cpu)


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def site(layer: int, target: str) -> int:
    return layer * len(TARGETS) + TARGETS.index(target)


@pytest.mark.parametrize("vectors", ["", "u", "v", "uv", "g", "uvg"])
@pytest.mark.parametrize("variant", ["llama", "qwen2-tied", "llama-biased"])
def test_vectors_of_a_module_are_in_the_weights(tmp_path, merge_with, variant, vectors):
    model = tiny_model(tmp_path, variant)
    builder = Builder(model)
    for target in ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"):
        builder.module(site(1, target), vectors)
    adapter = builder.adapter()
    check(model, adapter, merge_with(model, adapter))


def test_a_gain_without_a_low_rank_part_scales_weight_and_bias(tmp_path, merge_with):
    model = tiny_model(tmp_path, "qwen2-tied")
    adapter = Builder(model).module(site(0, "k_proj"), "g", rank=0).adapter()
    merged = merge_with(model, adapter)
    check(model, adapter, merged)
    before, after = (load_file(path / "model.safetensors") for path in (model, merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    k_proj = "model.layers.0.self_attn.k_proj"
    assert changed == {f"{k_proj}.weight", f"{k_proj}.bias"}


def test_a_bias_is_added_to_the_one_there_is(tmp_path, merge_with):
    model = tiny_model(tmp_path, "qwen2-tied")
    adapter = Builder(model).module(site(0, "q_proj"), "gc").adapter()
    merged = merge_with(model, adapter)
    check(model, adapter, merged)
    assert config_of(merged) == config_of(model)


def test_shared_matrices_are_cut_to_the_module(tmp_path, merge_with):
    model = tiny_model(tmp_path)
    adapter = Builder(model).sharing(site(0, "k_proj"), 97).adapter()
    check(model, adapter, merge_with(model, adapter))


@pytest.mark.parametrize(
    ("variant", "targets", "flags"),
    [
        ("llama", ["q_proj"], {"attention_bias"}),
        ("llama", ["up_proj"], {"mlp_bias"}),
        ("llama", ["o_proj", "down_proj"], {"attention_bias", "mlp_bias"}),
        ("qwen3", ["o_proj"], {"attention_bias"}),
    ],
)
def test_a_new_bias_switches_on_the_flag_of_the_family(
    tmp_path, merge_with, variant, targets, flags
):
    model = tiny_model(tmp_path, variant)
    builder = Builder(model)
    for target in targets:
        builder.module(site(1, target), "c")
    adapter = builder.adapter()
    merged = merge_with(model, adapter)
    check(model, adapter, merged)
    before, after = config_of(model), config_of(merged)
    assert {key for key in after if after[key] != before.get(key)} == flags
    tensors = load_file(merged / "model.safetensors")
    biases = {name for name in tensors if name.endswith(".bias") and tensors[name].any()}
    assert biases == {f"{builder.shape.site_path(site(1, target))}.bias" for target in targets}


@pytest.mark.parametrize(
    ("variant", "path"),
    [
        ("qwen2-tied", "model.layers.1.self_attn.o_proj"),
        ("mistral", "model.layers.1.self_attn.q_proj"),
        ("qwen3", "model.layers.1.mlp.up_proj"),
        ("llama", "lm_head"),
    ],
)
def test_a_bias_that_the_family_cannot_have_is_refused_by_name(tmp_path, merge_with, variant, path):
    model = tiny_model(tmp_path, variant)
    builder = Builder(model)
    number = next(number for number in range(10**6) if builder.shape.site_path(number) == path)
    adapter = builder.module(number, "c").adapter()
    model_type = config_of(model)["model_type"]
    with pytest.raises(AdapterError, match=f"bias to '{path}'.*model_type '{model_type}'"):
        merge_with(model, adapter)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("variant", ["llama", "qwen2-tied"])
def test_lora_on_embedding_and_head_unties_them(tmp_path, merge_with, variant):
    model = tiny_model(tmp_path, variant)
    builder = Builder(model)
    shape = builder.shape
    adapter = builder.module(shape.embedding_site).module(shape.head_site, "u").adapter()
    merged = merge_with(model, adapter)
    load_ours(merged, torch.float32, cpu)
    assert config_of(merged)["tie_word_embeddings"] is False
    before, after = (load_file(path / "model.safetensors") for path in (model, merged))
    embedding, head = adapter.modules
    table_VD = before["model.embed_tokens.weight"]
    head_VD = before.get("lm_head.weight", table_VD)
    expected_VD = table_VD + 1.5 * adapter.overlays[0] @ embedding.bt_RO
    assert_close(after["model.embed_tokens.weight"], expected_VD, torch.float32)
    expected_VD = head_VD + 1.5 * head.bt_RO.T @ torch.diag(head.vectors["u"]) @ head.a_RI
    assert_close(after["lm_head.weight"], expected_VD, torch.float32)
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("paths", [(EMBEDDING,), (LM_HEAD,), (EMBEDDING, LM_HEAD)])
@pytest.mark.parametrize("ids", [None, (0, 7, 64, 132)])
@pytest.mark.parametrize("variant", ["llama", "qwen2-tied"])
def test_replaced_rows_stay_tied_only_if_both_have_them(
    tmp_path, merge_with, monkeypatch, variant, ids, paths
):
    monkeypatch.setattr(merge_module, "BLOCK_ELEMENTS", 1000)  # several blocks of rows
    model = tiny_model(tmp_path, variant)
    builder = Builder(model)
    count = builder.shape.vocab_size if ids is None else len(ids)
    adapter = builder.overlay(
        *paths, rows=count, width=builder.shape.hidden_size, ids=ids
    ).adapter()
    merged = merge_with(model, adapter)
    check(model, adapter, merged)
    is_tied = builder.shape.ties_embeddings and len(paths) == 2
    assert config_of(merged)["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) is not is_tied


def test_norms_are_replaced(tmp_path, merge_with):
    model = tiny_model(tmp_path, "qwen3")
    builder = Builder(model)
    for path, size in builder.shape.norm_sizes().items():
        builder.overlay(path, rows=1, width=size)
    adapter = builder.adapter()
    check(model, adapter, merge_with(model, adapter))


def test_an_adapter_that_acts_on_part_of_the_prompt_is_refused(tmp_path, merge_with):
    model = tiny_model(tmp_path)
    adapter = Builder(model).module(site(0, "q_proj")).adapter(invocation_tokens=(5, 9))
    with pytest.raises(AdapterError, match=r"cannot be merged.*alora_invocation_tokens"):
        merge_with(model, adapter)
    assert not (tmp_path / "merged").exists()
