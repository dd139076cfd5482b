"""Which stored tensors of a NeMo LoRA adapter make up which of PEFT's: fused ones cut, shards
joined.

Knows names and shapes, no values and no files. Called by adapters/nemo_archive.
Source    NVIDIA/NeMo 2.0: scripts/checkpoint_converters/lora_converters (names, fused layouts),
          .../adapters/parallel_adapters.py (what each rank holds).

Legend: R rank, I in features, O out features, N tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loraswarm.adapters.nemo_config import CONFIG_MEMBER, NemoConfig
from loraswarm.adapters.plan import PREFIX
from loraswarm.adapters.printable import quoted
from loraswarm.adapters.stored_tensor import RowBlocks, SideBySide, StoredTensor, TensorEntry
from loraswarm.core.base_shape import ATTENTION_TARGETS
from loraswarm.errors import AdapterError

_NAME = re.compile(
    r"model\.(?:module\.)?decoder\.layers\.(?P<layer>[0-9]{1,6})\."
    r"(?P<block>self_attention|mlp)\.adapter_layer\."
    r"(?P<adapter>[a-z0-9_]+(?:\.[a-z]+_adapter)?)\.(?P<side>linear_in|linear_out)\.weight"
)
_QKV = "lora_kqv_adapter"
_FC1 = "lora_hto4h_adapter"
_TARGETS: Mapping[str, tuple[str, ...]] = {
    _QKV: ("q_proj", "k_proj", "v_proj"),
    "lora_unfused_kqv_adapter.q_adapter": ("q_proj",),
    "lora_unfused_kqv_adapter.k_adapter": ("k_proj",),
    "lora_unfused_kqv_adapter.v_adapter": ("v_proj",),
    "lora_dense_attention_adapter": ("o_proj",),
    _FC1: ("gate_proj", "up_proj"),
    "lora_unfused_hto4h_adapter.gate_adapter": ("gate_proj",),
    "lora_unfused_hto4h_adapter.up_adapter": ("up_proj",),
    "lora_4htoh_adapter": ("down_proj",),
}
# The base's linear is cut by columns of its input there, and with it the adapter's linear_in.
_ROW_PARALLEL = ("lora_dense_attention_adapter", "lora_4htoh_adapter")
_REFUSED = {
    "lora_moe_": "adapters of experts are not supported",
    "lora_q_adapter": "adapters of cross attention are not supported",
    "lora_kv_adapter": "adapters of cross attention are not supported",
}
_SIDES = {"linear_in": "lora_A", "linear_out": "lora_B"}

Shards = Sequence[Mapping[str, TensorEntry]]
"""The tensors of each tensor-parallel rank of one pipeline stage, by NeMo's names."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One adapter's tensor: the shard of every rank."""

    name: str
    adapter: str
    side: str
    shards: tuple[TensorEntry, ...]
    label: str

    def error(self, problem: str) -> AdapterError:
        return AdapterError(f"{self.label}: tensor {quoted(self.name)} {problem}")


def to_peft(config: NemoConfig, stages: Sequence[Shards], label: str) -> dict[str, StoredTensor]:
    """Every tensor under PEFT's name; layers of pipeline stages follow each other.

    Raises    AdapterError naming `label` and the tensor that is none of LoRA's, is missing on a
              rank, or has a shape that the config cannot explain.
    """
    tensors: dict[str, StoredTensor] = {}
    stage_layers = (config.num_layers or 0) // len(stages)
    for index, shards in enumerate(stages):
        _check_ranks(shards, label)
        for name in shards[0]:
            match = _match(name, label)
            layer = int(match["layer"])
            if len(stages) > 1 and layer >= stage_layers:
                raise AdapterError(
                    f"{label}: tensor {quoted(name)} of pipeline stage {index} is of layer {layer};"
                    f" a stage has {stage_layers}"
                )
            entries = tuple(rank[name] for rank in shards)
            piece = _Piece(name, match["adapter"], match["side"], entries, label)
            for target, tensor in _split(piece, config):
                peft_name = _peft_name(layer + index * stage_layers, target, piece.side)
                if peft_name in tensors:
                    raise piece.error(f"is a second adapter of {target} in the same layer")
                tensors[peft_name] = tensor
    return tensors


def _match(name: str, label: str) -> re.Match[str]:
    match = _NAME.fullmatch(name)
    for part, reason in _REFUSED.items():
        if part in name:
            raise AdapterError(f"{label}: tensor {quoted(name)}: {reason}")
    if match is not None and match["adapter"] in _TARGETS:
        is_attention = _TARGETS[match["adapter"]][0] in ATTENTION_TARGETS
        if is_attention == (match["block"] == "self_attention"):
            return match
    raise AdapterError(f"{label}: tensor {quoted(name)} is none of a NeMo LoRA adapter's")


def _check_ranks(shards: Shards, label: str) -> None:
    for rank, tensors in enumerate(shards):
        for name in sorted(tensors.keys() ^ shards[0].keys()):
            place = "only there" if name in tensors else "missing there"
            raise AdapterError(
                f"{label}: tensor {quoted(name)} differs between ranks; rank {rank}: {place}"
            )


def _peft_name(layer: int, target: str, side: str) -> str:
    block = "self_attn" if target in ATTENTION_TARGETS else "mlp"
    return f"{PREFIX}model.layers.{layer}.{block}.{target}.{_SIDES[side]}.weight"


def _split(piece: _Piece, config: NemoConfig) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of each target.

    What each of N ranks holds    linear_in                          linear_out
    qkv, hto4h                    rows [R / N, I]                    rows [O / N, R]
    dense, 4htoh                  columns [R, I / N]                 rows [O / N, R]
    """
    first = piece.shards[0]
    if any(shard[:2] != first[:2] for shard in piece.shards):
        raise piece.error("differs in shape or dtype between ranks")
    if len(first.shape) != 2:
        raise piece.error(f"has shape {list(first.shape)}; a matrix is expected")
    num_rows, num_columns = first.shape
    targets = _TARGETS[piece.adapter]
    if piece.side == "linear_in" and piece.adapter in _ROW_PARALLEL and len(piece.shards) > 1:
        shape = (num_rows, num_columns * len(piece.shards))
        yield targets[0], SideBySide(first.dtype, shape, piece.shards)
        return
    for target in targets:
        blocks: tuple[tuple[int, int], ...] = ((0, num_rows),)
        if piece.side == "linear_out" and len(targets) > 1:
            blocks = _rows_of(target, piece, config)
        num_kept = sum(count for _, count in blocks) * len(piece.shards)
        yield target, RowBlocks(first.dtype, (num_kept, num_columns), piece.shards, blocks)


