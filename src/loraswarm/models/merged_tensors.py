"""Which tensors a base and an adapter make together, and the values of each.

Owns the arithmetic of merging: the general form of adapters/adapter put into weights and biases,
some rows at a time. Knows no files; models/merge writes them.
Legend: R rank, I in features, O out features, V vocabulary, N rows of one block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraswarm.adapters.adapter import (
    EMBEDDING_A,
    Adapter,
    ModuleWeights,
    OverlayInfo,
    SharedMatrix,
)
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, TARGETS, BaseShape
from loraswarm.errors import AdapterError
from loraswarm.models.checkpoint_base import tensor_shapes
from loraswarm.models.families import decoder_config

BIAS_FLAGS = ("attention_bias", "mlp_bias")
_EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"
_HEAD_WEIGHT = f"{LM_HEAD}.weight"

Change = Callable[[Tensor, int], Tensor]
"""(rows of a tensor in float32 or float64, the first one's index) -> those rows, changed."""


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """One tensor of a merged checkpoint: rows of `base_name`, zeros if None, through `changes`.

    It is stored in the file and, unless another dtype is asked for, in the dtype of `like`.
    """

    name: str
    shape: tuple[int, ...]
    base_name: str | None
    like: str
    changes: tuple[Change, ...]


def merged_config(config: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The base's config.json as the merged checkpoint needs it: biases switched on, lm_head untied.

    Raises    AdapterError if the adapter acts on part of a prompt only, or adds a bias where the
              base's family has none.
    """
    if adapter.info.invocation_tokens is not None:
        raise AdapterError(
            f"adapter {adapter.info.name!r} cannot be merged: it acts from its invocation tokens"
            " on only (alora_invocation_tokens); serve it unmerged"
        )
    shape = decoder_config(config).shape()
    merged = dict(config) | _bias_flags(config, adapter, shape)
    if shape.ties_embeddings and _unties(adapter, shape):
        merged["tie_word_embeddings"] = False
    return merged


def merged_tensors(base: BaseShape, merged: BaseShape, adapter: Adapter) -> list[MergedTensor]:
    """Every tensor of the checkpoint of shape `merged` that base and adapter make.

    `adapter` is read in float32.
    """
    stored = tensor_shapes(base)
    changes = _changes(merged, adapter)
    tensors = []
    for name, shape in tensor_shapes(merged).items():
        base_name: str | None = name
        like = name
        if name not in stored:
            is_head = name == _HEAD_WEIGHT
            base_name = _EMBEDDING_WEIGHT if is_head else None
            like = _EMBEDDING_WEIGHT if is_head else name.removesuffix("bias") + "weight"
        found = tuple(changes.pop(name, ()))
        tensors.append(MergedTensor(name, shape, base_name, like, found))
    if merged.ties_embeddings:
        changes.pop(_HEAD_WEIGHT, None)  # the same rows as the embedding's
    assert not changes, f"parts of an adapter that no tensor takes: {sorted(changes)}"
    return tensors


def _bias_flags(config: Mapping[str, Any], adapter: Adapter, shape: BaseShape) -> dict[str, bool]:
    """The fewest config flags with which the family has a bias wherever the adapter adds one."""
    sites = [
        module.site
        for module in adapter.info.modules
        if "c" in module.vectors
        and module.site != shape.embedding_site
        and not shape.has_bias(module.site)
    ]
    biased: tuple[bool, ...] = ()
    for count in range(len(BIAS_FLAGS) + 1):
        for names in itertools.combinations(BIAS_FLAGS, count):
            flags = dict.fromkeys(names, True)
            biased = decoder_config({**config, **flags}).shape().biased_targets
            if all(site < shape.num_linears and biased[site % len(TARGETS)] for site in sites):
                return flags
    refused = next(
        site for site in sites if site >= shape.num_linears or not biased[site % len(TARGETS)]
    )
    raise AdapterError(
        f"adapter {adapter.info.name!r} cannot be merged: it adds a bias to"
        f" {shape.site_path(refused)!r}, where checkpoints of model_type"
        f" {config.get('model_type')!r} have none; serve it unmerged"
    )


def _unties(adapter: Adapter, shape: BaseShape) -> bool:
    """Whether embedding and lm_head no longer share a weight."""
    sites = {shape.embedding_site, shape.head_site}
    if any(module.site in sites for module in adapter.info.modules):
        return True
    return any(
        (EMBEDDING in overlay.paths) != (LM_HEAD in overlay.paths)
        for overlay in adapter.info.overlays
    )


def _changes(shape: BaseShape, adapter: Adapter) -> dict[str, list[Change]]:
    """What happens to each tensor, in order: rows are replaced before modules are updated."""
    changes: dict[str, list[Change]] = {}
    embedding_a_VR: Tensor | None = None
    for info, rows in zip(adapter.info.overlays, adapter.overlays, strict=True):
        for path in info.paths:
            if path == EMBEDDING_A:
                embedding_a_VR = rows
                continue
            changes.setdefault(f"{path}.weight", []).append(partial(_replace, info, rows))
    for module in adapter.modules:
        path = shape.site_path(module.info.site)
        in_size, out_size = shape.site_sizes(module.info.site)
        update = _ModuleUpdate(module, adapter.shared, in_size, out_size)
        change = update.linear
        if path == EMBEDDING:
            change = partial(update.embedding, embedding_a_VR)
        changes.setdefault(f"{path}.weight", []).append(change)
        if shape.has_bias(module.info.site) and module.vectors.keys() & {"g", "c"}:
            changes.setdefault(f"{path}.bias", []).append(update.bias)
    return changes


def _replace(info: OverlayInfo, rows: Tensor, values: Tensor, begin: int) -> Tensor:
    count = values.shape[0]
    if info.token_ids is None:
        # A norm's weight is one row; its elements count as rows here.
        return rows.reshape(-1, *values.shape[1:])[begin : begin + count].to(values.dtype)
    ids = torch.tensor(info.token_ids)
    chosen = (ids >= begin) & (ids < begin + count)
    changed = values.clone()
    changed[ids[chosen] - begin] = rows[chosen].to(values.dtype)
    return changed


class _ModuleUpdate:
    """y = g * (W x + v * (B (scale * u * (A x)))) + bias, put into W and the bias."""

    def __init__(
        self, module: ModuleWeights, shared: Mapping[str, Tensor], in_size: int, out_size: int
    ) -> None:
        info = module.info
        self._vectors = module.vectors
        self._a_RI = _own_or_shared(module.a_RI, info.shared_a, shared, in_size)
        self._bt_RO = _own_or_shared(module.bt_RO, info.shared_bt, shared, out_size)
        self._factor_R = torch.full((info.rank,), info.scale, dtype=torch.float32)
        if "u" in module.vectors:
            self._factor_R = self._factor_R * module.vectors["u"]

    def linear(self, weight_NI: Tensor, begin: int) -> Tensor:
        """Rows of a linear's weight [O, I]."""
        rows = slice(begin, begin + weight_NI.shape[0])
        merged_NI = weight_NI
        if self._a_RI is not None and self._bt_RO is not None:
            a_RI = self._factor_R[:, None] * self._a_RI
            delta_NI = self._bt_RO[:, rows].T @ a_RI
            if "v" in self._vectors:
                delta_NI = self._vectors["v"][rows, None] * delta_NI
            merged_NI = merged_NI + delta_NI
        if "g" in self._vectors:
            merged_NI = self._vectors["g"][rows, None] * merged_NI
        return merged_NI

    def embedding(self, a_VR: Tensor | None, table_NO: Tensor, begin: int) -> Tensor:
        """Rows of a table of embeddings [V, O]."""
        merged_NO = table_NO
        if a_VR is not None and self._bt_RO is not None:
            rows_NR = a_VR[begin : begin + table_NO.shape[0]] * self._factor_R
            merged_NO = merged_NO + rows_NR @ self._bt_RO * self._vectors.get("v", 1.0)
        return self._vectors.get("g", 1.0) * merged_NO + self._vectors.get("c", 0.0)

    def bias(self, bias_N: Tensor, begin: int) -> Tensor:
        """Elements of the bias [O]."""
        rows = slice(begin, begin + bias_N.shape[0])
        if "g" in self._vectors:
            bias_N = self._vectors["g"][rows] * bias_N
        if "c" in self._vectors:
            bias_N = bias_N + self._vectors["c"][rows]
        return bias_N


def _own_or_shared(
    own: Tensor | None, info: SharedMatrix | None, shared: Mapping[str, Tensor], width: int
) -> Tensor | None:
    """[R, width]; of a wider shared matrix the first columns."""
    return own if info is None else shared[info.digest][:, :width]
