"""Writes a checkpoint of random weights and PEFT adapters for it, to serve or to measure.

    python benchmarks/random_swarm.py DIR --size qwen2.5-0.5b --adapters 100 --ranks 8,16,32,64

makes DIR/model (a Hugging Face directory with the demo's tokenizer) and DIR/adapters/a000 and on.
The weights are random: the text means nothing, speed and memory are those of the size.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from loraswarm.core.base_shape import BaseShape, module_path
from loraswarm.models.families import decoder_config

COMMON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
    "eos_token_id": 0,
}
SIZES = {
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 4096,
    },
}


def write_checkpoint(path: Path, size: str, seed: int = 0) -> BaseShape:
    """A random Qwen2 checkpoint in bfloat16 with the demo's tokenizer; returns its shape."""
    config = COMMON | SIZES[size]
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(dict(_base_tensors(config, seed)), path / "model.safetensors")
    _copy_tokenizer(path)
    return decoder_config(config).shape()


def write_adapter(path: Path, shape: BaseShape, rank: int, seed: int) -> None:
    """A random rsLoRA-free PEFT adapter of one rank on all seven linears of every layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    targets = []
    for site in range(shape.num_linears):
        layer, target = divmod(site, len(shape.target_sizes))
        in_size, out_size = shape.target_sizes[target]
        name = module_path(layer, target)
        prefix = f"base_model.model.{name}"
        a, b = torch.randn(rank, in_size), torch.randn(out_size, rank)
        a.normal_(std=in_size**-0.5, generator=generator)
        b.normal_(std=0.02, generator=generator)
        tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
        tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
        targets.append(name.rsplit(".", 1)[-1])
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(set(targets)),
        "bias": "none",
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_swarm(path: Path, size: str, num_adapters: int, ranks: Sequence[int]) -> None:
    """Checkpoint and adapters a000, a001, ... whose ranks take turns."""
    shape = write_checkpoint(path / "model", size)
    for index in tqdm(range(num_adapters), desc="adapters", disable=None):
        rank = ranks[index % len(ranks)]
        write_adapter(path / "adapters" / f"a{index:03}", shape, rank, seed=index)


def _base_tensors(config: dict[str, object], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = decoder_config(config).shape()
    hidden = shape.target_sizes[0][0]

    def random(*size: int) -> torch.Tensor:
        return torch.empty(size).normal_(std=size[-1] ** -0.5, generator=generator).bfloat16()

    yield "model.embed_tokens.weight", random(shape.vocab_size, hidden)
    for site in range(shape.num_linears):
        layer, target = divmod(site, len(shape.target_sizes))
        in_size, out_size = shape.target_sizes[target]
        name = module_path(layer, target)
        yield f"{name}.weight", random(out_size, in_size)
        if target < 3:
            yield f"{name}.bias", 0.02 * random(out_size)
    for layer in range(shape.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", torch.ones(hidden).bfloat16()
    yield "model.norm.weight", torch.ones(hidden).bfloat16()


def _copy_tokenizer(path: Path) -> None:
    from loraswarm.demo import base_path

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = Path(base_path()) / name
        if source.exists():
            shutil.copy(source, path / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="qwen2.5-0.5b")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--ranks", default="8,16,32,64")
    options = parser.parse_args()
    ranks = [int(rank) for rank in options.ranks.split(",")]
    write_swarm(options.path, options.size, options.adapters, ranks)


if __name__ == "__main__":
    main()
