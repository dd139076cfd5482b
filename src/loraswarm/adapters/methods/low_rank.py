"""What the methods share whose update is an exact B A of their own making.

Owns the choice of linears, the modules that are replaced as a whole beside them, the limit on ranks
and the products that expand small factors. Knows no method's tensor names. Called by most methods.
Legend: P Q ranks of factors, N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, ConfigKeys
from loraswarm.adapters.methods.lora_overlays import (
    TABLES,
    check_copies,
    one_role_each,
    read_replacement,
    saved_paths,
    table_copies,
    whole_module,
)
from loraswarm.adapters.module_selection import ModuleSelection
from loraswarm.adapters.plan import PREFIX, AdapterPlan, AdapterWeights
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, TARGETS, BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from loraswarm.adapters.tensors import TensorReader

CONVERT = "convert the adapter with PEFT's save_as_lora, or merge it with merge_and_unload"


class LowRankConfig(Protocol):
    """A method's checked config: hashable, so that equal ones share a plan."""

    @property
    def method(self) -> str: ...

    @property
    def selection(self) -> ModuleSelection: ...

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """The module at `site`. Raises AdapterError if it cannot be applied exactly."""
        ...

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the module's tensors by the last part of their names, e.g. `.miss_block`."""
        ...


@lru_cache(maxsize=256)
def plan_low_rank(config: LowRankConfig, shape: BaseShape) -> AdapterPlan:
    """The plan of a config: a few milliseconds for a new one, nothing for one seen before.

    Where the lm_head is adapted, PEFT saves a copy of its weight, which need not be there.
    """
    if config.selection.selects(EMBEDDING):
        raise AdapterError(
            f"{CONFIG_FILE}: target_modules selects {EMBEDDING!r}, which {config.method} cannot"
            f" adapt; name linears only: {', '.join(TARGETS)}, {LM_HEAD}"
        )
    sites = [*range(shape.num_linears), shape.head_site]
    modules: list[ModuleInfo] = []
    paths: list[str] = []
    tensor_shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        path = shape.site_path(site)
        if not config.selection.selects(path):
            continue
        paths.append(path)
        modules.append(config.module(site, path, shape))
        for suffix, sizes in config.tensor_shapes(path, *shape.site_sizes(site)).items():
            tensor_shapes[tensor_name(path, suffix)] = sizes
    if not modules:
        raise AdapterError(
            f"{CONFIG_FILE}: target_modules selects no linear of the base"
            f" ({shape.num_layers} layers of {', '.join(TARGETS)}; {LM_HEAD})"
        )
    saved = saved_paths(config.selection.replaced, shape)
    one_role_each({"target_modules": paths, "modules_to_save": saved})
    replacements = [whole_module((path,), ".weight", shape) for path in saved]
    tensor_shapes |= {name: found.shape for found in replacements for name in found.names}
    suffixes = {
        path: ".base_layer.weight" if path in paths else ".weight"
        for path in TABLES
        if path not in saved
    }
    return AdapterPlan(
        config.method,
        tuple(modules),
        tensor_shapes,
        overlays=tuple(found.info for found in replacements),
        copies=table_copies(shape, suffixes),
    )


def read_low_rank(
    plan: AdapterPlan,
    tensors: TensorReader,
    base: BaseWeights,
    read_module: Callable[[ModuleInfo, str], ModuleWeights],
) -> AdapterWeights:
    """The weights of a plan of `plan_low_rank`, each module's as `read_module(module, path)`."""
    modules = [read_module(module, base.shape.site_path(module.site)) for module in plan.modules]
    return AdapterWeights(tuple(modules), read_saved(plan, tensors, base))


def read_saved(plan: AdapterPlan, tensors: TensorReader, base: BaseWeights) -> tuple[Tensor, ...]:
    """The overlays of a plan of `plan_low_rank`: modules_to_save.

    Raises    AdapterError naming a copy of a base weight that is not this base's.
    """
    check_copies([name for name in plan.copies if tensors.has(name)], tensors, base)
    return tuple(
        read_replacement(whole_module(info.paths, ".weight", base.shape), tensors)
        for info in plan.overlays
    )


def tensor_name(path: str, suffix: str) -> str:
    """The name PEFT saves a tensor of the module at `path` under."""
    return PREFIX + path + suffix


def refuse_bias(keys: ConfigKeys) -> None:
    """Refuse trained biases."""
    if keys.get("bias", "none") != "none":
        raise keys.refusal(
            "bias",
            "trained biases are applied with LoRA only; train with 'none', or merge the adapter"
            " into a base of its own with PEFT's merge_and_unload",
        )


def check_rank(method: str, path: str, rank: int, shape: BaseShape, site: int) -> None:
    """Refuse a module whose B A would be larger than the weight itself.

    Raises    AdapterError naming the module, the rank and what to do instead.
    """
    in_size, out_size = shape.site_sizes(site)
    if rank * (in_size + out_size) <= in_size * out_size:
        return
    limit = in_size * out_size // (in_size + out_size)
    raise AdapterError(
        f"{CONFIG_FILE}: as {method}, {path!r} has an update of rank {rank}; up to {limit} can be"
        f" applied to its {out_size} x {in_size} weight; train with a smaller r, {CONVERT}"
    )


def row_products(first_PN: Tensor, second_QN: Tensor) -> Tensor:
    """Every row of one matrix times every row of the other, elementwise: [P * Q, N].

    Semantics    (X1 Y1) o (X2 Y2) = row_products(X1^T, X2^T)^T row_products(Y1, Y2)
    Source       the Khatri-Rao product; mixed products of Hadamard and matrix products.
    """
    return (first_PN[:, None, :] * second_QN[None, :, :]).flatten(0, 1)
