"""GraLoRA: LoRA block by block over a grid of the weight, as one product of rank k * r.

Knows its config keys and tensor names. Called through adapters/methods.
Source    peft 0.21: tuners/gralora (Jung et al. 2025, arXiv 2505.20355).
Legend: R rank of the expanded product, I in features, O out features, K blocks a side, S ranks of
a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import (
    check_rank,
    plan_low_rank,
    read_low_rank,
    refuse_bias,
    tensor_name,
)
from loraswarm.adapters.module_selection import ModuleSelection
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = SELECTION_KEYS | {"r", "hybrid_r", "alpha", "gralora_k", "bias"}
# PEFT sets fan_in_fan_out to false for linears that store [out, in].
INERT_KEYS = frozenset({"fan_in_fan_out", "gralora_dropout", "init_weights"})


@dataclass(frozen=True, slots=True)
class GraloraConfig:
    """Every block of a grid of `num_blocks` a side has rank `rank / num_blocks` of its own;
    `hybrid_rank` ranks are plain LoRA over the whole weight."""

    selection: ModuleSelection
    rank: int
    hybrid_rank: int
    num_blocks: int
    alpha: float

    @property
    def method(self) -> str:
        return "gralora"

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`."""
        for size in shape.site_sizes(site):
            if size % self.num_blocks != 0:
                raise AdapterError(
                    f"{CONFIG_FILE}: gralora_k is {self.num_blocks}: it does not divide size"
                    f" {size} of {path!r}; the adapter belongs to another base model"
                )
        rank = self.num_blocks * self.rank + self.hybrid_rank
        check_rank(self.method, path, rank, shape, site)
        return ModuleInfo(site, rank, self.alpha / (self.rank + self.hybrid_rank))

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        shapes: dict[str, tuple[int, ...]] = {
            ".gralora_A": (self.num_blocks, in_size // self.num_blocks, self.rank),
            ".gralora_B": (self.num_blocks, self.rank, out_size // self.num_blocks),
        }
        if self.hybrid_rank > 0:
            shapes[".gralora_A_general.weight"] = (self.hybrid_rank, in_size)
            shapes[".gralora_B_general.weight"] = (out_size, self.hybrid_rank)
        return shapes


class Gralora:
    """`Method` of peft_type GRALORA."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        return plan_low_rank(_parse_config(keys), shape)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        config = _parse_config(keys)
        return read_low_rank(
            plan, tensors, base, lambda module, path: _read_module(module, path, config, tensors)
        )


def _parse_config(keys: ConfigKeys) -> GraloraConfig:
    keys.check(READ_KEYS, INERT_KEYS, {})
    refuse_bias(keys)
    rank, num_blocks = keys.rank("r", 32), keys.rank("gralora_k", 2)
    if rank % num_blocks != 0:
        raise keys.refusal("gralora_k", f"it must divide r, which is {rank}")
    return GraloraConfig(
        selection=keys.selection(),
        rank=rank,
        hybrid_rank=keys.rank("hybrid_r", 0) if keys.get("hybrid_r", 0) != 0 else 0,
        num_blocks=num_blocks,
        alpha=keys.number("alpha", 64),
    )


def _read_module(
    module: ModuleInfo, path: str, config: GraloraConfig, tensors: TensorReader
) -> ModuleWeights:
    """One rank for each (block row, block column, rank of the block); zero outside its block.

              block column n                          block row j
    A   0 0 | A[n, :, j * S + s] | 0 0       Bt   0 0 | B[j, n * S + s, :] | 0 0
    """
    import torch

    name_a, name_b = tensor_name(path, ".gralora_A"), tensor_name(path, ".gralora_B")
    parts_a, parts_b = tensors.cast(name_a), tensors.cast(name_b)
    count, ranks = config.num_blocks, config.rank // config.num_blocks
    num_block_ranks = count * config.rank
    a = parts_a.new_zeros(count, count, ranks, count, parts_a.shape[1])
    bt = parts_b.new_zeros(count, count, ranks, count, parts_b.shape[2])
    for column in range(count):
        a[:, column, :, column] = parts_a[column].t().reshape(count, ranks, -1)
    for row in range(count):
        bt[row, :, :, row] = parts_b[row].reshape(count, ranks, -1)
    a_RI, bt_RO = a.reshape(num_block_ranks, -1), bt.reshape(num_block_ranks, -1)
    if config.hybrid_rank > 0:
        whole_a = tensors.cast(tensor_name(path, ".gralora_A_general.weight"))
        whole_b = tensors.cast(tensor_name(path, ".gralora_B_general.weight"))
        a_RI, bt_RO = torch.cat([a_RI, whole_a]), torch.cat([bt_RO, whole_b.t()])
    return ModuleWeights(module, a_RI, bt_RO)
