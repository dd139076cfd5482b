"""Tied-LoRA: layers share A and B of a target, and have vectors of their own.

Knows the config keys and tensor names of docs/tied_lora.md, a format of this project in PEFT's
layout; PEFT has no such method. Called through adapters/methods.
Source    Renduchintala et al. 2023 (arXiv 2311.09578).
Legend: R rank, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import (
    BaseWeights,
    ModuleInfo,
    ModuleWeights,
    SharedMatrix,
    VectorName,
)
from loraswarm.adapters.config_keys import SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import (
    plan_low_rank,
    read_saved,
    refuse_bias,
    tensor_name,
)
from loraswarm.adapters.methods.vera import shared_digest
from loraswarm.adapters.module_selection import ModuleSelection
from loraswarm.adapters.plan import AdapterPlan, AdapterWeights
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape

if TYPE_CHECKING:
    from loraswarm.adapters.tensors import TensorReader

READ_KEYS = SELECTION_KEYS | {"bias", "has_u", "has_v", "lora_alpha", "r", "share_qkv_A"}
INERT_KEYS = frozenset({"lora_dropout"})
REFUSED_KEYS = {
    "modules_to_save": "it is not a part of the format; train LoRA with it, or without it",
}
_SHARED_A, _SHARED_B = "base_model.tied_lora_A.", "base_model.tied_lora_B."
_U, _V = ".tied_lora_u", ".tied_lora_v"
_QKV = ("q_proj", "k_proj", "v_proj")
_FUSED = "qkv_proj"


@dataclass(frozen=True, slots=True)
class TiedLoraConfig:
    """delta W of a layer = scale * diag(v) B diag(u) A; without a vector, ones stand in for it."""

    selection: ModuleSelection
    rank: int
    alpha: float
    vectors: tuple[VectorName, ...]
    shares_qkv: bool

    def name_a(self, path: str) -> str:
        """The tensor that holds A of the module at `path`."""
        target = path.rpartition(".")[2]
        return _SHARED_A + (_FUSED if self.shares_qkv and target in _QKV else target)

    def name_b(self, path: str) -> str:
        """The tensor that holds B of the module at `path`."""
        return _SHARED_B + path.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class _Update:
    """A config with the digests of the shared tensors, as (name, digest)."""

    config: TiedLoraConfig
    digests: tuple[tuple[str, str], ...]

    @property
    def method(self) -> str:
        return "tied_lora"

    @property
    def selection(self) -> ModuleSelection:
        return self.config.selection

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`."""
        config, digests = self.config, dict(self.digests)
        in_size, out_size = shape.site_sizes(site)
        return ModuleInfo(
            site,
            config.rank,
            config.alpha / config.rank,
            config.vectors,
            SharedMatrix(digests[config.name_a(path)], config.rank, in_size),
            SharedMatrix(digests[config.name_b(path)], config.rank, out_size),
        )

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        sizes = {_U: (self.config.rank,), _V: (out_size,)}
        return {suffix: sizes[suffix] for suffix in _suffixes(self.config)}


class TiedLora:
    """`Method` of peft_type TIED_LORA."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`. Cost: reads the shared matrices for their digests."""
        config = _parse_config(keys)
        shared = _shared_shapes(config, shape)
        digests = tuple((name, shared_digest(source, name, shared[name])) for name in shared)
        return _plan(config, shape, digests)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        config = _parse_config(keys)
        shared = {}
        modules = []
        for module in plan.modules:
            path = base.shape.site_path(module.site)
            modules.append(_read_module(module, path, config, tensors))
            shared_a, shared_bt = module.shared_a, module.shared_bt
            assert shared_a is not None
            assert shared_bt is not None
            if shared_a.digest not in shared:
                shared[shared_a.digest] = tensors.cast(config.name_a(path))
            if shared_bt.digest not in shared:
                shared[shared_bt.digest] = tensors.cast(config.name_b(path)).t().contiguous()
        return AdapterWeights(tuple(modules), read_saved(plan, tensors, base), shared)


def _parse_config(keys: ConfigKeys) -> TiedLoraConfig:
    keys.check(READ_KEYS, INERT_KEYS, REFUSED_KEYS)
    refuse_bias(keys)
    for key in ("r", "lora_alpha"):
        if keys.get(key) is None:
            raise keys.refusal(key, "a Tied-LoRA config must give it; it has no default")
    has_vectors: dict[VectorName, bool] = {
        "u": keys.flag("has_u", True),
        "v": keys.flag("has_v", True),
    }
    return TiedLoraConfig(
        selection=keys.selection(),
        rank=keys.rank("r", 0),
        alpha=keys.number("lora_alpha", 0),
        vectors=tuple(name for name, is_there in has_vectors.items() if is_there),
        shares_qkv=keys.flag("share_qkv_A"),
    )


@lru_cache(maxsize=256)
def _shared_shapes(config: TiedLoraConfig, shape: BaseShape) -> Mapping[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for site in (*range(shape.num_linears), shape.head_site):
        path = shape.site_path(site)
        if config.selection.selects(path):
            in_size, out_size = shape.site_sizes(site)
            shapes[config.name_a(path)] = (config.rank, in_size)
            shapes[config.name_b(path)] = (out_size, config.rank)
    return shapes


@lru_cache(maxsize=256)
def _plan(
    config: TiedLoraConfig, shape: BaseShape, digests: tuple[tuple[str, str], ...]
) -> AdapterPlan:
    plan = plan_low_rank(_Update(config, digests), shape)
    return replace(plan, tensor_shapes={**plan.tensor_shapes, **_shared_shapes(config, shape)})


def _suffixes(config: TiedLoraConfig) -> tuple[str, ...]:
    return tuple({"u": _U, "v": _V}[name] for name in config.vectors)


def _read_module(
    module: ModuleInfo, path: str, config: TiedLoraConfig, tensors: TensorReader
) -> ModuleWeights:
    names = zip(config.vectors, _suffixes(config), strict=True)
    vectors = {vector: tensors.wide(tensor_name(path, suffix)) for vector, suffix in names}
    return ModuleWeights(module, None, None, vectors)
