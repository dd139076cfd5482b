"""VeRA: two random matrices that all modules share, and two trained vectors for each module.

Knows its config keys and tensor names, and how a shared matrix of a file is identified. Called
through adapters/methods.
Source    Kopiczko et al. 2023 (arXiv 2310.11454); peft 0.21: tuners/vera.
Legend: R rank, I in features, O out features, both of the widest adapted modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights, SharedMatrix
from loraswarm.adapters.config_keys import CONFIG_FILE, SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import (
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

# PEFT's VeRA has no exclude_modules.
READ_KEYS = (SELECTION_KEYS - {"exclude_modules"}) | {
    "bias",
    "projection_prng_key",
    "r",
    "save_projection",
}
# PEFT sets fan_in_fan_out to false for linears that store [out, in].
INERT_KEYS = frozenset({"d_initial", "fan_in_fan_out", "init_weights", "vera_dropout"})
_SHARED_A, _SHARED_B = "base_model.vera_A", "base_model.vera_B"
_U, _V = ".vera_lambda_d", ".vera_lambda_b"
_MIN_KEY, _MAX_KEY = -(2**63), 2**64 - 1
# A and B that are drawn may have this many times the elements of the widest weight: no file pays
# for them. VeRA's ranks exceed the sizes of small models.
_MAX_DRAWN_WEIGHTS = 4


@dataclass(frozen=True, slots=True)
class VeraConfig:
    """delta W = diag(v) B diag(u) A. `generator_key` is None where the file holds A and B."""

    selection: ModuleSelection
    rank: int
    generator_key: int | None


@dataclass(frozen=True, slots=True)
class _Update:
    """A config with the matrices that its modules share."""

    selection: ModuleSelection
    shared_a: SharedMatrix
    shared_bt: SharedMatrix

    @property
    def method(self) -> str:
        return "vera"

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`."""
        rank = self.shared_a.num_rows
        return ModuleInfo(site, rank, 1.0, ("u", "v"), self.shared_a, self.shared_bt)

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        return {_U: (self.shared_a.num_rows,), _V: (out_size,)}


class Vera:
    """`Method` of peft_type VERA."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`. Cost: reads the shared matrices for their digests."""
        config = _parse_config(keys)
        in_size, out_size = _widest(config.selection, shape)
        if config.generator_key is None:
            digest_a = shared_digest(source, _SHARED_A, (config.rank, in_size))
            digest_b = shared_digest(source, _SHARED_B, (out_size, config.rank))
        else:
            _check_drawn(config.rank, in_size, out_size)
            # B is drawn after A from one generator, so that every size decides both.
            drawn = f"{config.generator_key} {config.rank} {in_size} {out_size}"
            digest_a, digest_b = f"{_SHARED_A} {drawn}", f"{_SHARED_B} {drawn}"
        return _plan(config, shape, digest_a, digest_b)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        config = _parse_config(keys)
        shared_a, shared_bt = plan.modules[0].shared_a, plan.modules[0].shared_bt
        assert shared_a is not None
        assert shared_bt is not None
        if config.generator_key is None:
            a_RI, b_OR = tensors.cast(_SHARED_A), tensors.cast(_SHARED_B)
        else:
            drawn = _draw(config.generator_key, config.rank, shared_a.width, shared_bt.width)
            a_RI, b_OR = tensors.fit(_SHARED_A, drawn[0]), tensors.fit(_SHARED_B, drawn[1])
        return AdapterWeights(
            tuple(
                _read_module(module, base.shape.site_path(module.site), tensors)
                for module in plan.modules
            ),
            overlays=read_saved(plan, tensors, base),
            shared={shared_a.digest: a_RI, shared_bt.digest: b_OR.t().contiguous()},
        )


def shared_digest(source: AdapterSource, name: str, shape: tuple[int, ...]) -> str:
    """Identifies the values of a file's shared matrix, and by its name what is made of them.

    A tensor that is missing or of another shape is not read: it is refused when it is checked.
    """
    spec = source.tensors.get(name)
    if spec is None or spec.shape != shape:
        return name
    return f"{name} {source.content_digest([name])}"


def _parse_config(keys: ConfigKeys) -> VeraConfig:
    keys.check(READ_KEYS, INERT_KEYS, {})
    refuse_bias(keys)
    has_projection = keys.flag("save_projection", True)
    key = keys.get("projection_prng_key", 0)
    if not has_projection and not (type(key) is int and _MIN_KEY <= key <= _MAX_KEY):
        raise keys.refusal(
            "projection_prng_key",
            "save_projection is false: it must be the whole number of 64 bits that vera_A and"
            " vera_B were drawn with",
        )
    return VeraConfig(keys.selection(), keys.rank("r", 256), None if has_projection else key)


@lru_cache(maxsize=256)
def _widest(selection: ModuleSelection, shape: BaseShape) -> tuple[int, int]:
    """The largest in and out size of adapted modules: what A and B are made for."""
    sizes = [
        shape.site_sizes(site)
        for site in (*range(shape.num_linears), shape.head_site)
        if selection.selects(shape.site_path(site))
    ]
    return max((size[0] for size in sizes), default=0), max((size[1] for size in sizes), default=0)


def _check_drawn(rank: int, in_size: int, out_size: int) -> None:
    """Refuse to draw matrices that are larger than what they adapt."""
    limit = _MAX_DRAWN_WEIGHTS * in_size * out_size // max(1, in_size + out_size)
    # Where nothing is selected, that is what is refused.
    if rank > limit > 0:
        raise AdapterError(
            f"{CONFIG_FILE}: r is {rank}: without vera_A and vera_B in the file, up to {limit} is"
            f" read for its {in_size} inputs and {out_size} outputs; save it with save_projection"
            " set to true"
        )


@lru_cache(maxsize=256)
def _plan(config: VeraConfig, shape: BaseShape, digest_a: str, digest_b: str) -> AdapterPlan:
    in_size, out_size = _widest(config.selection, shape)
    update = _Update(
        config.selection,
        SharedMatrix(digest_a, config.rank, in_size),
        SharedMatrix(digest_b, config.rank, out_size),
    )
    plan = plan_low_rank(update, shape)
    if config.generator_key is not None:
        return plan
    stored = {_SHARED_A: (config.rank, in_size), _SHARED_B: (out_size, config.rank)}
    return replace(plan, tensor_shapes={**plan.tensor_shapes, **stored})


def _read_module(module: ModuleInfo, path: str, tensors: TensorReader) -> ModuleWeights:
    u_R, v_O = tensors.wide(tensor_name(path, _U)), tensors.wide(tensor_name(path, _V))
    return ModuleWeights(module, None, None, {"u": u_R, "v": v_O})


def _draw(key: int, rank: int, in_size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] in float32 as PEFT draws them, bit for bit."""
    import torch

    generator = torch.Generator().manual_seed(key)

    def uniform(num_rows: int, num_columns: int) -> Tensor:
        # sqrt(6 / columns), in the order of operations that PEFT rounds it in.
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(num_columns))
        drawn = torch.empty(num_rows, num_columns, dtype=torch.float32)
        return drawn.uniform_(-bound, bound, generator=generator)

    a_RI = uniform(rank, in_size)
    return a_RI, uniform(out_size, rank)
