"""The lm_head and, on top of it, what adapters change for their logit rows.

An adapter replaces its matrix (all, or the rows of some token ids), or adds a low-rank update. Used
by the decoder, on logit rows only.
Legend: Z logit rows, D hidden, V vocabulary, Q parts of the lm_head, R rank columns.
"""

from __future__ import annotations

from torch import Tensor

from loraswarm.core.base_shape import LM_HEAD, BaseShape
from loraswarm.kernels.overlay import multiply_rows
from loraswarm.models.batch import Batch
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.linear import shrink
from loraswarm.models.layers.weight import Weight, multiply


class LmHead:
    """Logits from `weight` [V, D], which the decoder owns.

    Part q of the update is site `head_site + q` and adds to the columns between two of
    `head_bounds()`. All parts of an adapter share one A, so x is projected once.
    """

    def __init__(self, backend: Backend, shape: BaseShape, weight: Weight) -> None:
        self.weight = weight
        self._first_site = shape.head_site
        self._out_bounds = shape.head_bounds()
        self._kernels = backend.kernels

    def forward(self, x_ZD: Tensor, batch: Batch) -> Tensor:
        """[Z, V] float32, a new tensor; rounded to x's dtype first. x must be contiguous.

        What is recorded is computed when it returns.
        """
        tiles, num_parts = batch.head_tiles, len(self._out_bounds) - 1
        has_tiles = tiles is not None and tiles.changes(self._first_site, num_parts)
        if not has_tiles and not batch.head_overlays.get(LM_HEAD):
            logits_ZV = multiply(self._kernels, self.weight, x_ZD, is_float32=True)
            self._kernels.finish()
            return logits_ZV
        logits_ZV = self._multiply(x_ZD, batch)
        if tiles is not None and has_tiles:
            h_1ZR = shrink(self._kernels, x_ZD, batch.pool, tiles, self._first_site, 1)
            self._kernels.finish()
            h_QZR = h_1ZR.repeat(num_parts, 1, 1)
            self._kernels.lora_expand_(
                logits_ZV, h_QZR, batch.pool, tiles, self._first_site, self._out_bounds
            )
            self._kernels.finish()
        return logits_ZV.float()

    def _multiply(self, x_ZD: Tensor, batch: Batch) -> Tensor:
        """x Wᵀ, with each row's own W: [Z, V] of x's dtype, a new tensor.

        Cost    the base's matrix is read once, unless every row has another in its place.
        """
        overlays = batch.head_overlays.get(LM_HEAD, ())
        num_replaced = sum(each.end - each.begin for each in overlays if each.token_ids is None)
        if overlays and num_replaced == x_ZD.shape[0]:
            logits_ZV = x_ZD.new_empty(x_ZD.shape[0], self._out_bounds[-1])
        else:
            logits_ZV = multiply(self._kernels, self.weight, x_ZD)
        self._kernels.finish()
        for overlay in overlays:
            rows = slice(overlay.begin, overlay.end)
            product_ZN = multiply_rows(x_ZD[rows], batch.pool, overlay.rows)
            if overlay.token_ids is None:
                logits_ZV[rows] = product_ZN
            else:
                logits_ZV[rows].index_copy_(1, overlay.token_ids, product_ZN)
        return logits_ZV
