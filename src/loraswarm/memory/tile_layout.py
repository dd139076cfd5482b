"""How an adapter is cut into blocks and tiles, and where its blocks go. Arithmetic only, no torch.

A block is contiguous inside one page: rows of A, of Bt or of an overlay, or a vector. Knows sizes,
not values; adapters of one recipe share a layout. Called by AdapterCache, read by TileStore.
Legend: B blocks, N tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from loraswarm.adapters.adapter import AdapterInfo, ModuleInfo, SharedMatrix, VectorName
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError
from loraswarm.memory.geometry import TILE_RANKS, PageGeometry
from loraswarm.memory.packing import Packing, pack

NOTHING = -1
BlockKind = Literal["a", "bt", "overlay", VectorName]


class ModuleRecipe(NamedTuple):
    """What decides the blocks of a module; shared matrices are numbered within the adapter."""

    site: int
    rank: int
    vectors: tuple[VectorName, ...]
    shared_a: int | None
    shared_bt: int | None


class Recipe(NamedTuple):
    """What decides an adapter's layout: modules, and [rows, width] of shared ones and overlays."""

    modules: tuple[ModuleRecipe, ...]
    shared: tuple[tuple[int, int], ...]
    overlays: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Part of one tensor: these rows and columns of A, Bt or overlay, or columns of a vector.

    `index` is the site of the module, or the overlay's place in the adapter. A vector is one row.
    """

    kind: BlockKind
    index: int
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int


@dataclass(frozen=True, slots=True, eq=False)
class TileRefs:
    """Tiles ordered by site and rank, and what each is made of, as references to blocks.

        reference   | blocks of shared matrix 0 | of shared matrix 1 | own blocks |  NOTHING
                      0, 1, ...                                                      -1

    `module` is the place of the tile's module in the adapter. NOTHING is a part that is absent.

    Shapes    [N] int64 each; gain_refs [sites, 2]: of g and of c.
    """

    sites: np.ndarray
    modules: np.ndarray
    first_ranks: np.ndarray
    num_ranks: np.ndarray
    a_refs: np.ndarray
    bt_refs: np.ndarray
    u_refs: np.ndarray
    v_refs: np.ndarray
    gain_refs: np.ndarray


class OverlayRefs(NamedTuple):
    """The blocks of an overlay in order: `rows_per_block` rows each, the last one what remains."""

    refs: range
    rows_per_block: int


@dataclass(frozen=True, slots=True, eq=False)
class AdapterLayout:
    """An adapter's own blocks, where they go, and the tiles over them.

    `widths` has the columns of the block of every reference, and 0 for NOTHING.
    """

    blocks: tuple[Block, ...]
    packing: Packing
    tiles: TileRefs
    widths: np.ndarray
    overlays: tuple[OverlayRefs, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SharedLayout:
    """The blocks of a shared matrix and where they go: column part by column part, then by rows."""

    blocks: tuple[Block, ...]
    packing: Packing


class AdapterBytes(NamedTuple):
    """Bytes in the pool: of the adapter alone, and of matrices it may share with others."""

    own: int
    shared: int


def adapter_bytes(info: AdapterInfo, shape: BaseShape, geometry: PageGeometry) -> AdapterBytes:
    """What the adapter takes in the pool, without what is left over in its pages."""
    own = adapter_layout(info, shape, geometry).packing.num_elements
    shared = sum(
        shared_layout(matrix.num_rows, matrix.width, shape, geometry).packing.num_elements
        for matrix in info.shared_matrices()
    )
    return AdapterBytes(own * geometry.element_bytes, shared * geometry.element_bytes)


def adapter_layout(info: AdapterInfo, shape: BaseShape, geometry: PageGeometry) -> AdapterLayout:
    """The layout of an adapter's own blocks; adapters of one recipe get the same object.

    Cost    O(blocks log blocks) for a recipe that is new.
    Raises  AdapterError naming the adapter, if one of its rows or vectors is longer than a page.
    """
    numbers = {matrix: number for number, matrix in enumerate(info.shared_matrices())}
    recipe = Recipe(
        modules=tuple(_module_recipe(module, numbers) for module in info.modules),
        shared=tuple((matrix.num_rows, matrix.width) for matrix in numbers),
        overlays=tuple((overlay.num_rows, overlay.width) for overlay in info.overlays),
    )
    longest = max(_row_elements(info, geometry), default=0)
    if longest > geometry.page_elements:
        raise AdapterError(
            f"adapter {info.name!r}: rank {info.max_rank:,} makes a row of {longest:,} elements; a"
            f" page of this base holds {geometry.page_elements:,}. Train it with a lower rank"
        )
    return _recipe_layout(recipe, shape, geometry)


def _row_elements(info: AdapterInfo, geometry: PageGeometry) -> Iterator[int]:
    """Elements of what the rank makes long: u, and rows of overlays; the rest is as wide as the
    base."""
    for module in info.modules:
        if "u" in module.vectors:
            yield module.rank * geometry.float32_elements
    for overlay in info.overlays:
        yield overlay.width


@lru_cache(maxsize=64)
def shared_layout(
    num_rows: int, width: int, shape: BaseShape, geometry: PageGeometry
) -> SharedLayout:
    """The layout of a shared matrix [num_rows, width].

    A matrix wider than any linear is one for the lm_head, and is cut by columns like it.
    """
    bounds = (*range(0, width, shape.widest()), width)
    blocks = tuple(
        Block("bt", 0, first_row, ranks, first_column, end - first_column)
        for first_column, end in pairwise(bounds)
        for first_row, ranks in _rank_cuts(num_rows)
    )
    return SharedLayout(blocks, pack((b.num_rows * b.num_columns for b in blocks), geometry))


@lru_cache(maxsize=256)
def _recipe_layout(recipe: Recipe, shape: BaseShape, geometry: PageGeometry) -> AdapterLayout:
    sites = [module.site for module in recipe.modules]
    assert sites == sorted(set(sites)), "modules must be sorted by site, each site once"
    cutter = _Cutter(recipe, shape)
    for number, module in enumerate(recipe.modules):
        cutter.add_module(number, module)
    overlays = []
    for index, (num_rows, width) in enumerate(recipe.overlays):
        assert width <= geometry.page_elements, "a row of an overlay is wider than a page"
        rows_per_block = min(num_rows, geometry.page_elements // width)
        refs = cutter.add_overlay(index, width, num_rows, rows_per_block)
        overlays.append(OverlayRefs(refs, rows_per_block))
    shared = [
        block
        for num_rows, width in recipe.shared
        for block in shared_layout(num_rows, width, shape, geometry).blocks
    ]
    blocks = tuple(cutter.blocks)
    return AdapterLayout(
        blocks=blocks,
        packing=pack((_num_elements(block, geometry) for block in blocks), geometry),
        tiles=cutter.refs(),
        widths=np.array([block.num_columns for block in (*shared, *blocks)] + [0]),
        overlays=tuple(overlays),
    )


class _Cutter:
    """Cuts modules into blocks and tiles; `num_shared` blocks precede its own in references."""

    def __init__(self, recipe: Recipe, shape: BaseShape) -> None:
        self.blocks: list[Block] = []
        self._shape = shape
        self._shared = recipe.shared
        self._rows: list[tuple[int, ...]] = []
        self._gains = np.full((shape.num_sites(), 2), NOTHING)
        self._first_shared: list[int] = []
        self._num_shared = 0
        for num_rows, width in recipe.shared:
            self._first_shared.append(self._num_shared)
            self._num_shared += -(-num_rows // TILE_RANKS) * -(-width // shape.widest())

    def add_module(self, number: int, module: ModuleRecipe) -> None:
        """Append the module's blocks and tiles, part by part where it is the lm_head."""
        shape, site = self._shape, module.site
        in_size, out_size = shape.site_sizes(site)
        bounds = shape.head_bounds() if site == shape.head_site else (0, out_size)
        cuts = list(_rank_cuts(module.rank))
        a_refs = [NOTHING] * len(cuts)
        if site != shape.embedding_site:
            a_refs = self._matrix(module, "a", (0, in_size), 0)
        u_ref = self._vector(module, "u", (0, module.rank))
        for part, columns in enumerate(pairwise(bounds)):
            bt_refs = self._matrix(module, "bt", columns, part)
            v_ref = self._vector(module, "v", columns)
            self._gains[site + part] = [self._vector(module, name, columns) for name in ("g", "c")]
            for (first, count), a_ref, bt_ref in zip(cuts, a_refs, bt_refs, strict=True):
                row = (site + part, number, first, count, a_ref, bt_ref, u_ref, v_ref)
                self._rows.append(row)

    def add_overlay(self, index: int, width: int, num_rows: int, rows_per_block: int) -> range:
        """Append the overlay's blocks; returns their references."""
        first_ref = self._next_ref()
        for row in range(0, num_rows, rows_per_block):
            count = min(rows_per_block, num_rows - row)
            self.blocks.append(Block("overlay", index, row, count, 0, width))
        return range(first_ref, self._next_ref())

    def refs(self) -> TileRefs:
        """The tiles of the modules so far."""
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, 8)
        site_N, module_N, first_N, count_N, a_N, bt_N, u_N, v_N = (
            column.copy() for column in rows.T
        )
        return TileRefs(site_N, module_N, first_N, count_N, a_N, bt_N, u_N, v_N, self._gains)

    def _matrix(
        self, module: ModuleRecipe, kind: Literal["a", "bt"], columns: tuple[int, int], part: int
    ) -> list[int]:
        """References to the rank cuts of these columns of A or Bt, own or shared."""
        begin, end = columns
        cuts = list(_rank_cuts(module.rank))
        shared = module.shared_a if kind == "a" else module.shared_bt
        if shared is not None:
            assert end <= self._shared[shared][1], "a shared matrix is narrower than its module"
            first = self._first_shared[shared] + part * len(cuts)
            return list(range(first, first + len(cuts)))
        first = self._next_ref()
        self.blocks += [
            Block(kind, module.site, row, count, begin, end - begin) for row, count in cuts
        ]
        return list(range(first, self._next_ref()))

    def _vector(self, module: ModuleRecipe, name: VectorName, columns: tuple[int, int]) -> int:
        if name not in module.vectors:
            return NOTHING
        begin, end = columns
        self.blocks.append(Block(name, module.site, 0, 1, begin, end - begin))
        return self._next_ref() - 1

    def _next_ref(self) -> int:
        return self._num_shared + len(self.blocks)


def _module_recipe(module: ModuleInfo, numbers: dict[SharedMatrix, int]) -> ModuleRecipe:
    for matrix in (module.shared_a, module.shared_bt):
        assert matrix is None or matrix.num_rows == module.rank
    return ModuleRecipe(
        site=module.site,
        rank=module.rank,
        vectors=module.vectors,
        shared_a=None if module.shared_a is None else numbers[module.shared_a],
        shared_bt=None if module.shared_bt is None else numbers[module.shared_bt],
    )


def _rank_cuts(rank: int) -> Iterator[tuple[int, int]]:
    """(first rank, number of ranks) of each tile."""
    return ((first, min(TILE_RANKS, rank - first)) for first in range(0, rank, TILE_RANKS))


def _num_elements(block: Block, geometry: PageGeometry) -> int:
    """Elements of the pool; vectors are float32."""
    size = block.num_rows * block.num_columns
    is_vector = block.kind in ("u", "v", "g", "c")
    return size * geometry.float32_elements if is_vector else size
