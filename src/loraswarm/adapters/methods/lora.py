"""LoRA as PEFT saves it, and its variants.

Owns what is refused when file and config disagree; the rest is in lora_config (keys), lora_plan
(modules and tensors) and lora_weights (values). Called through adapters/methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, ConfigKeys
from loraswarm.adapters.methods.lora_config import LoraConfig, parse_lora_config
from loraswarm.adapters.methods.lora_overlays import check_vocabulary
from loraswarm.adapters.methods.lora_plan import LoraLayout, layout_of, matrix_names, matrix_shapes
from loraswarm.adapters.plan import PREFIX, AdapterPlan, AdapterWeights
from loraswarm.adapters.printable import quoted
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

# The name of PEFT's first adapter, which it also finds in the names of tensors.
DEFAULT_NAME = "default"
_PLAIN_ENDINGS = (".lora_A.weight", ".lora_embedding_A")
_LAYER = re.compile(re.escape(PREFIX) + r"model\.layers\.(\d{1,9})\.")


class Lora:
    """`Method` of peft_type LORA."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        found = {name: spec.shape for name, spec in source.tensors.items()}
        layout = _layout(keys, shape, found)
        plan = layout.plan
        if found != plan.tensor_shapes:
            _check_shapes(layout, shape, source)
            check_vocabulary(source, {**plan.tensor_shapes, **plan.copies}, shape)
        present = {name: size for name, size in plan.copies.items() if name in found}
        return replace(plan, copies=present)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        # Imported here: planning must not need torch.
        from loraswarm.adapters.methods.lora_weights import read_lora

        layout = _layout(keys, base.shape, plan.tensor_shapes)
        return read_lora(layout, plan.copies, tensors, base)


def _layout(keys: ConfigKeys, shape: BaseShape, found: Mapping[str, tuple[int, ...]]) -> LoraLayout:
    config = parse_lora_config(keys)
    if _has_adapter_name(found):
        config = replace(config, name_infix=DEFAULT_NAME)
    if config.variant == "qalora" and not _has_groups(config, shape, found):
        # PEFT groups the inputs of quantised bases only; on others the key does nothing.
        config = replace(config, variant="")
    return layout_of(config, shape)


def _has_adapter_name(names: Iterable[str]) -> bool:
    """Whether tensors are named as in the model itself, which PEFT loads as well."""
    named = [name for name in names if f".{DEFAULT_NAME}" in name]
    return bool(named) and not any(name.endswith(_PLAIN_ENDINGS) for name in names)


def _has_groups(config: LoraConfig, shape: BaseShape, found: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether any A of the file has one column for each group of inputs."""
    for site in range(shape.num_linears):
        name_a, _ = matrix_names(config, shape.site_path(site))
        if name_a in found:
            return found[name_a][-1:] != shape.site_sizes(site)[:1]
    return False


def _check_shapes(layout: LoraLayout, shape: BaseShape, source: AdapterSource) -> None:
    """Another rank than the config's, or another base's sizes, get a message of their own."""
    config, found = layout.config, source.tensors
    _check_layers(found, shape, source.label)
    for module in layout.plan.modules:
        path = shape.site_path(module.site)
        name_a, name_b = matrix_names(config, path)
        if module.rank == 0 or name_a not in found or name_b not in found:
            continue
        wide_a, wide_b = matrix_shapes(config, shape, module.site)
        shape_a, shape_b = found[name_a].shape, found[name_b].shape
        if len(shape_a) != 2 or (module.site < shape.num_linears and shape_a[1] != wide_a[1]):
            raise _shape_error(source, name_a, shape_a, f"[rank, {wide_a[1]}]")
        if len(shape_b) != 2 or (module.site < shape.num_linears and shape_b[0] != wide_b[0]):
            raise _shape_error(source, name_b, shape_b, f"[{wide_b[0]}, rank]")
        for name, rank, expected in (
            (name_a, shape_a[0], wide_a[0]),
            (name_b, shape_b[1], wide_b[1]),
        ):
            if rank != expected:
                blocks = " in blocks" if expected != config.rank_of(path) else ""
                raise AdapterError(
                    f"{source.label}: tensor {name!r} has rank {rank},"
                    f" but {config.rank_source(path)} in {CONFIG_FILE} is"
                    f" {config.rank_of(path)}{blocks}"
                )


def _check_layers(names: Iterable[str], shape: BaseShape, label: str) -> None:
    for name in names:
        match = _LAYER.match(name)
        if match is not None and int(match[1]) >= shape.num_layers:
            raise AdapterError(
                f"{label}: tensor {quoted(name)} would not be applied: this base has"
                f" {shape.num_layers} layers; the adapter belongs to another base model"
            )


def _shape_error(
    source: AdapterSource, name: str, found: tuple[int, ...], expected: str
) -> AdapterError:
    return AdapterError(
        f"{source.label}: tensor {name!r} has shape {list(found)}; this base needs {expected}."
        " The adapter belongs to another base model"
    )
