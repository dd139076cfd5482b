"""The base linear and, on top of it, the tiles of each token's adapters.

Knows adapters only as an optional tile table. Owns the fused weight of one or more target linears
that read the same input.
Legend: T tokens, I in features, O out features, Q parts of a fused linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from loraswarm.core.base_shape import TARGETS, BaseShape, module_path
from loraswarm.kernels import Kernels, TileTable
from loraswarm.models.batch import Batch
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.weight import Weight, multiply


class LoraLinear:
    """Adjacent targets of one layer as one linear: y = x Wᵀ + b, then the adapters' updates.

        weight  | q_proj [Oq, I] | k_proj [Ok, I] | v_proj [Ov, I] |      one GEMM for all parts
                0                Oq               Oq + Ok          O      = out_bounds

    Part q of a batch's tiles is site `first_site + q`.
    """

    def __init__(
        self, backend: Backend, shape: BaseShape, layer: int, targets: range, has_bias: bool
    ) -> None:
        in_features = shape.target_sizes[targets[0]][0]
        out_sizes = [shape.target_sizes[target][1] for target in targets]
        assert all(shape.target_sizes[target][0] == in_features for target in targets)
        self.first_site = layer * len(TARGETS) + targets[0]
        self.num_parts = len(targets)
        self.out_bounds = (0, *accumulate(out_sizes))
        self.weight = Weight(backend.allocate(self.out_bounds[-1], in_features))
        self.bias_O = backend.allocate(self.out_bounds[-1]) if has_bias else None
        self._kernels = backend.kernels
        self._paths = [module_path(layer, target) for target in targets]

    def forward(self, x_TI: Tensor, batch: Batch) -> Tensor:
        """y [T, O] of x's dtype, a new tensor. x must be contiguous where the batch has tiles."""
        tiles, kernels = batch.tiles, self._kernels
        if tiles is None or not tiles.changes(self.first_site, self.num_parts):
            return multiply(kernels, self.weight, x_TI, self.bias_O)
        if self.weight.panels is None or tiles.part_tiles(self.first_site, self.num_parts) == 0:
            y_TO = multiply(kernels, self.weight, x_TI, self.bias_O)
            h_QTR = shrink(kernels, x_TI, batch.pool, tiles, self.first_site, self.num_parts)
        else:
            y_TO, h_QTR = kernels.linear_shrink(
                x_TI,
                self.weight.panels,
                self.bias_O,
                batch.pool,
                tiles,
                self.first_site,
                self.num_parts,
            )
        kernels.lora_expand_(y_TO, h_QTR, batch.pool, tiles, self.first_site, self.out_bounds)
        return y_TO

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
