"""An adapter packed for the pool: its bytes as they lie in pages, ready for one copy per piece.

Knows how tensors become those bytes; not where in the pool they go (AdapterCache) nor when
(PageCopier). Written by the loader, held by HostCache. Needs torch only while packing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from loraswarm.adapters.adapter import AdapterInfo, SharedMatrix
from loraswarm.core.base_shape import BaseShape
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.packing import Packing
from loraswarm.memory.tile_layout import (
    AdapterLayout,
    Block,
    BlockKind,
    SharedLayout,
    adapter_layout,
    shared_layout,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraswarm.adapters.adapter import Adapter

Allocate = Callable[[int], np.ndarray]
"""Gives that many bytes to write to: uint8, not necessarily cleared."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterImage:
    """The pieces of an adapter's packing one after the other, whole pages first, then extents.

        own   | page | page | ... | extent | extent | ...        padding is zero

    `info` has no plan. `own` is uint8 and read only, as is each matrix of `shared`: those of
    `info.shared_matrices()` that were packed with it. Arrays are immutable: they may be mapped
    files or memory that a page copy reads right now.
    """

    info: AdapterInfo
    own: np.ndarray
    shared: Mapping[SharedMatrix, np.ndarray] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of `own`."""
        return self.own.nbytes


def piece_bytes(packing: Packing, geometry: PageGeometry) -> list[int]:
    """The size of each piece of a packing."""
    extents = [size * geometry.element_bytes for sizes in packing.bins for size in sizes]
    return [geometry.page_bytes] * packing.num_pages + extents


def image_bytes(packing: Packing, geometry: PageGeometry) -> int:
    """The size of all pieces together."""
    return sum(piece_bytes(packing, geometry))


def pack_adapter(
    adapter: Adapter,
    shape: BaseShape,
    geometry: PageGeometry,
    allocate: Allocate,
    skip: Collection[SharedMatrix] = (),
) -> AdapterImage:
    """Pack an adapter, and the shared matrices it uses but those to `skip`.

    `allocate` is called for `own` first, then for each shared matrix in order; never for 0 bytes.
    Cost    about one copy of the bytes.
    Raises  AdapterError if a row of it is longer than a page.
    """
    layout = adapter_layout(adapter.info, shape, geometry)
    own = _allocated(allocate, image_bytes(layout.packing, geometry))
    write_own(adapter, layout, geometry, own)
    shared = {}
    for matrix in adapter.info.shared_matrices():
        if matrix in skip:
            continue
        matrix_layout = shared_layout(matrix.num_rows, matrix.width, shape, geometry)
        out = _allocated(allocate, image_bytes(matrix_layout.packing, geometry))
        write_shared(adapter.shared[matrix.digest], matrix_layout, geometry, out)
        shared[matrix] = _read_only(out)
    return AdapterImage(replace(adapter.info, plan=None), _read_only(own), shared)


def write_own(
    adapter: Adapter, layout: AdapterLayout, geometry: PageGeometry, out: np.ndarray
) -> None:
    """Write what is the adapter's alone to `out`: uint8 [image_bytes(layout.packing)]."""
    weights = {module.info.site: module for module in adapter.modules}

    def tensor_of(kind: BlockKind, index: int) -> Tensor:
        if kind == "overlay":
            return adapter.overlays[index]
        if kind == "a" or kind == "bt":
            matrix = weights[index].a_RI if kind == "a" else weights[index].bt_RO
            assert matrix is not None, f"no {kind} at site {index}"
            return matrix
        return weights[index].vectors[kind][None]

    _write(layout, geometry, out, tensor_of)


def write_shared(
    values: Tensor, layout: SharedLayout, geometry: PageGeometry, out: np.ndarray
) -> None:
    """Write a shared matrix [num_rows, width] to `out`: uint8 [image_bytes(layout.packing)]."""
    _write(layout, geometry, out, lambda kind, index: values)


