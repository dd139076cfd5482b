"""VB-LoRA: A and B put together from vectors of one bank, each a mixture of a few of them.

Knows its config keys and tensor names. A and B are expanded when they are read, and served as plain
LoRA. Called through adapters/methods.
Source    Li et al. 2024 (arXiv 2405.15179); peft 0.21: tuners/vblora.
Legend: R rank, I in features, O out features, N vectors of the bank, L length of a vector, K
vectors of a mixture, C G places in a grid of mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import BaseWeights, ModuleInfo, ModuleWeights
from loraswarm.adapters.config_keys import CONFIG_FILE, SELECTION_KEYS, ConfigKeys
from loraswarm.adapters.methods.low_rank import (
    check_rank,
    plan_low_rank,
    read_low_rank,
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

READ_KEYS = SELECTION_KEYS | {
    "bias",
    "num_vectors",
    "r",
    "save_only_topk_weights",
    "topk",
    "vector_length",
}
# PEFT sets fan_in_fan_out to false for linears that store [out, in].
INERT_KEYS = frozenset(
    {"fan_in_fan_out", "init_logits_std", "init_vector_bank_bound", "vblora_dropout"}
)
_BANK = "base_model.vblora_vector_bank"
_A, _B = ".vblora_logits_A", ".vblora_logits_B"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
# Shares of a mixture were rounded to the dtype they are stored in: bfloat16 has 8 bits.
_SHARE_SLACK = 2.0**-7


@dataclass(frozen=True, slots=True)
class VbLoraConfig:
    """delta W = B A. The file has logits for all vectors of the bank, or if `has_topk` the choice
    for each place: which vectors, and the share of all but the last."""

    selection: ModuleSelection
    rank: int
    num_vectors: int
    vector_length: int
    num_chosen: int
    has_topk: bool

    @property
    def method(self) -> str:
        return "vblora"

    def module(self, site: int, path: str, shape: BaseShape) -> ModuleInfo:
        """See `LowRankConfig`."""
        for size in shape.site_sizes(site):
            if size % self.vector_length != 0:
                raise AdapterError(
                    f"{CONFIG_FILE}: vector_length is {self.vector_length}: it does not divide"
                    f" {size}, a size of {path!r}; the adapter belongs to another base model"
                )
        # A few indices may stand for a matrix.
        check_rank(self.method, path, self.rank, shape, site)
        return ModuleInfo(site, self.rank, 1.0)

    def tensor_shapes(
        self, path: str, in_size: int, out_size: int
    ) -> Mapping[str, tuple[int, ...]]:
        """See `LowRankConfig`."""
        shapes = {}
        for suffix, grid in (
            (_A, (self.rank, in_size // self.vector_length)),
            (_B, (out_size // self.vector_length, self.rank)),
        ):
            if self.has_topk:
                shapes[suffix + _INDICES] = (*grid, self.num_chosen)
                shapes[suffix + _WEIGHTS] = (*grid, self.num_chosen - 1)
            else:
                shapes[suffix] = (*grid, self.num_vectors)
        return shapes


class VbLora:
    """`Method` of peft_type VBLORA."""

    def plan(self, keys: ConfigKeys, shape: BaseShape, source: AdapterSource) -> AdapterPlan:
        """See `Method`."""
        return _plan(_parse_config(keys), shape)

    def read(
        self, plan: AdapterPlan, keys: ConfigKeys, tensors: TensorReader, base: BaseWeights
    ) -> AdapterWeights:
        """See `Method`."""
        config = _parse_config(keys)
        bank_NL = tensors.wide(_BANK)
        return read_low_rank(
            plan,
            tensors,
            base,
            lambda module, path: _read_module(module, path, config, bank_NL, tensors),
        )


def _parse_config(keys: ConfigKeys) -> VbLoraConfig:
    keys.check(READ_KEYS, INERT_KEYS, {})
    refuse_bias(keys)
    config = VbLoraConfig(
        selection=keys.selection(),
        rank=keys.rank("r", 4),
        num_vectors=keys.rank("num_vectors", 256),
        vector_length=keys.rank("vector_length", 256),
        num_chosen=keys.rank("topk", 2),
        has_topk=keys.flag("save_only_topk_weights"),
    )
    if config.num_chosen > config.num_vectors:
        raise keys.refusal("topk", f"num_vectors is {config.num_vectors}; it cannot be less")
    return config


@lru_cache(maxsize=256)
def _plan(config: VbLoraConfig, shape: BaseShape) -> AdapterPlan:
    plan = plan_low_rank(config, shape)
    shapes = {**plan.tensor_shapes, _BANK: (config.num_vectors, config.vector_length)}
    indices = frozenset(name for name in shapes if name.endswith(_INDICES))
    return replace(plan, tensor_shapes=shapes, index_tensors=indices)


def _read_module(
    module: ModuleInfo, path: str, config: VbLoraConfig, bank_NL: Tensor, tensors: TensorReader
) -> ModuleWeights:
    name_a, name_b = tensor_name(path, _A), tensor_name(path, _B)
    a_RCL = _mixtures(name_a, config, bank_NL, tensors)
    b_CRL = _mixtures(name_b, config, bank_NL, tensors)
    bt_RO = b_CRL.transpose(0, 1).flatten(1)
    return ModuleWeights(module, tensors.fit(name_a, a_RCL.flatten(1)), tensors.fit(name_b, bt_RO))


def _mixtures(name: str, config: VbLoraConfig, bank_NL: Tensor, tensors: TensorReader) -> Tensor:
    """The vector at each place of a grid: [C, G, L] in float32."""
    if config.has_topk:
        indices_CGK, shares_CGK = _stored_choice(name, config, tensors)
    else:
        logits_CGK, indices_CGK = tensors.wide(name).topk(config.num_chosen, dim=-1)
        shares_CGK = logits_CGK.softmax(dim=-1)
    # One vector of each mixture after the other: together they are K times the result.
    mixed_CGL = shares_CGK[..., :1] * bank_NL[indices_CGK[..., 0]]
    for place in range(1, config.num_chosen):
        mixed_CGL += shares_CGK[..., place, None] * bank_NL[indices_CGK[..., place]]
    return mixed_CGL


def _stored_choice(name: str, config: VbLoraConfig, tensors: TensorReader) -> tuple[Tensor, Tensor]:
    """Indices and shares [C, G, K]; the last share is what the others leave of 1."""
    import torch

    indices_CGK = tensors.indices(name + _INDICES)
    wrong = (indices_CGK < 0) | (indices_CGK >= config.num_vectors)
    if wrong.any():
        raise AdapterError(
            f"tensor {name + _INDICES!r} holds {indices_CGK[wrong][0].item()}; num_vectors in"
            f" {CONFIG_FILE} is {config.num_vectors}"
        )
    if (indices_CGK.sort(dim=-1).values.diff(dim=-1) == 0).any():
        raise AdapterError(f"tensor {name + _INDICES!r} chooses a vector twice for one place")
    stored = tensors.wide(name + _WEIGHTS)
    shares_CGK = torch.cat([stored, 1 - stored.sum(dim=-1, keepdim=True)], dim=-1)
    if (shares_CGK < -_SHARE_SLACK).any():
        raise AdapterError(
            f"tensor {name + _WEIGHTS!r} holds no shares of a mixture: they must be positive and"
            " at most 1 together"
        )
    return indices_CGK, shares_CGK
