"""DeLoRA: LoRA with ranks of unit length and one trained bound, for inputs scaled by the base.

Knows its config keys and tensor names. Called through adapters/methods.
Source    peft 0.21: tuners/delora (Bini et al. 2025, arXiv 2503.18225).
Legend: R rank, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import (
    plan_low_rank,
    read_low_rank,
    refuse_bias,
    tensor_name,
)
from loraswarm.adapters.module_selection import ModuleSelection, Patterns
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = SELECTION_KEYS | {"r", "rank_pattern", "bias"}
# About training; the bound that was trained from delora_lambda on is a tensor.
INERT_KEYS = frozenset({"delora_lambda", "init_weights", "lambda_pattern", "module_dropout"})
_LEAST_NORM = 1e-4


@dataclass(frozen=True, slots=True)
class DeloraConfig:
    """delta W = B diag(lambda / (r |A_i| |B_i|)) A diag(w_norm); rows A_i, columns B_i."""

    selection: ModuleSelection
    rank: int
    rank_patterns: Patterns[int]

    @property
    def method(self) -> str:
        return "delora"

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`."""
        rank = self._rank_of(path)
        return ModuleInfo(site, rank, 1 / rank)

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        rank = self._rank_of(path)
        return {
            ".delora_A": (rank, in_size),
            ".delora_B": (out_size, rank),
            ".delora_lambda": (1,),
            ".delora_w_norm": (in_size,),
        }

    def _rank_of(self, path: str) -> int:
        found = self.rank_patterns.find(path)
        return self.rank if found is None else found[1]


class Delora:
    """`Method` of peft_type DELORA."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        keys.check(READ_KEYS, INERT_KEYS, {})
        refuse_bias(keys)
        config = DeloraConfig(
            keys.selection(), keys.rank("r", 8), keys.rank_patterns("rank_pattern")
        )
        return plan_low_rank(config, shape)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        return read_low_rank(
            plan, tensors, base, lambda module, path: _read_module(module, path, tensors)
        )


def _read_module(module: ModuleInfo, path: str, tensors: TensorReader) -> ModuleWeights:
    """Rows of A and of Bt at their unit lengths, w_norm in A and lambda in Bt.

    Norms are clamped as PEFT clamps them, so that a row of zeros stays one.
    """
    name_a, name_b = tensor_name(path, ".delora_A"), tensor_name(path, ".delora_B")
    a_RI, bt_RO = tensors.wide(name_a), tensors.wide(name_b).t()
    norms_a = a_RI.norm(dim=1, keepdim=True).clamp(min=_LEAST_NORM)
    norms_b = bt_RO.norm(dim=1, keepdim=True).clamp(min=_LEAST_NORM)
    weight_norms_I = tensors.wide(tensor_name(path, ".delora_w_norm"))
    bound = tensors.wide(tensor_name(path, ".delora_lambda"))
    return ModuleWeights(
        module,
        tensors.fit(name_a, a_RI / norms_a * weight_norms_I),
        tensors.fit(name_b, bt_RO / norms_b * bound),
    )
