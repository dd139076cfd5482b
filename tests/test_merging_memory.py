"""Merged copies: their memory is taken once, and what a dtype cannot hold is left unmerged."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_factory import save_random_adapter
from cost_cases import figures
from engine_factory import make_engine, make_request, prompt_of, run_tokens
from loraswarm.core.request import SamplingParams
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from merging_cases import (
    key_of,
    merge,
    merged_names,
    merging_engine,
    save_weak_swarm,
    weights_digest,
)

SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_weak_swarm(path, 3, torch.bfloat16)
    shape = decoder_config(read_config(path / "model")).shape()
    for name, targets in (("low", ("q_proj",)), ("high", ("down_proj",))):
        save_random_adapter(path / "adapters" / name, shape, rank=4, targets=targets, std=0.03)
    return path


def addresses(engine) -> set[int]:
    """Of the copies in use and of the memory kept for others."""
    weights = [place.copy or place.spare for place in engine.merger._places]
    panels = [getattr(weight.panels, "panels", None) for weight in weights if weight is not None]
    rows = [weight.rows for weight in weights if weight is not None]
    pairs = zip(panels, rows, strict=True)
    return {(row if panel is None else panel).data_ptr() for panel, row in pairs}


def needs_kept_memory(engine) -> None:
    if not engine.merger._places[0].linear.keeps_copies:
        pytest.skip("this CPU packs every copy anew, so that no memory is kept")


def test_all_memory_is_taken_at_start_and_is_the_same_after_many_switches(swarm):
    engine = merging_engine(swarm)
    needs_kept_memory(engine)
    merger, chance = engine.merger, random.Random(0)
    total = sum(place.num_bytes for place in merger._places)
    before = addresses(engine)
    assert (merger.reserved_bytes, merger.bytes, len(before)) == (total, 0, len(merger._places))
    keys = [None, *(key_of(engine, name) for name in ("a000", "a001", "low"))]
    for _ in range(200):
        merger.set_target(chance.choice(keys))
        for _ in range(chance.randrange(4)):
            engine._collect()
            merger.advance(0.0)
        assert merger.reserved_bytes == total
    merger.set_target(None)
    assert (merger.bytes, addresses(engine)) == (0, before)
    engine.close()
    assert merger.reserved_bytes == 0


def test_memory_for_some_goes_to_the_linears_that_the_adapter_changes(swarm):
    sizes = [place.num_bytes for place in merging_engine(swarm).merger._places]
    engine = merging_engine(swarm, merge_bytes=max(sizes))
    needs_kept_memory(engine)
    budget = engine.merger.budget_bytes
    assert 0 < engine.merger.reserved_bytes <= budget
    merge(engine, "high")
    assert engine.merger.num_merged > 0
    assert engine.merger.reserved_bytes <= budget
    assert merged_names(engine)[:4] == [None] * 4
    merge(engine, "low")
    assert 0 < engine.merger.reserved_bytes <= budget
    assert merged_names(engine)[0] == "low"


def test_seconds_of_a_merge_are_measured_at_start_and_told_to_the_policy(swarm):
    engine = make_engine(swarm, merge="auto", merge_policy="cost")
    needs_kept_memory(engine)
    assert 0.0 < engine.merger.s_per_byte < 1e-3
    assert engine._merge_control._policy.learned.merge_s == engine.merger.merge_s


@pytest.mark.parametrize("merge_s", [0.3, None])
def test_seconds_of_a_merge_that_a_cost_model_has_come_first(swarm, tmp_path, merge_s):
    file = tmp_path / "costs.json"
    figures(merge_s=merge_s).write(file)
    engine = make_engine(swarm, merge="auto", cost_model=str(file))
    known_s = engine.merger.merge_s if merge_s is None else merge_s
    assert engine._merge_control._policy.learned.merge_s == known_s


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_float16_cannot_hold_is_not_merged_and_is_served_all_the_same(tmp_path, caplog, dtype):
    save_weak_swarm(tmp_path, 1, dtype)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = 65500.0
    save_file(tensors, file, metadata={"format": "pt"})
    file = tmp_path / "adapters" / "a000" / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    tensors[f"{prefix}A.weight"][0, 0] = 60.0
    tensors[f"{prefix}B.weight"][0, 0] = 60.0
    save_file(tensors, file)
    engine = merging_engine(tmp_path, dtype=str(dtype).removeprefix("torch."))
    before = weights_digest(engine)
    with caplog.at_level("WARNING", "loraswarm.engine.merging"):
        merge(engine, "a000")
    is_narrow = dtype == torch.float16
    name = "float16 cannot hold it in model.layers.0.self_attn.o_proj"
    assert (name in caplog.text) == is_narrow
    assert merged_names(engine).count(None) == int(is_narrow)
    assert engine.merger.is_settled
    answer = run_tokens(engine, [make_request("r", "a000", prompt_of(1, 9), SHORT)])
    assert len(answer["r"]) == SHORT.max_tokens
    assert weights_digest(engine) == before
