"""What a config may ask for without a file that pays for it: ranks, and names to look for."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapter_factory import save_random_adapter, shape_of, write_adapter
from counted_work import at_most_calls
from general_form import check_equals_peft, save_peft
from loraswarm.adapters.config_keys import MAX_NAMES, MAX_PATTERNS, MAX_TARGETS, ConfigKeys
from loraswarm.adapters.module_selection import (
    ModuleSelection,
    Patterns,
    is_literal,
    key_expression,
)
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.core.base_shape import TARGETS, BaseShape, module_path
from loraswarm.errors import AdapterError
from tiny_models import change_config, plain_model, save_lora

LIMIT_CALLS = 3_000_000
LIMIT_BYTES = 64 * 2**20
# The sizes of Llama 2 7B.
WIDE = BaseShape(
    num_layers=32,
    num_kv_heads=32,
    head_size=128,
    vocab_size=32000,
    target_sizes=((4096, 4096),) * 4 + ((4096, 11008), (4096, 11008), (11008, 4096)),
)
PATHS = [module_path(layer, target) for layer in (0, 1, 11, 31) for target in range(len(TARGETS))]
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
ONE_MODULE = {"target_modules": ["q_proj"], "layers_to_transform": [0]}


def refusal(path: Path) -> str:
    """The message, which takes little work and memory to find."""
    with at_most_calls(LIMIT_CALLS), pytest.raises(AdapterError):
        read_adapter_info(path, "a", WIDE)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError) as caught:
            read_adapter_info(path, "a", WIDE)
        assert tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()
    return str(caught.value)


def save_drawn_vera(path: Path, rank: int) -> None:
    vectors = {
        f"{PREFIX}.vera_lambda_d": torch.ones(rank),
        f"{PREFIX}.vera_lambda_b": torch.ones(4096),
    }
    config = {"peft_type": "VERA", "r": rank, "save_projection": False, "projection_prng_key": 0}
    write_adapter(path, config | ONE_MODULE, vectors)


def test_matrices_that_are_drawn_are_no_larger_than_what_they_adapt(tmp_path):
    save_drawn_vera(tmp_path, 8192)
    assert read_adapter_info(tmp_path, "a", WIDE).max_rank == 8192
    save_drawn_vera(tmp_path, 8193)
    message = refusal(tmp_path)
    assert "r is 8193" in message
    assert "up to 8192" in message
    assert "save_projection" in message
    save_drawn_vera(tmp_path, 1_000_000)
    assert "r is 1000000" in refusal(tmp_path)


def test_matrices_in_the_file_may_have_any_rank(tmp_path):
    model = plain_model()
    save_peft(model, tmp_path, peft.VeraConfig(r=151, target_modules=["k_proj"]))
    assert check_equals_peft(model, tmp_path).info.max_rank == 151


def test_few_indices_do_not_make_matrices_larger_than_the_weight(tmp_path):
    rank, length = 100_000, 4096
    tensors = {"base_model.vblora_vector_bank": torch.ones(1, length)}
    for side, grid in (("A", (rank, 1)), ("B", (1, rank))):
        name = f"{PREFIX}.vblora_logits_{side}_topk"
        tensors[f"{name}_indices"] = torch.zeros(*grid, 1, dtype=torch.uint8)
        tensors[f"{name}_weights"] = torch.zeros(*grid, 0)
    sizes = {"r": rank, "num_vectors": 1, "topk": 1, "vector_length": length}
    config = {"peft_type": "VBLORA", "save_only_topk_weights": True, **sizes, **ONE_MODULE}
    write_adapter(tmp_path, config, tensors)
    message = refusal(tmp_path)
    assert "update of rank 100000; up to 2048" in message
    assert "q_proj" in message


def test_mixtures_of_many_vectors_take_no_more_memory_than_their_result(tmp_path):
    """Each of 40 vectors of a mixture after the other: together they would be 40 times as much."""
    from loraswarm.adapters.methods.vblora import VbLoraConfig, _mixtures

    class Logits:
        def wide(self, name: str) -> torch.Tensor:
            return torch.randn(8, 4, 40, generator=torch.Generator().manual_seed(0))

    config = VbLoraConfig(ModuleSelection("x"), 8, 40, 7, 40, has_topk=False)
    bank_NL = torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
    logits = Logits().wide("")
    found = _mixtures("x", config, bank_NL, Logits())  # type: ignore[arg-type]
    torch.testing.assert_close(found, logits.softmax(dim=-1) @ bank_NL)


def test_few_columns_do_not_make_blocks_larger_than_the_weight(tmp_path):
    sizes = {"r": 4096, "mini_r": 1, "init_weights": "mini"}
    config = {"peft_type": "MISS", "target_modules": ["q_proj"], **sizes}
    block = {
        f"{PREFIX.replace('.0.', f'.{layer}.')}.miss_block": torch.ones(4096, 1)
        for layer in range(32)
    }
    write_adapter(tmp_path, config, block)
    assert "update of rank 4096; up to 2048" in refusal(tmp_path)
    write_adapter(tmp_path, config | {"r": 2048}, {name: t[:2048] for name, t in block.items()})
    assert read_adapter_info(tmp_path, "a", WIDE).max_rank == 2048


LISTS: dict[str, tuple[int, Any]] = {
    "rank_pattern": (MAX_PATTERNS, lambda count: {f"x{i}": 3 for i in range(count)}),
    "alpha_pattern": (MAX_PATTERNS, lambda count: {f"x{i}": 3 for i in range(count)}),
    "modules_to_save": (MAX_NAMES, lambda count: [f"x{i}" for i in range(count)]),
    "target_modules": (MAX_TARGETS, lambda count: ["q_proj"] + [f"x{i}" for i in range(1, count)]),
    "exclude_modules": (MAX_TARGETS, lambda count: [f"x{i}" for i in range(count)]),
    "layers_pattern": (MAX_NAMES, lambda count: ["layers"] + [f"x{i}" for i in range(1, count)]),
}


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("more", [1, 100_000])
def test_lists_without_end_are_refused_at_once(key, more, tmp_path):
    limit, make = LISTS[key]
    layers = {"layers_to_transform": [0]} if key == "layers_pattern" else {}
    overrides = {key: make(limit + more)} | layers
    save_random_adapter(tmp_path, WIDE, targets=["q_proj"], rank=1, config_overrides=overrides)
    assert f"{key} has {limit + more} entries; at most {limit}" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["x{}", ".*x{}|y", "^model.layers.{}.self_attn.q_proj$"])
def test_lists_at_their_limits_are_read_in_time(name, tmp_path):
    """Every key that has names, of all modules of a large model, twice; and nothing thrashes."""
    names = [name.format(index) for index in range(1000)]
    overrides = {key: dict.fromkeys(names, 3) for key in ("rank_pattern", "alpha_pattern")}
    if "model" not in name:
        overrides["modules_to_save"] = names[:100]
    save_random_adapter(tmp_path, WIDE, rank=1, layers=[0], config_overrides=overrides)
    change_config(tmp_path, layers_to_transform=None)
    for _ in range(2):
        assert "missing" in refusal(tmp_path) or "rank 1, but" in refusal(tmp_path)


def test_expressions_that_take_too_long_together_are_refused(tmp_path):
    names = {f".*.*q{index}": 3 for index in range(1000)}
    save_random_adapter(tmp_path, WIDE, targets=["q_proj"], rank=1)
    for key, value in (
        ("rank_pattern", names),
        ("alpha_pattern", names),
        ("modules_to_save", [f".*q{index}" for index in range(1000)]),
    ):
        change_config(tmp_path, **{key: value})
        assert f"{key} has regular expressions that together" in refusal(tmp_path)
        change_config(tmp_path, **{key: None})


def test_a_rank_for_every_module_of_a_large_model_is_read(tmp_path):
    """What EVA writes for 80 layers."""
    names = [module_path(layer, target) for layer in range(80) for target in range(len(TARGETS))]
    ranks = {name: 3 + index for index, name in enumerate(names)}
    keys = ConfigKeys({"rank_pattern": ranks})
    with at_most_calls(LIMIT_CALLS):
        patterns = keys.rank_patterns("rank_pattern")
        assert [patterns.find(name) for name in names] == list(ranks.items())


LITERALS = [
    "q_proj", "proj", "layers.1.mlp.up_proj", "1.mlp.up_proj", "model.layers.11.mlp.up_proj",
    "self_attn.q.proj", "q.proj", ".q_proj", "q_proj.", "........", ".", "", "x", "layers.1",
    "s.1.mlp.up_proj", "model.layers.0.self_attn.q_proj", "odel.layers.0.self_attn.q_proj",
    "amodel.layers.0.self_attn.q_proj", "mlp...proj", "up_proj",
]  # fmt: skip


@pytest.mark.parametrize("name", LITERALS)
def test_names_match_without_an_expression_what_they_match_as_one(name):
    assert is_literal(name)
    patterns = Patterns([(name, 1)])
    for path in [*PATHS, "lm_head", "model.embed_tokens", "q_proj"]:
        expected = re.match(key_expression(name), path) is not None
        assert (patterns.find(path) is not None) == expected, path


def test_the_first_pattern_wins_whether_name_or_expression():
    patterns = Patterns(
        [("k_proj", 1), (".*q_pro.", 2), ("q_proj", 3), ("^v_proj", 4), ("proj", 5)]
    )
    found = {path.rpartition(".")[2]: patterns.find(path) for path in PATHS[:7]}
    assert found["q_proj"] == (".*q_pro.", 2)
    assert found["k_proj"] == ("k_proj", 1)
    assert found["v_proj"] is None
    same = Patterns([("k_proj", 1), (".*q_pro.", 2)])
    assert same == Patterns([("k_proj", 1), (".*q_pro.", 2)])
    assert hash(same) == hash(Patterns([("k_proj", 1), (".*q_pro.", 2)]))
    assert same != Patterns([(".*q_pro.", 2), ("k_proj", 1)])
    assert same != Patterns([("k_proj", 1), (".*q_pro.", 3)])


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_an_empty_name_selects_and_excludes_nothing(tmp_path):
    model = plain_model()
    save_lora(model, tmp_path, target_modules=["q_proj", "v_proj"])
    for key, value in (("target_modules", ["q_proj", "v_proj", ""]), ("exclude_modules", [""])):
        change_config(tmp_path, **{key: value})
        adapter = check_equals_peft(model, tmp_path)
        assert len(adapter.modules) == 4
    change_config(tmp_path, target_modules=[""])
    with pytest.raises(AdapterError, match="selects no linear"):
        read_adapter_info(tmp_path, "a", shape_of(model))
