"""Trained norms: peft_type LN_TUNING, whose adapters are whole weights of small modules.

Owns the config's keys and PEFT's names; the weights become overlays as those of modules_to_save
do. Called through adapters/methods.
Source    peft 0.21: tuners/ln_tuning.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, ConfigKeys
from loraswarm.adapters.methods.lora_overlays import (
    SERVED,
    TABLES,
    Replacement,
    check_copies,
    check_vocabulary,
    one_role_each,
    read_replacement,
    saved_paths,
    table_copies,
    whole_module,
)
from loraswarm.adapters.module_selection import ModuleSelection
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = frozenset({"target_modules", "exclude_modules", "modules_to_save"})


class LnTuning:
    """`Method` of peft_type LN_TUNING."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        keys.check(READ_KEYS, frozenset(), {})
        replacements = _replacements(keys.selection(), shape)
        shapes = {name: found.shape for found in replacements for name in found.names}
        copies = _copies(replacements, shape)
        check_vocabulary(source, shapes | copies, shape)
        return AdapterPlan(
            "ln_tuning",
            (),
            shapes,
            overlays=tuple(found.info for found in replacements),
            copies={name: size for name, size in copies.items() if name in source.tensors},
        )

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        check_copies(plan.copies, tensors, base)
        found = _replacements(keys.selection(), base.shape)
        return AdapterWeights((), tuple(read_replacement(each, tensors) for each in found))


@lru_cache(maxsize=256)
def _replacements(selection: ModuleSelection, shape: BaseShape) -> tuple[Replacement, ...]:
    for site in range(shape.num_linears):
        if selection.selects(shape.site_path(site)):
            raise AdapterError(
                f"{CONFIG_FILE}: target_modules selects {shape.site_path(site)!r}; of fully"
                f" trained modules only {SERVED} are served: adapt the others with LoRA"
            )
    paths = [path for path in (*TABLES, *shape.norm_sizes()) if selection.selects(path)]
    if not paths:
        raise AdapterError(f"{CONFIG_FILE}: target_modules selects none of this base's {SERVED}")
    saved = saved_paths(selection.replaced, shape)
    one_role_each({"target_modules": paths, "modules_to_save": saved})
    tuned = [whole_module((path,), ".ln_tuning_layers.weight", shape) for path in paths]
    return (*tuned, *(whole_module((path,), ".weight", shape) for path in saved))


def _copies(replacements: tuple[Replacement, ...], shape: BaseShape) -> dict[str, tuple[int, ...]]:
    suffixes = dict.fromkeys(TABLES, ".weight")
    for found in replacements:
        for path in found.info.paths:
            if path in suffixes and found.names[0].endswith(".ln_tuning_layers.weight"):
                suffixes[path] = ".base_layer.weight"
            else:
                suffixes.pop(path, None)
    return table_copies(shape, suffixes)
