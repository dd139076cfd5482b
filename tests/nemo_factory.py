"""Writes tiny .nemo files: a PEFT adapter's tensors, fused and cut as NeMo does when it trains.

The reverse of adapters/nemo_layout, written from NeMo's side: what each tensor- and
pipeline-parallel rank holds. For tests.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from loraswarm.core.base_shape import BaseShape

PREFIX = "base_model.model.model.layers."
UNFUSED = {
    "q_proj": ("self_attention", "lora_unfused_kqv_adapter.q_adapter"),
    "k_proj": ("self_attention", "lora_unfused_kqv_adapter.k_adapter"),
    "v_proj": ("self_attention", "lora_unfused_kqv_adapter.v_adapter"),
    "o_proj": ("self_attention", "lora_dense_attention_adapter"),
    "gate_proj": ("mlp", "lora_unfused_hto4h_adapter.gate_adapter"),
    "up_proj": ("mlp", "lora_unfused_hto4h_adapter.up_adapter"),
    "down_proj": ("mlp", "lora_4htoh_adapter"),
}
ROW_PARALLEL = ("lora_dense_attention_adapter", "lora_4htoh_adapter")
GROUPS = {
    "attention_qkv": ("q_proj", "k_proj", "v_proj"),
    "attention_dense": ("o_proj",),
    "mlp_fc1": ("gate_proj", "up_proj"),
    "mlp_fc2": ("down_proj",),
}


@dataclass(frozen=True)
class Layout:
    """How the training cut the adapter, and how the file is packed."""

    is_fused: bool = True
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    has_module_infix: bool = False
    has_dot_prefix: bool = False
    is_gzipped: bool = False


def shared_a(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter, with one A for q, k and v and one for gate and up, as fused ones have."""
    shared = dict(tensors)
    for name in tensors:
        if name.endswith("lora_A.weight"):
            for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
                for other in others:
                    if f".{other}." in name and name.replace(other, first) in tensors:
                        shared[name] = tensors[name.replace(other, first)].clone()
    return shared


def nemo_config(shape: BaseShape, targets: set[str], rank: int, layout: Layout) -> dict[str, Any]:
    """What NeMo's model_config.yaml says about the base and the adapter."""
    heads = shape.target_sizes[0][1] // shape.head_size
    return {
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.target_sizes[4][1],
        "num_layers": shape.num_layers,
        "num_attention_heads": heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_size,
        "activation": "fast-swiglu",
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "optim": {"name": "fused_adam", "lr": 1e-4, "betas": [0.9, 0.98]},
        "peft": {
            "peft_scheme": "lora",
            "restore_from_path": None,
            "lora_tuning": {
                "variant": "nemo" if layout.is_fused else "canonical",
                "target_modules": [
                    group for group, members in GROUPS.items() if targets >= set(members)
                ],
                "adapter_dim": rank,
                "alpha": 2 * rank,
                "adapter_dropout": 0.0,
                "column_init_method": "xavier",
                "row_init_method": "zero",
                "layer_selection": None,
                "weight_tying": False,
                "position_embedding_strategy": None,
            },
        },
    }


def state_dicts(
    tensors: Mapping[str, Tensor], shape: BaseShape, layout: Layout
) -> dict[str, dict[str, Tensor]]:
    """Every checkpoint of the archive by its member's name."""
    result: dict[str, dict[str, Tensor]] = {}
    stage_layers = shape.num_layers // layout.pipeline_parallel
    for stage in range(layout.pipeline_parallel):
        for rank in range(layout.tensor_parallel):
            result[member_name(rank, stage, layout)] = {}
    for (layer, block, adapter), (a_RI, b_OR) in _adapters(tensors, shape, layout).items():
        stage = layer // stage_layers
        infix = "module." if layout.has_module_infix else ""
        name = f"model.{infix}decoder.layers.{layer % stage_layers}.{block}.adapter_layer.{adapter}"
        axis = 1 if adapter in ROW_PARALLEL else 0
        for rank in range(layout.tensor_parallel):
            state = result[member_name(rank, stage, layout)]
            count = layout.tensor_parallel
            state[f"{name}.linear_in.weight"] = a_RI.chunk(count, axis)[rank].contiguous()
            state[f"{name}.linear_out.weight"] = _out_of_rank(adapter, b_OR, rank, count)
    return result