class _Run(NamedTuple):
    """Blocks that follow each other in their tensor and in the image; columns in bytes.

    `number` is the blocks' `index`.
    """

    kind: BlockKind
    number: int
    rows: slice
    columns: slice
    begin: int
    end: int


class _Runs(NamedTuple):
    """What an image consists of, in order: runs, and the padding between and after them."""

    runs: tuple[_Run, ...]
    padding: tuple[slice, ...]
    num_bytes: int


def _write(
    layout: AdapterLayout | SharedLayout,
    geometry: PageGeometry,
    out: np.ndarray,
    tensor_of: Callable[[BlockKind, int], Tensor],
) -> None:
    # Imported here: who only holds images must not need torch.
    import torch

    runs, padding, num_bytes = _runs(layout, geometry)
    assert out.dtype == np.uint8
    assert out.nbytes == num_bytes
    sources: dict[tuple[BlockKind, int], np.ndarray] = {}
    for kind, number, rows, columns, begin, end in runs:
        source = sources.get((kind, number))
        if source is None:
            matrix = tensor_of(kind, number)
            assert matrix.dtype.itemsize == _item_bytes(kind, geometry), f"{kind}: {matrix.dtype}"
            source = sources[kind, number] = _as_bytes(matrix, torch.uint8)
        part = source[rows, columns]
        out[begin:end].reshape(part.shape)[:] = part
    for gap in padding:
        out[gap] = 0


@lru_cache(maxsize=64)
def _runs(layout: AdapterLayout | SharedLayout, geometry: PageGeometry) -> _Runs:
    """Adapters of one recipe share a layout, so this is worked out once for each recipe."""
    sizes = piece_bytes(layout.packing, geometry)
    begins = list(accumulate(sizes, initial=0))
    runs: list[_Run] = []
    for block, (piece, element) in zip(layout.blocks, layout.packing.places, strict=True):
        run = _run_of(block, begins[piece] + element * geometry.element_bytes, geometry)
        if runs and _continues(runs[-1], run):
            rows = slice(runs[-1].rows.start, run.rows.stop)
            runs[-1] = runs[-1]._replace(rows=rows, end=run.end)
        else:
            runs.append(run)
    runs.sort(key=lambda run: run.begin)
    gaps, end = [], 0
    for run in runs:
        gaps.append(slice(end, run.begin))
        end = run.end
    gaps.append(slice(end, begins[-1]))
    padding = tuple(gap for gap in gaps if gap.start < gap.stop)
    return _Runs(tuple(runs), padding, begins[-1])


def _run_of(block: Block, begin: int, geometry: PageGeometry) -> _Run:
    item_bytes = _item_bytes(block.kind, geometry)
    first = block.first_column * item_bytes
    width = block.num_columns * item_bytes
    rows = slice(block.first_row, block.first_row + block.num_rows)
    columns = slice(first, first + width)
    return _Run(block.kind, block.index, rows, columns, begin, begin + block.num_rows * width)


def _continues(run: _Run, other: _Run) -> bool:
    return (
        (run.kind, run.number, run.columns) == (other.kind, other.number, other.columns)
        and run.rows.stop == other.rows.start
        and run.end == other.begin
    )


def _item_bytes(kind: BlockKind, geometry: PageGeometry) -> int:
    """Vectors are float32, the rest is in the base's dtype."""
    return 4 if kind in ("u", "v", "g", "c") else geometry.element_bytes


def _as_bytes(matrix: Tensor, byte: torch.dtype) -> np.ndarray:
    """The bytes of each row of a matrix in host memory; no copy where rows are contiguous."""
    found: np.ndarray = matrix.detach().contiguous().view(byte).numpy()
    return found


def _allocated(allocate: Allocate, num_bytes: int) -> np.ndarray:
    return allocate(num_bytes) if num_bytes else np.empty(0, dtype=np.uint8)


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
