"""The table of token embeddings and, on top of it, what adapters change for their tokens.

An adapter replaces rows of the table (all, or those of some token ids), or adds a low-rank update
whose wide side, A transposed, lies in the pool as an overlay of its own. Used by the decoder.
Legend: T tokens, V vocabulary, D hidden, R rank columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraswarm.adapters.adapter import EMBEDDING_A
from loraswarm.core.base_shape import EMBEDDING, BaseShape
from loraswarm.kernels import MAX_TILE_RANKS, TileTable
from loraswarm.kernels.overlay import Overlay, gather_rows
from loraswarm.models.batch import Batch
from loraswarm.models.layers.backend import Backend


class Embedding:
    """Rows of `table` [V, D], which the decoder owns; it may be packed by the kernels."""

    def __init__(self, backend: Backend, shape: BaseShape, table: Tensor) -> None:
        self.table: Any = table
        self._site = shape.embedding_site
        self._kernels = backend.kernels

    def forward(self, batch: Batch) -> Tensor:
        """The embedding of each token: [T, D] of the table's dtype, a new tensor.

        Semantics, for token t with id i:
            y[t] = row i of the overlay that replaces it, else of the table
            y[t] = g * (y[t] + v * (Bt^T (scale * u * At[i]))) + c, with tiles or gains
        """
        x_TD = self._look_up(batch.token_ids)
        for overlay in batch.overlays.get(EMBEDDING, ()):
            tokens = slice(overlay.begin, overlay.end)
            ids_T = batch.token_ids[tokens]
            x_TD[tokens] = _replaced(x_TD[tokens], ids_T, overlay, batch.pool)
        tiles = batch.tiles
        if tiles is not None and tiles.changes(self._site, 1):
            h_QTR = self._shrink(batch, tiles)
            bounds = (0, x_TD.shape[1])
            self._kernels.lora_expand_(x_TD, h_QTR, batch.pool, tiles, self._site, bounds)
        return x_TD

    def _look_up(self, ids_T: Tensor) -> Tensor:
        if isinstance(self.table, Tensor):
            return F.embedding(ids_T, self.table)
        rows_TD: Tensor = self.table.look_up(ids_T)
        return rows_TD

    def _shrink(self, batch: Batch, tiles: TileTable) -> Tensor:
        """A times the one-hot of each token is a row of At: h [1, T, R] float32.

        NaN where no adapter writes: expand does not read it.
        """
        num_columns = MAX_TILE_RANKS * tiles.part_tiles(self._site, 1)
        sizes = (1, len(batch.token_ids), num_columns)
        h_QTR = torch.full(sizes, float("nan"), dtype=torch.float32, device=batch.pool.device)
        for overlay in batch.overlays.get(EMBEDDING_A, ()):
            ids_T = batch.token_ids[overlay.begin : overlay.end]
            at_TR = gather_rows(batch.pool, overlay.rows, ids_T)
            columns = slice(overlay.first_column, overlay.first_column + overlay.rows.width)
            h_QTR[0, overlay.begin : overlay.end, columns] = at_TR
        return h_QTR


def _replaced(x_TD: Tensor, ids_T: Tensor, overlay: Overlay, pool: Tensor) -> Tensor:
    """Embeddings of the tokens of one overlay: [T, D], x where it has no row for an id."""
    if overlay.token_ids is None:
        return gather_rows(pool, overlay.rows, ids_T)
    row_T = torch.searchsorted(overlay.token_ids, ids_T).clamp_(max=overlay.rows.num_rows - 1)
    found_T = overlay.token_ids[row_T] == ids_T
    return torch.where(found_T[:, None], gather_rows(pool, overlay.rows, row_T), x_TD)
