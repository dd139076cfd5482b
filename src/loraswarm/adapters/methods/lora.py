"""LoRA as PEFT saves it, and its variants.

Knows tensor names and what a config means for them. Called through adapters/methods.
Legend: R rank, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, ConfigKeys
from loraswarm.adapters.methods.lora_config import LoraConfig, parse_lora_config
from loraswarm.adapters.plan import PREFIX, AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource, TensorSpec
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, TARGETS, BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


class Lora:
    """`Method` of peft_type LORA."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        config = parse_lora_config(keys)
        plan = _plan(config, shape)
        _check_ranks(plan, config, shape, source)
        return plan

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        return AdapterWeights(
            tuple(
                _read_module(module, base.shape.site_path(module.site), tensors)
                for module in plan.modules
            )
        )


def tensor_names(path: str) -> tuple[str, str]:
    """Names of A [rank, in] and B [out, rank] of the linear at `path`, as PEFT saves them."""
    return PREFIX + path + _SUFFIXES[0], PREFIX + path + _SUFFIXES[1]


@lru_cache(maxsize=256)
def _plan(config: LoraConfig, shape: BaseShape) -> AdapterPlan:
    """A few milliseconds for a new config; nothing for one seen before."""
    for path in (EMBEDDING, LM_HEAD):
        if config.selection.selects(path):
            raise AdapterError(
                f"{CONFIG_FILE}: target_modules selects {path!r}, which cannot be adapted yet;"
                f" linears that can: {', '.join(TARGETS)}"
            )
    modules = []
    for site in range(shape.num_linears):
        path = shape.site_path(site)
        if config.selection.selects(path):
            modules.append(ModuleInfo(site, config.rank_of(path), config.scale_of(path)))
    if not modules:
        raise AdapterError(
            f"{CONFIG_FILE}: target_modules selects no linear of the base"
            f" ({shape.num_layers} layers of {', '.join(TARGETS)})"
        )
    return AdapterPlan(config.method, tuple(modules), _tensor_shapes(modules, shape))


def _tensor_shapes(modules: list[ModuleInfo], shape: BaseShape) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        in_size, out_size = shape.site_sizes(module.site)
        name_a, name_b = tensor_names(shape.site_path(module.site))
        shapes[name_a] = (module.rank, in_size)
        shapes[name_b] = (out_size, module.rank)
    return shapes


def _check_ranks(
    plan: AdapterPlan, config: LoraConfig, shape: BaseShape, source: AdapterSource
) -> None:
    """Another rank than the config's, or another base's sizes, get a message of their own."""
    found = source.tensors
    if _shapes(found) == plan.tensor_shapes:
        return
    for module in plan.modules:
        path = shape.site_path(module.site)
        in_size, out_size = shape.site_sizes(module.site)
        name_a, name_b = tensor_names(path)
        if name_a not in found or name_b not in found:
            continue
        shape_a, shape_b = found[name_a].shape, found[name_b].shape
        if len(shape_a) != 2 or shape_a[1] != in_size:
            raise _shape_error(source, name_a, shape_a, f"[rank, {in_size}]")
        if len(shape_b) != 2 or shape_b[0] != out_size:
            raise _shape_error(source, name_b, shape_b, f"[{out_size}, rank]")
        for name, rank in ((name_a, shape_a[0]), (name_b, shape_b[1])):
            if rank != module.rank:
                raise AdapterError(
                    f"{source.label}: tensor {name!r} has rank {rank},"
                    f" but {config.rank_source(path)} in {CONFIG_FILE} is {module.rank}"
                )


def _shapes(tensors: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in tensors.items()}


def _shape_error(
    source: AdapterSource, name: str, found: tuple[int, ...], expected: str
) -> AdapterError:
    return AdapterError(
        f"{source.label}: tensor {name!r} has shape {list(found)}; this base needs {expected}."
        " The adapter belongs to another base model"
    )


def _read_module(module: ModuleInfo, path: str, tensors: TensorReader) -> ModuleWeights:
    name_a, name_b = tensor_names(path)
    a_RI, b_OR = tensors.cast(name_a), tensors.cast(name_b)
    return ModuleWeights(module, a_RI, b_OR.t().contiguous())
