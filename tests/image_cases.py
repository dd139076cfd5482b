"""Loads and images of made-up adapters, and the plain way to write an adapter into the pool."""

from __future__ import annotations

import numpy as np
import torch

from loraswarm.adapters.adapter import Adapter, AdapterInfo
from loraswarm.core.base_shape import BaseShape
from loraswarm.memory.adapter_cache import AdapterLoad
from loraswarm.memory.geometry import PageGeometry, page_geometry
from loraswarm.memory.image import AdapterImage, pack_adapter
from loraswarm.memory.memory import Memory
from loraswarm.memory.packing import Packing
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_layout import Block
from loraswarm.memory.tile_store import TileStore
from memory_cases import random_adapter

SHAPE = BaseShape(
    num_layers=2,
    num_kv_heads=2,
    head_size=16,
    vocab_size=997,
    target_sizes=((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)),
)
DIRTY = 0xA5


class Places:
    """A pool full of dirt, loads into it, and the tile store over it."""

    def __init__(self, dtype: torch.dtype, num_pages: int = 200) -> None:
        self.dtype = dtype
        self.geometry = page_geometry(SHAPE, dtype.itemsize)
        self.adapters = Memory.of_pages(num_pages, SHAPE, self.geometry).adapters
        self.buffer = PageBuffer(num_pages, SHAPE, self.geometry, dtype, torch.device("cpu"))
        self.bytes = self.buffer.pool.view(torch.uint8).numpy()
        self.bytes[:] = DIRTY
        self.tiles = TileStore(self.buffer, SHAPE)

    def load(self, info: AdapterInfo) -> AdapterLoad:
        load = self.adapters.pin(info)
        assert load is not None
        return load

    def image(self, info: AdapterInfo) -> AdapterImage:
        return pack(random_adapter(info, SHAPE, self.dtype), self.geometry)


def pack(adapter: Adapter, geometry: PageGeometry, skip=()) -> AdapterImage:
    """The adapter's image, in memory that was full of dirt."""
    return pack_adapter(adapter, SHAPE, geometry, dirty_memory, skip)


def dirty_memory(num_bytes: int) -> np.ndarray:
    return np.full(num_bytes, DIRTY, dtype=np.uint8)


def write_plainly(pool: torch.Tensor, load: AdapterLoad, adapter: Adapter) -> None:
    """Write an adapter and what it shares into a flat pool, block after block."""
    weights = {module.info.site: module for module in adapter.modules}
    for place in load.shared:
        values = adapter.shared[place.matrix.digest]
        for block, offset in zip(
            place.layout.blocks, offsets(place.layout.packing, place.starts), strict=True
        ):
            write_block(pool, offset, part_of(values, block))
    own_offsets = offsets(load.layout.packing, load.starts)
    for block, offset in zip(load.layout.blocks, own_offsets, strict=True):
        if block.kind == "overlay":
            write_block(pool, offset, part_of(adapter.overlays[block.index], block))
            continue
        module = weights[block.index]
        if block.kind in ("a", "bt"):
            matrix = module.a_RI if block.kind == "a" else module.bt_RO
            write_block(pool, offset, part_of(matrix, block))
        else:
            vector = part_of(module.vectors[block.kind][None], block)
            begin = offset * pool.itemsize // 4
            pool.view(torch.float32)[begin : begin + vector.numel()] = vector[0]


def offsets(packing: Packing, starts: tuple[int, ...]) -> list[int]:
    return [starts[piece] + element for piece, element in packing.places]


def part_of(matrix: torch.Tensor, block: Block) -> torch.Tensor:
    rows = slice(block.first_row, block.first_row + block.num_rows)
    return matrix[rows, block.first_column : block.first_column + block.num_columns]


def write_block(pool: torch.Tensor, offset: int, block: torch.Tensor) -> None:
    pool[offset : offset + block.numel()] = block.reshape(-1)
