"""LoKr: a Kronecker product, as one product of the rank that its factors have.

Knows its config keys and tensor names. Called through adapters/methods.
Source    peft 0.21: tuners/lokr (Edalati et al. 2022, KronA; Yeh et al. 2023, LyCORIS).
Legend: R rank of the expanded product, I in features, O out features, M N sizes of a factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import (
    check_rank,
    plan_low_rank,
    read_saved,
    tensor_name,
)
from loraswarm.adapters.module_selection import ModuleSelection, Patterns
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape

if TYPE_CHECKING:
    from torch import Tensor

    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = SELECTION_KEYS | {
    "r",
    "alpha",
    "rank_pattern",
    "alpha_pattern",
    "decompose_both",
    "decompose_factor",
}
# About training, or about convolutions.
INERT_KEYS = frozenset(
    {
        "init_weights",
        "module_dropout",
        "rank_dropout",
        "rank_dropout_scale",
        "use_effective_conv2d",
    }
)


class Factor(NamedTuple):
    """One side of the Kronecker product, [out_size, in_size]: whole, or a product of `rank`."""

    out_size: int
    in_size: int
    rank: int | None

    @property
    def least_rank(self) -> int:
        """The rank that a product takes to be this factor, whatever its values."""
        sizes = (self.out_size, self.in_size)
        return min(sizes if self.rank is None else (*sizes, self.rank))

    def tensor_shapes(self, suffix: str) -> dict[str, tuple[int, ...]]:
        """Of `.lokr_w1` or `.lokr_w2`, or its two parts."""
        if self.rank is None:
            return {suffix: (self.out_size, self.in_size)}
        return {
            f"{suffix}_a": (self.out_size, self.rank),
            f"{suffix}_b": (self.rank, self.in_size),
        }


@dataclass(frozen=True, slots=True)
class LokrConfig:
    """delta W = alpha / r * kron(w1, w2), either factor whole or itself a product of rank r."""

    selection: ModuleSelection
    rank: int
    alpha: float
    rank_patterns: Patterns[int]
    alpha_patterns: Patterns[float]
    decomposes_both: bool
    decompose_factor: int

    @property
    def method(self) -> str:
        return "lokr"

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`."""
        first, second = self.factors(path, *shape.site_sizes(site))
        rank = first.least_rank * second.least_rank
        check_rank(self.method, path, rank, shape, site)
        found = self.alpha_patterns.find(path)
        alpha = self.alpha if found is None else found[1]
        return ModuleInfo(site, rank, alpha / self._rank_of(path))

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        first, second = self.factors(path, in_size, out_size)
        return {**first.tensor_shapes(".lokr_w1"), **second.tensor_shapes(".lokr_w2")}

    def factors(self, path: str, in_size: int, out_size: int) -> tuple[Factor, Factor]:
        """w1 and w2 of a module; PEFT factors those that r is small for."""
        rank = self._rank_of(path)
        small_in, large_in = split_size(in_size, self.decompose_factor)
        small_out, large_out = split_size(out_size, self.decompose_factor)
        is_first_whole = not self.decomposes_both or 2 * rank >= max(small_out, small_in)
        is_second_whole = 2 * rank >= max(large_out, large_in)
        return (
            Factor(small_out, small_in, None if is_first_whole else rank),
            Factor(large_out, large_in, None if is_second_whole else rank),
        )

    def _rank_of(self, path: str) -> int:
        found = self.rank_patterns.find(path)
        return self.rank if found is None else found[1]


class Lokr:
    """`Method` of peft_type LOKR."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        return plan_low_rank(parse_lokr_config(keys), shape)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        config, shape = parse_lokr_config(keys), base.shape
        modules = []
        for module in plan.modules:
            path = shape.site_path(module.site)
            factors = config.factors(path, *shape.site_sizes(module.site))
            modules.append(_read_module(module, path, factors, tensors))
        return AdapterWeights(tuple(modules), read_saved(plan, tensors, base))


def parse_lokr_config(keys: ConfigKeys) -> LokrConfig:
    """Check every key; absent ones have PEFT's defaults.

    Raises    AdapterError naming the key, its value and what to do.
    """
    keys.check(READ_KEYS, INERT_KEYS, {})
    factor = keys.get("decompose_factor", -1)
    if type(factor) is not int:
        raise keys.refusal("decompose_factor", "it must be a whole number")
    return LokrConfig(
        selection=keys.selection(),
        rank=keys.rank("r", 8),
        alpha=keys.number("alpha", 8),
        rank_patterns=keys.rank_patterns("rank_pattern"),
        alpha_patterns=keys.number_patterns("alpha_pattern"),
        decomposes_both=keys.flag("decompose_both"),
        decompose_factor=factor,
    )


def split_size(size: int, factor: int) -> tuple[int, int]:
    """A number as the product of two, as PEFT splits it.

    `factor` itself and the rest if it divides `size`, else the largest divisor up to `factor` that
    is the smaller of the two; -1: as near the square root as can be.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size)
    if factor != -1:
        limit = max(1, min(limit, factor))
    small = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return small, size // small


def _read_module(
    module: ModuleInfo, path: str, factors: tuple[Factor, Factor], tensors: TensorReader
) -> ModuleWeights:
    """kron(X1 Y1, X2 Y2) = kron(X1, X2) kron(Y1, Y2)."""
    import torch

    first_name, second_name = tensor_name(path, ".lokr_w1"), tensor_name(path, ".lokr_w2")
    first_left, first_right = _read_factor(factors[0], first_name, tensors)
    second_left, second_right = _read_factor(factors[1], second_name, tensors)
    # torch.kron cannot view every transposed factor.
    left_RO = torch.kron(first_left.t().contiguous(), second_left.t().contiguous())
    a_RI = tensors.fit(first_name, torch.kron(first_right, second_right))
    return ModuleWeights(module, a_RI, tensors.fit(second_name, left_RO))


def _read_factor(factor: Factor, name: str, tensors: TensorReader) -> tuple[Tensor, Tensor]:
    """The factor as a product X Y of its least rank, in float32: X [M, rank], Y [rank, N]."""
    import torch

    if factor.rank is None:
        whole_MN = tensors.wide(name)
    else:
        left, right = tensors.wide(f"{name}_a"), tensors.wide(f"{name}_b")
        if factor.rank == factor.least_rank:
            return left, right
        whole_MN = left @ right
    identity = torch.eye(factor.least_rank)
    if factor.out_size <= factor.in_size:
        return identity, whole_MN
    return whole_MN, identity
