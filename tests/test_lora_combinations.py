"""What PEFT makes of options that were put together at random is what we make of them, or refuse.

Options whose combination PEFT itself rejects are passed over.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapter_factory import load_peft_adapter
from general_form import applied, logits_of, read
from loraswarm.core.base_shape import TARGETS
from loraswarm.errors import AdapterError
from tiny_models import biased_model, normed_model, plain_model, save_lora
from tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_ADAPTERS = 24
MODELS = [biased_model, lambda: biased_model(tied=False), plain_model, normed_model]
# Probability, key, values.
OPTIONS: list[tuple[float, str, list[Any]]] = [
    (1.0, "r", [1, 2, 4, 8]),
    (1.0, "lora_alpha", [1, 5, 16]),
    (0.3, "use_rslora", [True]),
    (0.3, "rank_pattern", [{".*_proj": 3}, {"q_proj": 5}, {"embed_tokens": 4}, {"lm_head": 2}]),
    (0.3, "alpha_pattern", [{"up_proj": 7}, {"lm_head": 3}, {"layers.1.self_attn.q_proj": 2}]),
    (0.3, "bias", ["all", "lora_only"]),
    (0.2, "lora_bias", [True]),
    (0.3, "use_dora", [True]),
    (0.1, "velora_config", [{"num_groups": 5}]),
    (0.1, "monteclora_config", [{"num_samples": 3, "buffer_size": 2}]),
    (0.3, "init_lora_weights", ["pissa", "olora", "gaussian", "mica", "orthogonal", False]),
    (0.2, "modules_to_save", [["norm"], ["embed_tokens"], ["lm_head"], ["head"], ["nothing"]]),
    (0.2, "trainable_token_indices", [[5, 3], {"lm_head": [7, 1]}, {"embed_tokens": [5]}]),
    (0.3, "ensure_weight_tying", [True]),
    (0.15, "layers_to_transform", [[0], 1]),
    (0.15, "exclude_modules", [["layers.0.self_attn.q_proj"], ["embed_tokens"], ["lm_head"]]),
]


def random_config(chooser: random.Random) -> dict[str, Any]:
    targets = chooser.sample(TARGETS, chooser.randint(1, 4))
    targets += [name for name in ("embed_tokens", "lm_head") if chooser.random() < 0.25]
    config: dict[str, Any] = {"target_modules": targets}
    if chooser.random() < 0.2:
        config["target_modules"] = f".*({'|'.join(targets)})"
    for probability, key, values in OPTIONS:
        if chooser.random() < probability:
            config[key] = chooser.choice(values)
    return config


def our_logits(model: PreTrainedModel, path: Path) -> Tensor | str:
    """What we make of the adapter, or why it is refused."""
    try:
        return logits_of(applied(model, read(model, path)))
    except AdapterError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(4))
def test_random_combinations_equal_peft_or_are_refused(tmp_path, seed):
    chooser = random.Random(seed)
    model = MODELS[seed]()
    base = logits_of(model)
    num_equal = 0
    for index in range(NUM_ADAPTERS):
        config, path = random_config(chooser), tmp_path / str(index)
        try:
            save_lora(model, path, **config)
            expected = logits_of(load_peft_adapter(model, path))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
            continue
        ours = our_logits(model, path)
        if isinstance(ours, str):
            assert "init_lora_weights" in ours, config
            continue
        largest = max(1.0, float(expected.abs().max()))
        assert_close(ours / largest, expected / largest, torch.float32)
        assert not torch.allclose(expected, base, atol=1e-3), config
        num_equal += 1
    assert num_equal >= NUM_ADAPTERS // 3
