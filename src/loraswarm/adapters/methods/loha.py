"""LoHa: the elementwise product of two low-rank products, as one product of rank r * r.

Knows its config keys and tensor names. Called through adapters/methods.
Source    peft 0.21: tuners/loha (Hyeon-Woo et al. 2021, FedPara; LyCORIS).
Legend: R rank of the expanded product, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import (
    check_rank,
    plan_low_rank,
    read_low_rank,
    row_products,
    tensor_name,
)
from loraswarm.adapters.module_selection import ModuleSelection, Patterns
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = SELECTION_KEYS | {"r", "alpha", "rank_pattern", "alpha_pattern"}
# About training, or about convolutions.
INERT_KEYS = frozenset({"init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"})


@dataclass(frozen=True, slots=True)
class LohaConfig:
    """delta W = alpha / r * (w1_a w1_b) o (w2_a w2_b), each factor of rank r."""

    selection: ModuleSelection
    rank: int
    alpha: float
    rank_patterns: Patterns[int]
    alpha_patterns: Patterns[float]

    @property
    def method(self) -> str:
        return "loha"

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`."""
        rank = self._rank_of(path)
        found = self.alpha_patterns.find(path)
        alpha = self.alpha if found is None else found[1]
        check_rank(self.method, path, rank * rank, shape, site)
        return ModuleInfo(site, rank * rank, alpha / rank)

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        rank = self._rank_of(path)
        return {
            f".hada_w{index}_{side}": sizes
            for index in (1, 2)
            for side, sizes in (("a", (out_size, rank)), ("b", (rank, in_size)))
        }

    def _rank_of(self, path: str) -> int:
        found = self.rank_patterns.find(path)
        return self.rank if found is None else found[1]


class Loha:
    """`Method` of peft_type LOHA."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        keys.check(READ_KEYS, INERT_KEYS, {})
        config = LohaConfig(
            selection=keys.selection(),
            rank=keys.rank("r", 8),
            alpha=keys.number("alpha", 8),
            rank_patterns=keys.rank_patterns("rank_pattern"),
            alpha_patterns=keys.number_patterns("alpha_pattern"),
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
    names_a = [tensor_name(path, f".hada_w{index}_a") for index in (1, 2)]
    names_b = [tensor_name(path, f".hada_w{index}_b") for index in (1, 2)]
    w1_a, w2_a = (tensors.wide(name) for name in names_a)
    w1_b, w2_b = (tensors.wide(name) for name in names_b)
    a_RI = tensors.fit(names_b[0], row_products(w1_b, w2_b))
    bt_RO = tensors.fit(names_a[0], row_products(w1_a.t(), w2_a.t()))
    return ModuleWeights(module, a_RI, bt_RO)
