"""Writes tiny GPTQ and AWQ checkpoints word by word, and the same model in floats beside them.

Plain loops over integers: what the packers of those formats do, found from their layouts alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from loraswarm.core.base_shape import TARGETS
from model_factory import save_tiny_model

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How integers are stored. `stored_zero`: None, random ones; else all are that.

    `order`: None, groups are consecutive inputs; "shared": every linear of one input shuffles them
    alike; "own": each in its own way.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    checkpoint_format: str = "gptq"
    sym: bool = False
    stored_zero: int | None = None
    order: str | None = None
    has_zero_biases: bool = False

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        shared = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return shared | {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
        return shared | {
            "sym": self.sym,
            "desc_act": self.order is not None,
            "checkpoint_format": self.checkpoint_format,
            "damp_percent": 0.01,
            "lm_head": False,
            "meta": {"quantizer": ["x:1"]},
        }


def save_quantized(path: Path, layout: Layout, seed: int = 0, **overrides: Any) -> Path:
    """`path`/model in integers and `path`/floats, the same model in float32; returns `path`."""
    save_tiny_model(path / "floats", **(SIZES | overrides))
    tensors = load_file(path / "floats" / "model.safetensors")
    packed = dict(tensors)
    rng = np.random.default_rng(seed)
    for name in sorted(tensors):
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in TARGETS and name.endswith(".weight"):
            std = float(tensors[name].std())
            size = (tensors[name].shape[0], tensors[name].shape[1])
            del packed[name]
            parts, tensors[name] = _linear(layout, size, std, rng)
            packed |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, path / "floats" / "model.safetensors")
    (path / "model").mkdir(parents=True)
    save_file(packed, path / "model" / "model.safetensors")
    config = json.loads((path / "floats" / "config.json").read_text())
    config["quantization_config"] = layout.config()
    (path / "model" / "config.json").write_text(json.dumps(config))
    return path


def change_quantization(path: Path, **changes: Any) -> None:
    """Overwrite keys of `quantization_config` in `path`/model."""
    file = path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def pack_gptq(ints_IO: np.ndarray, bits: int) -> torch.Tensor:
    """[I / F, O]: consecutive rows in one word, the first in the lowest bits."""
    per_word = 32 // bits
    words = np.zeros((ints_IO.shape[0] // per_word, ints_IO.shape[1]), dtype=np.uint32)
    for row in range(ints_IO.shape[0]):
        words[row // per_word] |= ints_IO[row].astype(np.uint32) << (bits * (row % per_word))
    return torch.from_numpy(words.view(np.int32))


def pack_gptq_zeros(zeros_GO: np.ndarray, bits: int) -> torch.Tensor:
    """[G, O / F]: consecutive columns in one word."""
    return pack_gptq(zeros_GO.T, bits).T.contiguous()


def pack_awq(ints_RO: np.ndarray) -> torch.Tensor:
    """[R, O / 8]: eight columns in one word, in AWQ's order."""
    words = np.zeros((ints_RO.shape[0], ints_RO.shape[1] // 8), dtype=np.uint32)
    for column in range(words.shape[1]):
        for place, output in enumerate(AWQ_OUTPUTS):
            value = ints_RO[:, 8 * column + output].astype(np.uint32)
            words[:, column] |= value << (4 * place)
    return torch.from_numpy(words.view(np.int32))


def _linear(
    layout: Layout, size: tuple[int, int], std: float, rng: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The stored tensors of one random linear, and its weight [O, I] by the formula."""
    num_out, num_in = size
    group_size = num_in if layout.group_size == -1 else layout.group_size
    num_groups, top = -(-num_in // group_size), 1 << layout.bits
    ints_IO = rng.integers(0, top, (num_in, num_out))
    less_one = layout.method == "gptq" and layout.checkpoint_format == "gptq"
    # Near the middle, so that the weights are about evenly spread; 8 bits reach to both ends.
    stored_GO = rng.integers(top // 2 - 3, top // 2 + 3, (num_groups, num_out))
    if layout.stored_zero is not None:
        stored_GO[:] = layout.stored_zero
    zero_GO = np.full_like(stored_GO, top // 2) if layout.sym else stored_GO + less_one
    scale = std * rng.uniform(2.0, 4.0, (num_groups, num_out)) / top
    scale_GO = scale.astype(np.float16)
    group_I = _groups(layout, num_in, group_size, rng)
    w_IO = scale_GO.astype(np.float32)[group_I] * (ints_IO - zero_GO[group_I]).astype(np.float32)
    scales = torch.from_numpy(scale_GO)
    if layout.method == "awq":
        parts = {"qweight": pack_awq(ints_IO), "qzeros": pack_awq(stored_GO), "scales": scales}
    else:
        parts = {
            "qweight": pack_gptq(ints_IO, layout.bits),
            "qzeros": pack_gptq_zeros(stored_GO, layout.bits),
            "scales": scales,
            "g_idx": torch.from_numpy(group_I.astype(np.int32)),
        }
    if layout.has_zero_biases:
        parts["bias"] = torch.zeros(num_out)
    return parts, torch.from_numpy(np.ascontiguousarray(w_IO.T))


def _groups(layout: Layout, num_in: int, group_size: int, rng: np.random.Generator) -> np.ndarray:
    """The group of each input."""
    group_I = np.arange(num_in) // group_size
    if layout.order == "shared":
        return np.random.default_rng(num_in).permutation(group_I)
    return rng.permutation(group_I) if layout.order == "own" else group_I