def member_name(rank: int, stage: int, layout: Layout) -> str:
    if layout.tensor_parallel == layout.pipeline_parallel == 1:
        return "model_weights.ckpt"
    if layout.pipeline_parallel == 1:
        return f"mp_rank_{rank:02d}/model_weights.ckpt"
    return f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/model_weights.ckpt"


def _out_of_rank(adapter: str, b_OR: Tensor, rank: int, count: int) -> Tensor:
    """Each rank of the fused gate and up holds its part of the gate, then its part of up."""
    if adapter != "lora_hto4h_adapter":
        return b_OR.chunk(count)[rank].contiguous()
    gate, up = b_OR.chunk(2)
    return torch.cat([gate.chunk(count)[rank], up.chunk(count)[rank]])


def _adapters(
    tensors: Mapping[str, Tensor], shape: BaseShape, layout: Layout
) -> dict[tuple[int, str, str], tuple[Tensor, Tensor]]:
    by_target: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, target, side, _ = name.removeprefix(PREFIX).split(".")
        by_target.setdefault((int(layer), target), {})[side] = tensor
    found: dict[tuple[int, str, str], tuple[Tensor, Tensor]] = {}
    for (layer, target), sides in by_target.items():
        a, b = sides["lora_A"], sides["lora_B"]
        block, adapter = UNFUSED[target]
        if layout.is_fused and target == "q_proj":
            others = [by_target[layer, other]["lora_B"] for other in ("k_proj", "v_proj")]
            b = _interleave(b, *others, shape)
            adapter = "lora_kqv_adapter"
        elif layout.is_fused and target == "gate_proj":
            b = torch.cat([b, by_target[layer, "up_proj"]["lora_B"]])
            adapter = "lora_hto4h_adapter"
        elif layout.is_fused and target in ("k_proj", "v_proj", "up_proj"):
            continue
        found[layer, block, adapter] = (a, b)
    return found


def _interleave(q: Tensor, k: Tensor, v: Tensor, shape: BaseShape) -> Tensor:
    """For each group of heads: its queries, its key, its value."""
    groups = shape.num_kv_heads
    parts = zip(q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True)
    return torch.cat([tensor for part in parts for tensor in part])


def write_nemo(
    path: Path,
    config: Mapping[str, Any] | str,
    states: Mapping[str, Mapping[str, Tensor]],
    layout: Layout = Layout(),
) -> Path:
    """Pack config and checkpoints; returns `path`."""
    text = config if isinstance(config, str) else yaml.safe_dump(dict(config))
    members = {"model_config.yaml": text.encode()}
    for name, state in states.items():
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        members[name] = buffer.getvalue()
    return write_tar(path, members, layout)


def write_tar(path: Path, members: Mapping[str, bytes], layout: Layout = Layout()) -> Path:
    """A tar of these members, with the directories they are in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    prefix = "./" if layout.has_dot_prefix else ""
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        if prefix:
            archive.addfile(_tar_info(".", tarfile.DIRTYPE, 0))
        folders = {name.rpartition("/")[0] for name in members if "/" in name}
        for folder in sorted(folders):
            archive.addfile(_tar_info(prefix + folder, tarfile.DIRTYPE, 0))
        for name, content in members.items():
            info = _tar_info(prefix + name, tarfile.REGTYPE, len(content))
            archive.addfile(info, io.BytesIO(content))
    data = buffer.getvalue()
    path.write_bytes(gzip.compress(data) if layout.is_gzipped else data)
    return path


def _tar_info(name: str, kind: bytes, size: int) -> tarfile.TarInfo:
    """Its fractional time makes tarfile write an extended header, as it does for real files."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mtime = kind, size, 1_700_000_000.25
    return info


def peft_to_nemo(peft_path: Path, nemo_path: Path, shape: BaseShape, layout: Layout) -> Path:
    """A .nemo file of the PEFT LoRA adapter in a directory; its alpha must be twice its rank."""
    from safetensors.torch import load_file

    tensors = load_file(peft_path / "adapter_model.safetensors")
    rank = json.loads((peft_path / "adapter_config.json").read_text())["r"]
    targets = {name.split(".")[-3] for name in tensors}
    config = nemo_config(shape, targets, rank, layout)
    return write_nemo(nemo_path, config, state_dicts(tensors, shape, layout), layout)
