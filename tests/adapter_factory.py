"""Builds adapters for tests: random ones written directly, and real ones made by PEFT.

Knows PEFT's file format and the base's sizes. Weights are random and B is never zero, so that an
adapter that is not applied shows.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraswarm.core.base_shape import TARGETS, BaseShape, module_path

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

PEFT_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",
    "Setting `save_embedding_layers` to `True`",
    "Model with `tie_word_embeddings=True`",
    "Model has `tie_word_embeddings=True`",
    "`lora_bias=True` was passed but the targeted layer",
    "Adapter 'default': .* LoRA tensor\\(s\\) have invalid shape",
    "Unsupported layer type",
    "Specified to not (save|load) vera_A and vera_B",
)

SMALL_SHAPE = BaseShape(
    num_layers=2,
    num_kv_heads=1,
    head_size=7,
    vocab_size=133,
    target_sizes=((21, 21), (21, 7), (21, 7), (21, 21), (21, 33), (21, 33), (33, 21)),
)


def save_random_adapter(
    path: Path,
    shape: BaseShape,
    *,
    rank: int | Mapping[str, int] = 8,
    alpha: float = 16,
    targets: Iterable[str] = TARGETS,
    layers: Iterable[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    std: float = 0.05,
    config_overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Write a PEFT LoRA directory with weights of N(0, std); returns `path`.

    `rank` may be one number or a number per target; `layers` None is all. `config_overrides`
    changes keys of the config only, not the tensors.
    """
    ranks = {target: rank if isinstance(rank, int) else rank[target] for target in targets}
    chosen = list(range(shape.num_layers)) if layers is None else list(layers)
    config: dict[str, Any] = {
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": max(ranks.values()),
        "rank_pattern": {} if isinstance(rank, int) else ranks,
        "target_modules": list(ranks),
        "task_type": "CAUSAL_LM",
    }
    if layers is not None:
        config["layers_to_transform"] = chosen
    tensors = random_tensors(shape, ranks, chosen, seed=seed, std=std)
    return write_adapter(
        path,
        config | dict(config_overrides or {}),
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
    )


def random_tensors(
    shape: BaseShape,
    ranks: Mapping[str, int],
    layers: Iterable[int],
    *,
    seed: int = 0,
    std: float = 0.05,
) -> dict[str, Tensor]:
    """A [rank, in] and B [out, rank] of each target in each layer, under the names PEFT gives."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for target, rank in ranks.items():
            index = TARGETS.index(target)
            in_size, out_size = shape.target_sizes[index]
            prefix = f"base_model.model.{module_path(layer, index)}"
            for side, sizes in (("lora_A", (rank, in_size)), ("lora_B", (out_size, rank))):
                tensors[f"{prefix}.{side}.weight"] = torch.randn(sizes, generator=generator) * std
    return tensors


def write_adapter(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write config and tensors as they are; returns `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_FILE).write_text(json.dumps(config))
    save_file(dict(tensors), path / WEIGHTS_FILE, metadata={"format": "pt"})
    return path


def make_peft_adapter(
    model: PreTrainedModel, path: Path, lora_config: Mapping[str, Any], *, seed: int = 0
) -> PeftModel:
    """Adapt a copy of `model` with PEFT, randomise its lora_A and lora_B, save it to `path`.

    `lora_config` are the arguments of peft.LoraConfig. Returns PEFT's model, in eval mode.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", **lora_config)
    with peft_warnings_ignored():
        adapted = get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.save_pretrained(str(path), save_embedding_layers=False)
    return adapted


def load_peft_adapter(model: PreTrainedModel, path: Path) -> PeftModel:
    """The adapter in `path` as PEFT reads it, on a copy of `model`, in eval mode."""
    from peft import PeftModel

    with peft_warnings_ignored():
        return PeftModel.from_pretrained(copy.deepcopy(model), str(path)).eval()


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """PEFT asks transformers for a property that transformers is about to rename, and warns of
    saving embeddings, of tied weights and of what its defaults do to tiny models."""
    with warnings.catch_warnings():
        for message in PEFT_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def tiny_llama(*, num_layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama with grouped queries and sizes that are no powers of two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=133,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def shape_of(model: PreTrainedModel) -> BaseShape:
    """The sizes of a transformers decoder, read from its own linears."""
    modules = dict(model.named_modules())
    config = model.config
    linears = [modules[module_path(0, target)] for target in range(len(TARGETS))]
    return BaseShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        vocab_size=config.vocab_size,
        target_sizes=tuple((linear.in_features, linear.out_features) for linear in linears),
        biased_targets=tuple(linear.bias is not None for linear in linears),
        has_qk_norm=hasattr(modules["model.layers.0.self_attn"], "q_norm"),
        ties_embeddings=config.tie_word_embeddings,
    )
