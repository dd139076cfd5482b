"""Records the merging of an adapter into a packed weight. Called through kernels/cpu.

Adapters of too many ranks for a thread's scratch memory are merged by torch: their arithmetic, not
the order of memory, is what takes time.
"""

from __future__ import annotations

from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS, TileTable, reference_merging
from loraswarm.kernels.arguments import require
from loraswarm.kernels.cpu.dot import PANEL_COLUMNS
from loraswarm.kernels.cpu.linear import ITEM_BYTES, PackedWeight
from loraswarm.kernels.cpu.merge_panels import MAX_RANKS
from loraswarm.kernels.cpu.operations import MERGE
from loraswarm.kernels.cpu.program import programs
from loraswarm.kernels.cpu.table import LastPlan
from loraswarm.kernels.huge_pages import empty_in_huge_pages
from loraswarm.kernels.reference_merging import add_tiles, check_merge

BLOCK_ROWS = 8 * PANEL_COLUMNS
_last_plan = LastPlan()
"""Not that of the steps, between which weights are merged."""


def empty_linear(weight: PackedWeight) -> PackedWeight:
    """See `kernels.reference.empty_linear`."""
    panels = empty_in_huge_pages((weight.panels.numel(),), weight.panels.dtype)
    panels.zero_()
    return PackedWeight(panels, weight.out_features, weight.in_features)


def linear_norm(weight: PackedWeight) -> float:
    """See `kernels.reference.linear_norm`; what pads the last panel is zero."""
    return reference_merging.linear_norm(weight.panels)


def merge_linear_(
    merged: PackedWeight,
    weight: PackedWeight,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
    rows: tuple[int, int],
) -> None:
    """See `kernels.reference.merge_linear_`."""
    check_merge(weight.out_features, tiles, first_site, out_bounds, rows)
    _check_weights(merged, weight, pool)
    first_panel, end_panel = rows[0] // PANEL_COLUMNS, -(-rows[1] // PANEL_COLUMNS)
    num_parts, num_panels = len(out_bounds) - 1, end_panel - first_panel
    if num_panels == 0:
        return
    plan = _last_plan.of(tiles, pool)
    plan.shrink_work(first_site, num_parts, weight.in_features)
    work = plan.expand_work(first_site, out_bounds)
    max_ranks = MAX_TILE_RANKS * sum(tiles.max_tiles[first_site : first_site + num_parts])
    if max_ranks > MAX_RANKS:
        _merge_by_torch(merged, weight, pool, tiles, first_site, out_bounds, rows)
        return
    panel_elements = PANEL_COLUMNS * weight.in_features
    panels_per_item = max(1, ITEM_BYTES // (panel_elements * pool.element_size()))
    words, _, _, _, _, widths = work.arguments
    programs.add(
        MERGE,
        -(-num_panels // panels_per_item),
        (
            weight.address,
            merged.address,
            weight.in_features // 2,
            first_panel,
            end_panel,
            panels_per_item,
            pool.data_ptr(),
            words,
            first_site,
            num_parts,
            widths,
        ),
        pool.dtype,
        num_panels * panel_elements * MAX_TILE_RANKS,
    )
    if programs.is_recording:
        programs.hold(plan)


def _check_weights(merged: PackedWeight, weight: PackedWeight, pool: Tensor) -> None:
    require(
        (merged.out_features, merged.in_features, merged.panels.dtype)
        == (weight.out_features, weight.in_features, weight.panels.dtype),
        "merged has another size or dtype than the weight",
    )
    require(merged.address != weight.address, "merged is the weight itself")
    require(pool.dim() == 1 and pool.is_contiguous(), "pool must be a contiguous flat tensor")
    require(
        pool.dtype == weight.panels.dtype,
        f"pool is {pool.dtype}, the weight is {weight.panels.dtype}",
    )


def _merge_by_torch(
    merged: PackedWeight,
    weight: PackedWeight,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
    rows: tuple[int, int],
) -> None:
    """A block of rows after the other, each time out of its panels and into others."""
    programs.finish()
    shape = -1, weight.in_features // 2, PANEL_COLUMNS, 2
    sources, targets = weight.panels.view(shape), merged.panels.view(shape)
    for begin in range(rows[0], rows[1], BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, rows[1])
        panels = slice(begin // PANEL_COLUMNS, -(-end // PANEL_COLUMNS))
        row_NI = sources[panels].permute(0, 2, 1, 3).reshape(-1, weight.in_features).float()
        add_tiles(row_NI[: end - begin], pool, tiles, first_site, out_bounds, begin)
        row_panels = row_NI.view(-1, PANEL_COLUMNS, weight.in_features // 2, 2)
        targets[panels] = row_panels.permute(0, 2, 1, 3)
