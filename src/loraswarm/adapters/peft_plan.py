"""What a config promises against what the weights file holds: the same tensors, or a named refusal.

A plan is derived from config and base alone, and is shared by all adapters of one recipe. Knows
tensor names and shapes, never values. Called by adapters/peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from loraswarm.adapters.adapter import ModuleInfo
from loraswarm.adapters.peft_config import CONFIG_FILE, PeftLoraConfig
from loraswarm.adapters.safetensors_header import WEIGHTS_FILE, TensorEntry
from loraswarm.core.base_shape import TARGETS, BaseShape, module_path
from loraswarm.errors import AdapterError

FLOAT_DTYPES = ("F32", "F16", "BF16")
UNSUPPORTED_TARGETS = ("lm_head", "model.embed_tokens")
_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The modules a config adapts, sorted by site, and the shape of every tensor that takes."""

    modules: tuple[ModuleInfo, ...]
    tensor_shapes: Mapping[str, tuple[int, int]]


def tensor_names(site: int) -> tuple[str, str]:
    """Names of A [rank, in] and B [out, rank] of the linear at `site`, as PEFT saves them."""
    path = _PREFIX + module_path(*divmod(site, len(TARGETS)))
    return path + _SUFFIXES[0], path + _SUFFIXES[1]


@lru_cache(maxsize=256)
def plan_adapter(config: PeftLoraConfig, shape: BaseShape) -> AdapterPlan:
    """Which linears of the base the config adapts, with rank and scale.

    Cost      a few milliseconds for a new config; nothing for one seen before.
    Raises    AdapterError if it selects no linear, or a module that cannot be adapted.
    """
    for path in UNSUPPORTED_TARGETS:
        if config.selection.selects(path):
            raise AdapterError(
                f"{CONFIG_FILE}: target_modules selects {path!r}, which cannot be adapted yet;"
                f" linears that can: {', '.join(TARGETS)}"
            )
    modules = []
    for site in range(shape.num_sites()):
        path = module_path(*divmod(site, len(TARGETS)))
        if config.selection.selects(path):
            modules.append(ModuleInfo(site, config.rank_of(path), config.scale_of(path)))
    if not modules:
        raise AdapterError(
            f"{CONFIG_FILE}: target_modules selects no linear of the base"
            f" ({shape.num_layers} layers of {', '.join(TARGETS)})"
        )
    return AdapterPlan(tuple(modules), _tensor_shapes(modules, shape))


def _tensor_shapes(modules: list[ModuleInfo], shape: BaseShape) -> dict[str, tuple[int, int]]:
    shapes = {}
    for module in modules:
        in_size, out_size = shape.target_sizes[module.target]
        name_a, name_b = tensor_names(module.site)
        shapes[name_a] = (module.rank, in_size)
        shapes[name_b] = (out_size, module.rank)
    return shapes


def check_tensors(
    plan: AdapterPlan, config: PeftLoraConfig, shape: BaseShape, found: Mapping[str, TensorEntry]
) -> None:
    """Raise AdapterError unless the file holds exactly the planned tensors, as floats."""
    for name, entry in found.items():
        if entry.dtype not in FLOAT_DTYPES:
            raise AdapterError(
                f"{WEIGHTS_FILE}: tensor {name[:200]!r} is {entry.dtype};"
                f" supported: {', '.join(FLOAT_DTYPES)}"
            )
    if {name: entry.shape for name, entry in found.items()} == plan.tensor_shapes:
        return
    _check_unexpected(plan, shape, found)
    _check_pairs(plan, found)
    for module in plan.modules:
        if tensor_names(module.site)[0] in found:
            _check_module(module, config, shape, found)
    _check_complete(plan, found)


def _check_unexpected(
    plan: AdapterPlan, shape: BaseShape, found: Mapping[str, TensorEntry]
) -> None:
    unexpected = sorted(found.keys() - plan.tensor_shapes.keys())
    if not unexpected:
        return
    name = unexpected[0]
    if any(name in tensor_names(site) for site in range(shape.num_sites())):
        raise AdapterError(
            f"{WEIGHTS_FILE}: tensor {name!r} is of a module that {CONFIG_FILE} does not select"
            " (target_modules, exclude_modules, layers_to_transform)"
        )
    raise AdapterError(
        f"{WEIGHTS_FILE}: tensor {name[:200]!r} is not lora_A or lora_B of a linear of the base"
        f" ({shape.num_layers} layers of {', '.join(TARGETS)}; {_PREFIX}model.layers.N...);"
        " it would not be applied"
    )


def _check_pairs(plan: AdapterPlan, found: Mapping[str, TensorEntry]) -> None:
    for module in plan.modules:
        name_a, name_b = tensor_names(module.site)
        if (name_a in found) != (name_b in found):
            present, missing = (name_a, name_b) if name_a in found else (name_b, name_a)
            raise AdapterError(f"{WEIGHTS_FILE}: tensor {present!r} is there without {missing!r}")


def _check_complete(plan: AdapterPlan, found: Mapping[str, TensorEntry]) -> None:
    for module in plan.modules:
        if tensor_names(module.site)[0] not in found:
            path = module_path(module.layer, module.target)
            raise AdapterError(
                f"{CONFIG_FILE}: target_modules selects {path!r},"
                f" but {WEIGHTS_FILE} has no tensors for it"
            )


def _check_module(
    module: ModuleInfo, config: PeftLoraConfig, shape: BaseShape, found: Mapping[str, TensorEntry]
) -> None:
    in_size, out_size = shape.target_sizes[module.target]
    name_a, name_b = tensor_names(module.site)
    shape_a, shape_b = found[name_a].shape, found[name_b].shape
    if len(shape_a) != 2 or shape_a[1] != in_size:
        raise _shape_error(name_a, shape_a, f"[rank, {in_size}]")
    if len(shape_b) != 2 or shape_b[0] != out_size:
        raise _shape_error(name_b, shape_b, f"[{out_size}, rank]")
    path = module_path(module.layer, module.target)
    for name, rank in ((name_a, shape_a[0]), (name_b, shape_b[1])):
        if rank != module.rank:
            raise AdapterError(
                f"{WEIGHTS_FILE}: tensor {name!r} has rank {rank},"
                f" but {config.rank_source(path)} in {CONFIG_FILE} is {module.rank}"
            )


def _shape_error(name: str, found: tuple[int, ...], expected: str) -> AdapterError:
    return AdapterError(
        f"{WEIGHTS_FILE}: tensor {name!r} has shape {list(found)}; this base needs {expected}."
        " The adapter belongs to another base model"
    )
