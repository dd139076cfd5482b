"""MiSS: every column of the input joins one of r sums, and one trained block maps the sums.

The A that sums is fixed, so that all modules and adapters of one r share it. Knows its config keys
and tensor names. Called through adapters/methods.
Source    peft 0.21: tuners/miss (Kang and Yin 2024; formerly Bone).
Legend: R rank, I in features, O out features, W columns of the shared A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights, SharedMatrix
from loraswarm.adapters.config_keys import CONFIG_FILE, SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import (
    check_rank,
    plan_low_rank,
    read_saved,
    refuse_bias,
    tensor_name,
)
from loraswarm.adapters.module_selection import ModuleSelection
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = SELECTION_KEYS | {"r", "mini_r", "init_weights", "bias"}
INERT_KEYS = frozenset({"miss_dropout"})


@dataclass(frozen=True, slots=True)
class MissConfig:
    """delta W = B A, A[j % r, j] = 1; B is the block, repeated if it has `mini_rank` columns."""

    selection: ModuleSelection
    rank: int
    mini_rank: int | None

    @property
    def method(self) -> str:
        return "miss"

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`."""
        in_size, out_size = shape.site_sizes(site)
        if self.rank > in_size:
            raise AdapterError(
                f"{CONFIG_FILE}: r is {self.rank}: {path!r} has {in_size} inputs, and MiSS takes no"
                " larger r; the adapter belongs to another base model"
            )
        if self.mini_rank is not None and out_size % self.mini_rank != 0:
            raise AdapterError(
                f"{CONFIG_FILE}: mini_r is {self.mini_rank}: it does not divide the {out_size}"
                f" outputs of {path!r}; the adapter belongs to another base model"
            )
        if self.mini_rank is not None:
            # A few columns may stand for a matrix.
            check_rank(self.method, path, self.rank, shape, site)
        return ModuleInfo(site, self.rank, 1.0, shared_a=sums_of(self.rank, shape))

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        columns = out_size if self.mini_rank is None else self.mini_rank
        return {".miss_block": (self.rank, columns)}


class Miss:
    """`Method` of peft_type MISS."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        return plan_low_rank(_parse_config(keys), shape)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        modules = []
        for module in plan.modules:
            name = tensor_name(base.shape.site_path(module.site), ".miss_block")
            block = tensors.cast(name)
            _, out_size = base.shape.site_sizes(module.site)
            bt_RO = block.repeat(1, out_size // block.shape[1])
            modules.append(ModuleWeights(module, None, bt_RO))
        shared = plan.modules[0].shared_a
        assert shared is not None
        return AdapterWeights(
            tuple(modules),
            read_saved(plan, tensors, base),
            {shared.digest: _read_sums(shared, tensors)},
        )


def sums_of(rank: int, shape: BaseShape) -> SharedMatrix:
    """The A of every module of a rank: wide enough for any linear, determined by its sizes."""
    width = max(in_size for in_size, _ in shape.target_sizes)
    return SharedMatrix(f"miss-{rank}-{width}", rank, width)


def _read_sums(shared: SharedMatrix, tensors: TensorReader) -> Tensor:
    import torch

    a_RW = torch.zeros(shared.num_rows, shared.width, dtype=tensors.dtype)
    columns_W = torch.arange(shared.width)
    a_RW[columns_W % shared.num_rows, columns_W] = 1
    return a_RW


def _parse_config(keys: ConfigKeys) -> MissConfig:
    keys.check(READ_KEYS, INERT_KEYS, {})
    refuse_bias(keys)
    init = keys.get("init_weights", True)
    if init == "bat":
        raise keys.refusal(
            "init_weights",
            "its update multiplies the base's weight and has full rank; train with true or 'mini',"
            " or merge the adapter into a base of its own with PEFT's merge_and_unload",
        )
    if init != "mini" and not isinstance(init, bool):
        raise keys.refusal("init_weights", "it must be true, false or 'mini'")
    return MissConfig(
        selection=keys.selection(),
        rank=keys.rank("r", 64),
        mini_rank=keys.rank("mini_r", 1) if init == "mini" else None,
    )
