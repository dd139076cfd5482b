"""What a tile table points to, as tensors: rows of matrices and float32 vectors of the pool.

Checks that they lie inside. Called by the reference kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.kernels.arguments import require


def pool_rows(pool: Tensor, offset: int, stride: int, shape: tuple[int, int]) -> Tensor:
    """Rows of a matrix in the pool, `stride` elements apart: `shape` float32, a copy.

    Raises    ValueError if they are not all in the pool.
    """
    num_rows, width = shape
    last = offset + (num_rows - 1) * stride + width
    require(stride >= width, "tiles.a_stride or tiles.bt_stride is less than a row")
    inside = offset >= 0 and last <= pool.numel()
    require(inside, "a tile lies outside of the pool: tiles.a_offset or tiles.bt_offset")
    return pool[offset:last].as_strided(shape, (stride, 1)).float()


def pool_vector(pool: Tensor, offset: int, size: int, absent: float) -> Tensor:
    """A float32 vector of the pool, or `absent` everywhere where the offset is -1.

    Raises    ValueError if it is not all in the pool.
    """
    if offset < 0:
        return torch.full((size,), absent, device=pool.device)
    floats = pool.view(torch.float32)
    inside = offset + size <= floats.numel()
    require(inside, "a vector lies outside of the pool: tiles.u_offset, v_offset or gain_offset")
    return floats[offset : offset + size]
