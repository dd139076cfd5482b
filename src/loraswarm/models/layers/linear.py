"""The base linear and, on top of it, the tiles of each token's adapters.

Knows adapters only as an optional tile table. Owns the fused weight of one or more target linears
that read the same input, and which matrix is in use: it or a copy with an adapter merged into it.
Legend: T tokens, I in features, O out features, Q parts of a fused linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from loraswarm.core.base_shape import TARGETS, BaseShape, module_path
from loraswarm.kernels import Kernels, TileTable, reference_merging
from loraswarm.models.batch import Batch
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.merging import MergedCopy
from loraswarm.models.layers.weight import Weight, multiply


class LoraLinear:
    """Adjacent targets of one layer as one linear: y = x Wᵀ + b, then the adapters' updates.

        weight  | q_proj [Oq, I] | k_proj [Ok, I] | v_proj [Ov, I] |      one GEMM for all parts
                0                Oq               Oq + Ok          O      = out_bounds

    Part q of a batch's tiles is site `first_site + q`. `weight` is the base's and stays; while
    `merged` is set, that is multiplied by instead, and a batch's tiles must be made for it.
    """

    def __init__(
        self, backend: Backend, shape: BaseShape, layer: int, targets: range, has_bias: bool
    ) -> None:
        in_features = shape.target_sizes[targets[0]][0]
        out_sizes = [shape.target_sizes[target][1] for target in targets]
        assert all(shape.target_sizes[target][0] == in_features for target in targets)
        self.first_site = layer * len(TARGETS) + targets[0]
        self.num_parts = len(targets)
        self._in_features = in_features
        self.out_bounds = (0, *accumulate(out_sizes))
        self.weight = Weight(backend.allocate(self.out_bounds[-1], in_features))
        self.merged: Weight | None = None
        self.bias_O = backend.allocate(self.out_bounds[-1]) if has_bias else None
        self._kernels = backend.kernels
        self._paths = [module_path(layer, target) for target in targets]

    def forward(self, x_TI: Tensor, batch: Batch) -> Tensor:
        """y [T, O] of x's dtype, a new tensor. x must be contiguous where the batch has tiles."""
        tiles, kernels = batch.tiles, self._kernels
        weight = self.weight if self.merged is None else self.merged
        if tiles is None or not tiles.changes(self.first_site, self.num_parts):
            return multiply(kernels, weight, x_TI, self.bias_O)
        if weight.panels is None or tiles.part_tiles(self.first_site, self.num_parts) == 0:
            y_TO = multiply(kernels, weight, x_TI, self.bias_O)
            h_QTR = shrink(kernels, x_TI, batch.pool, tiles, self.first_site, self.num_parts)
        else:
            y_TO, h_QTR = kernels.linear_shrink(
                x_TI,
                weight.panels,
                self.bias_O,
                batch.pool,
                tiles,
                self.first_site,
                self.num_parts,
            )
        kernels.lora_expand_(y_TO, h_QTR, batch.pool, tiles, self.first_site, self.out_bounds)
        return y_TO

    @property
    def sites(self) -> range:
        """Those of its parts."""
        return range(self.first_site, self.first_site + self.num_parts)

    def weight_norm(self) -> float:
        """The root of the sum of the squares of the base's weight."""
        return self.weight.norm(self._kernels)

    def update_norm(self, pool: Tensor, tiles: TileTable) -> float:
        """Likewise, of what merging the one adapter of `tiles` would add to it."""
        place = self.first_site, self.out_bounds, self._in_features
        return reference_merging.update_norm(pool, tiles, *place)

    def update_bound(self, pool: Tensor, tiles: TileTable) -> float:
        """What `update_norm` is not above, in a small part of its time."""
        place = self.first_site, self.out_bounds, self._in_features
        return reference_merging.update_bound(pool, tiles, *place)

    @property
    def keeps_copies(self) -> bool:
        """Whether a merged copy's memory serves the next one; if not, each is packed anew."""
        return self.weight.panels is not None or not self.weight.is_packed

    def blank_copy(self) -> Weight:
        """Memory for merged copies, without values; see `Weight.blank`."""
        return self.weight.blank(self._kernels)

    def start_merging(self, spare: Weight | None = None) -> MergedCopy:
        """A copy of the weight to merge an adapter into, in `spare`'s memory if it is one that such
        a copy has left; nothing is in use yet."""
        return MergedCopy(self.weight, spare, self._kernels, (self.first_site, self.out_bounds))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and the slices of the fused tensors they fill (copies once packed)."""
        weight_OI = self.weight.rows
        for path, rows in self.parts():
            yield f"{path}.weight", weight_OI[rows]
            if self.bias_O is not None:
                yield f"{path}.bias", self.bias_O[rows]

    def parts(self) -> Iterator[tuple[str, slice]]:
        """The path of each target and its rows of the fused weight."""
        for path, (low, high) in zip(self._paths, pairwise(self.out_bounds), strict=True):
            yield path, slice(low, high)


def shrink(
    kernels: Kernels,
    x_TI: Tensor,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    num_parts: int,
) -> Tensor:
    """What `lora_expand_` reads: h [Q, T, R] float32; R is 0 where there are gains but no tiles."""
    if tiles.part_tiles(first_site, num_parts) == 0:
        return x_TI.new_empty(num_parts, x_TI.shape[0], 0, dtype=torch.float32)
    return kernels.lora_shrink(x_TI, pool, tiles, first_site, num_parts)
