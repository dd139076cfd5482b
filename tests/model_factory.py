"""Tiny random checkpoints of every family we serve, saved by transformers.

Weights are large enough that logits vary and every part matters: biases are not zero,
norms are not one. Sizes are no powers of two; heads are grouped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraswarm.kernels import Kernels
from loraswarm.models.decoder import Decoder
from loraswarm.models.families import decoder_config
from loraswarm.models.layers.backend import Backend
from loraswarm.models.loader import load_decoder
from loraswarm.models.source import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
VOCAB_SIZE = 133

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> (model_type, what differs from the sizes above)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 14}),
    "llama3-tied": ("llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-full": ("mistral", {"sliding_window": None, "num_key_value_heads": 3}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 20, "rms_norm_eps": 1e-5}),
    "qwen3-biased": (
        "qwen3",
        {
            "head_dim": 6,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
    ),
}


def save_tiny_model(
    path: Path,
    variant: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of a variant of VARIANTS in `dtype`; returns `path`.

    `overrides` are keys of the transformers config, on top of the variant's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = VARIANTS[variant]
    config = AutoConfig.for_model(model_type, **(_SIZES | changes | overrides))
    model = AutoModelForCausalLM.from_config(config)
    _randomize_(model, seed)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def _randomize_(model: PreTrainedModel, seed: int) -> None:
    """Weights that keep activations of order 1 and updates smaller than the residual stream.

    The last point, and a final norm of about one half, keep 16-bit rounding within the tolerances.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 1:
                parameter.mul_(0.3).add_(1.0 if "norm" in name else 0.0)
                parameter.mul_(0.5 if name == "model.norm.weight" else 1.0)
                continue
            writes_residual = "o_proj" in name or "down_proj" in name
            parameter.mul_((0.1 if writes_residual else 1.0) * parameter.shape[1] ** -0.5)


def load_reference(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint in transformers, in `dtype`, with eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.eval()


def load_ours(path: Path, dtype: torch.dtype, kernels: Kernels) -> Decoder:
    """The checkpoint in our decoder, on the CPU."""
    backend = Backend(kernels, dtype, CPU)
    return load_decoder(path, decoder_config(read_config(path)), backend)
