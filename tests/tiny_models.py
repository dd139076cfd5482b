"""Tiny base models with and without biases, q and k norms and tied embeddings.

Biases and norms are random: what is not applied shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adapter_factory import CONFIG_FILE, WEIGHTS_FILE
from general_form import save_peft

SIZES: dict[str, Any] = {
    "vocab_size": 133,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
}
# Weights so large that a small update of any of them shows.
WIDE_SIZES = SIZES | {"initializer_range": 0.2}


def tiny_qwen() -> PreTrainedModel:
    """A random Qwen2 with biases of q, k and v, and tied embeddings."""
    torch.manual_seed(0)
    config = Qwen2Config(**WIDE_SIZES, tie_word_embeddings=True)
    return _with_random_biases(Qwen2ForCausalLM(config))


def tiny_biased_llama() -> PreTrainedModel:
    """A random Llama with a bias in every linear of its layers."""
    torch.manual_seed(0)
    config = LlamaConfig(**WIDE_SIZES, attention_bias=True, mlp_bias=True)
    return _with_random_biases(LlamaForCausalLM(config))


def _with_random_biases(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def biased_model(*, tied: bool = True) -> PreTrainedModel:
    """Qwen2: biases on q, k and v."""
    return _randomized(
        Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=tied), seed=int(tied)
    )


def plain_model(*, tied: bool = False) -> PreTrainedModel:
    """Llama: no biases."""
    return _randomized(LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=tied), seed=2)


def normed_model() -> PreTrainedModel:
    """Qwen3: norms on q and k."""
    return _randomized(Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=True), seed=3)


def _randomized(kind: type[PreTrainedModel], config: Any, *, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = kind(config).eval()
    # transformers reads the head's size of Qwen2 from here only if it is set.
    model.config.head_dim = SIZES["head_dim"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def save_lora(model: PreTrainedModel, path: Path, **config: Any) -> None:
    """Save a random adapter that PEFT's LoraConfig of these arguments makes of `model`."""
    from peft import LoraConfig

    save_peft(model, path, LoraConfig(task_type="CAUSAL_LM", **({"r": 3} | config)))


def change_config(path: Path, **keys: Any) -> None:
    """Set keys of a saved config; those that are `...` are removed."""
    config = json.loads((path / CONFIG_FILE).read_text()) | keys
    config = {key: value for key, value in config.items() if value is not ...}
    (path / CONFIG_FILE).write_text(json.dumps(config))


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / WEIGHTS_FILE)


def change_tensors(path: Path, changed: dict[str, Tensor | None]) -> None:
    """Put tensors into the file, or take out those that are None."""
    tensors = tensors_of(path) | changed
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / WEIGHTS_FILE)
