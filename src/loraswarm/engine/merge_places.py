"""The linears that an adapter may be merged into, and the memory for their merged copies.

Knows no target and no time budget. Used by engine/merging and, for sizes, by engine/sizing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.sequence import AdapterKey
from loraswarm.kernels import TileTable
from loraswarm.models.decoder import Decoder
from loraswarm.models.layers.linear import LoraLinear
from loraswarm.models.layers.weight import Weight

FIRST_S_PER_BYTE = 1 / 2e9
"""Of the base's bytes, where nothing could be measured."""
MEASURED_COPIES = 16
MIN_LEARNED_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class Place:
    """One linear: its merged copy and the adapter in it while that is in use, else the memory that
    is kept for one, if there is any."""

    linear: LoraLinear
    num_bytes: int
    norm: float
    copy: Weight | None = None
    key: AdapterKey | None = None
    spare: Weight | None = None

    @property
    def has_memory(self) -> bool:
        return self.copy is not None or self.spare is not None

    def keep(self, weight: Weight) -> None:
        """Keep a copy's memory for the next one, if that can use it."""
        if self.linear.keeps_copies:
            self.spare = weight


def update_bytes(info: AdapterInfo, shape: BaseShape, element_bytes: int) -> int:
    """Bytes of A and B at all linears: what a token without the adapter in its weights multiplies
    by. Gains and biases, embeddings, norms and the head, which are never merged, do not count."""
    num_elements = sum(
        module.rank * sum(shape.site_sizes(module.site))
        for module in info.modules
        if module.site < shape.num_linears
    )
    return element_bytes * num_elements


def linears_in_order(decoder: Decoder) -> list[LoraLinear]:
    """The linears in the order in which they are merged: those of attention first, since they make
    half of the low-rank operations of a step for a fifth of the bytes."""
    layers = [layer.linears() for layer in decoder.layers]
    qkv_and_o = [linear for linears in layers for linear in linears[:2]]
    return qkv_and_o + [linear for linears in layers for linear in linears[2:]]


def places_of(decoder: Decoder) -> list[Place]:
    """All linears, in that order, without memory; their weights are read for their norms."""
    return [
        Place(linear, linear.weight.nbytes, linear.weight_norm())
        for linear in linears_in_order(decoder)
    ]


def reserve(places: list[Place], budget_bytes: int) -> None:
    """Take the memory of as many copies as the budget allows."""
    num_bytes = 0
    for place in places:
        if place.linear.keeps_copies and num_bytes + place.num_bytes <= budget_bytes:
            place.spare = place.linear.blank_copy()
            num_bytes += place.num_bytes


def copy_s_per_byte(places: list[Place], pool: Tensor, no_tiles: TileTable) -> float:
    """Seconds per byte of a few copies with nothing merged into them; a guess where no memory is
    kept for one."""
    begin_s, num_bytes = time.perf_counter(), 0
    for place in [place for place in places if place.spare is not None][-MEASURED_COPIES:]:
        copy = place.linear.start_merging(place.spare)
        num_bytes += copy.extend(copy.num_rows, pool, no_tiles)
    wait_for(pool)
    elapsed_s = time.perf_counter() - begin_s
    return elapsed_s / num_bytes if num_bytes >= MIN_LEARNED_BYTES else FIRST_S_PER_BYTE


def wait_for(pool: Tensor) -> None:
    """Until the pool's device has done what it was told."""
    if pool.is_cuda:
        torch.cuda.synchronize(pool.device)