def _rows_of(target: str, piece: _Piece, config: NemoConfig) -> tuple[tuple[int, int], ...]:
    """Where the rows of one target are in each rank's part of a fused linear_out.

    lora_hto4h_adapter    | gate | up |
    lora_kqv_adapter      | q of group 0 | k 0 | v 0 | q of group 1 | k 1 | v 1 | ...
    """
    num_rows = piece.shards[0].shape[0]
    if piece.adapter == _FC1:
        if num_rows % 2:
            raise piece.error(f"has {num_rows} rows; gate and up have equally many")
        half = num_rows // 2
        return ((0, half),) if target == "gate_proj" else ((half, half),)
    if config.heads is None:
        raise piece.error(f"is fused; {CONFIG_MEMBER} lacks num_attention_heads to cut it")
    heads, groups, channels = config.heads
    group_rows = (heads // groups + 2) * channels
    num_groups = groups // config.tensor_parallel
    if num_rows != num_groups * group_rows:
        raise piece.error(
            f"has {num_rows} rows; {CONFIG_MEMBER} calls for {num_groups * group_rows}: {heads}"
            f" heads of {channels} channels in {groups} groups, on {len(piece.shards)} ranks"
        )
    first, count = {
        "q_proj": (0, group_rows - 2 * channels),
        "k_proj": (group_rows - 2 * channels, channels),
        "v_proj": (group_rows - channels, channels),
    }[target]
    return tuple((group * group_rows + first, count) for group in range(num_groups))
