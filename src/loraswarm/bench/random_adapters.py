"""LoRA adapters of random weights for a base model, written as PEFT directories.

What they answer means nothing; what they weigh and cost is that of real ones. Called by
bench/calibrate when it is given no adapters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from loraswarm.core.base_shape import BaseShape, module_path

if TYPE_CHECKING:
    from torch import Generator, Tensor

FILE_ELEMENT_BYTES = 2


def rank_bytes(shape: BaseShape) -> int:
    """Bytes in an adapter's file of each rank, over all linears."""
    sizes = [sum(shape.target_sizes[site % len(shape.target_sizes)]) for site in _sites(shape)]
    return sum(sizes) * FILE_ELEMENT_BYTES


def write_adapters(path: Path, shape: BaseShape, ranks: list[int], seed: int) -> None:
    """`path`/r000-8, ...: an adapter of bfloat16 on all linears for each rank of `ranks`."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    for index, rank in enumerate(ranks):
        directory = path / f"r{index:03}-{rank}"
        directory.mkdir(parents=True)
        save_file(_tensors(shape, rank, generator), directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(_config(shape, rank)))


def _tensors(shape: BaseShape, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Small updates, none of them zero: products must not be of numbers that cost less."""
    import torch

    def random(num_rows: int, num_columns: int, scale: float) -> Tensor:
        values = torch.empty(num_rows, num_columns, dtype=torch.bfloat16)
        return values.uniform_(-scale, scale, generator=generator)

    tensors = {}
    for site in _sites(shape):
        layer, target = divmod(site, len(shape.target_sizes))
        in_size, out_size = shape.target_sizes[target]
        prefix = f"base_model.model.{module_path(layer, target)}"
        tensors[f"{prefix}.lora_A.weight"] = random(rank, in_size, in_size**-0.5)
        tensors[f"{prefix}.lora_B.weight"] = random(out_size, rank, 0.02)
    return tensors


def _config(shape: BaseShape, rank: int) -> dict[str, object]:
    names = {module_path(0, target).rsplit(".", 1)[-1] for target in range(len(shape.target_sizes))}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(names),
        "bias": "none",
        "inference_mode": True,
    }


def _sites(shape: BaseShape) -> range:
    return range(shape.num_linears)
