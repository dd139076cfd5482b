"""What a config promises against what the weights file holds: the same tensors, or a named refusal.

Knows tensor names and shapes, never values or methods. Made by adapters/methods, checked by
adapters/reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import ModuleInfo, ModuleWeights, OverlayInfo
from loraswarm.adapters.printable import quoted
from loraswarm.adapters.source import FLOAT_DTYPES, INDEX_DTYPES, TensorSpec
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter changes, and the shape of every tensor that takes; modules sorted by site.

    `index_tensors` are those among `tensor_shapes` that hold whole numbers instead of floats.
    `copies` may be in the file and change nothing: PEFT's copies of base weights, and what only
    training looks at. `advice` is what to do about an adapter that is served, but at a cost.
    """

    method: str
    modules: tuple[ModuleInfo, ...]
    tensor_shapes: Mapping[str, tuple[int, ...]]
    overlays: tuple[OverlayInfo, ...] = ()
    invocation_tokens: tuple[int, ...] | None = None
    index_tensors: frozenset[str] = frozenset()
    copies: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))
    advice: str = ""


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """The weights of a plan: `Adapter` without its info."""

    modules: tuple[ModuleWeights, ...]
    overlays: tuple[Tensor, ...] = ()
    shared: Mapping[str, Tensor] = field(default_factory=dict)


def check_tensors(plan: AdapterPlan, label: str, found: Mapping[str, TensorSpec]) -> None:
    """Raise AdapterError, naming the tensor, unless the file holds exactly the planned ones."""
    expected = plan.tensor_shapes
    for name, spec in found.items():
        is_index = name in plan.index_tensors
        allowed = INDEX_DTYPES if is_index else FLOAT_DTYPES
        if spec.dtype not in allowed:
            advice = "" if is_index else "; save it in float32 or bfloat16"
            raise AdapterError(
                f"{label}: tensor {quoted(name)} is {spec.dtype}; supported:"
                f" {', '.join(allowed)}{advice}"
            )
    for name in sorted(found.keys() - expected.keys() - plan.copies.keys()):
        raise AdapterError(
            f"{label}: tensor {quoted(name)} is none that the config calls for, as a"
            f" {plan.method} adapter of this base; it would not be applied"
        )
    for name in sorted(expected.keys() - found.keys()):
        raise AdapterError(f"{label}: tensor {name!r}, which the config calls for, is missing")
    for name, spec in found.items():
        shape = expected.get(name, plan.copies.get(name))
        if spec.shape != shape:
            assert shape is not None
            raise AdapterError(
                f"{label}: tensor {name!r} has shape {list(spec.shape)}; config and base call for"
                f" {list(shape)}"
            )
