"""Merging into a weight: one rounding of the exact sum at any size; nothing else is written."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel_cases import use_all_threads
from loraswarm.kernels import cpu, reference
from loraswarm.kernels.cpu.dot import HAS_DOT
from loraswarm.kernels.cpu.merge_panels import MAX_RANKS
from loraswarm.kernels.reference_merging import MERGE_ROWS, update_bound, update_norm
from tile_factory import SiteWeights, TilePool

FIRST_SITE, NUM_SITES = 1, 5
# (in features, rows of each part, rank, vectors)
CASES = (
    (2, (1,), 1, ""),
    (34, (7,), 5, ""),
    (100, (33, 20, 45), 17, "uv"),
    (130, (64, 32, 1), 40, "v"),
    (896, (133, 0, 128), 16, "u"),
    (258, (31, 1, 101), 64, "uvgc"),
    (66, (70, 33), MAX_RANKS, "uv"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# By dtype half a unit in the last place of 1, and what no number is smaller than in units of it.
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}


@pytest.fixture(autouse=True)
def many_threads(monkeypatch):
    use_all_threads(monkeypatch)


class Case:
    """A weight and one adapter of which the second part, if there are three, has no tiles."""

    def __init__(self, case, dtype: torch.dtype, seed: int = 0) -> None:
        in_features, out_sizes, rank, vectors = case
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(kind)

        self.weight = numbers(sum(out_sizes), in_features) * in_features**-0.5
        self.out_bounds = (0, *itertools.accumulate(out_sizes))
        self.sites = {}
        for part, size in enumerate(out_sizes):
            if part == 1 and len(out_sizes) == 3:
                continue
            floats = {
                name: numbers(size if name != "u" else rank, kind=torch.float32) for name in vectors
            }
            a, b = numbers(rank, in_features), numbers(size, rank) * rank**-0.5
            self.sites[FIRST_SITE + part] = SiteWeights(
                a * in_features**-0.5, b, scale=0.75, **floats
            )
        tile_pool = TilePool({"a": self.sites}, dtype)
        self.pool, self.tiles = tile_pool.pool, tile_pool.table(NUM_SITES, [("a", 1)])

    def merged(self, kernels, rows: tuple[int, int] | None = None) -> Tensor:
        """[O, I] as the kernels merge it; rows that are not asked for are zero."""
        packed = kernels.pack_linear(self.weight)
        source = self.weight if packed is None else packed
        target = kernels.empty_linear(source)
        (target if packed is None else target.panels).zero_()
        rows = rows or (0, len(self.weight))
        place = self.pool, self.tiles, FIRST_SITE, self.out_bounds
        kernels.merge_linear_(target, source, *place, rows)
        return target if packed is None else target.unpack()

    def exact(self) -> tuple[Tensor, Tensor]:
        """The sum in float64, and the sum of the sizes of what is added up."""
        total, size = self.weight.double(), self.weight.double().abs()
        for site, weights in self.sites.items():
            low, high = self.out_bounds[site - FIRST_SITE : site - FIRST_SITE + 2]
            u = 1.0 if weights.u is None else weights.u.double()
            v = 1.0 if weights.v is None else weights.v.double()[:, None]
            b, a = weights.scale * u * weights.b.double() * v, weights.a.double()
            total[low:high] += b @ a
            size[low:high] += b.abs() @ a.abs()
        return total, size


def check(case: Case, merged: Tensor) -> None:
    """One rounding to the dtype, and those of float32 sums before."""
    total, size = case.exact()
    assert merged.dtype == case.weight.dtype
    rounding = HALF_UNIT[merged.dtype] * total.abs().clamp(min=SMALLEST[merged.dtype])
    rank = max(weights.a.shape[0] for weights in case.sites.values())
    summing = (rank + 4) * HALF_UNIT[torch.float32] * size
    assert bool(((merged.double() - total).abs() <= rounding + 2 * summing).all())
    assert not torch.equal(merged, case.weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_reference_rounds_the_sum_once(case, dtype):
    built = Case(case, dtype)
    before = built.weight.clone()
    check(built, built.merged(reference))
    assert torch.equal(built.weight, before)


@pytest.mark.skipif(not HAS_DOT, reason="this CPU has no panels")
@pytest.mark.parametrize("case", CASES)
def test_panels_are_merged_as_rows_are(case):
    built = Case(case, torch.bfloat16)
    merged = built.merged(cpu)
    check(built, merged)
    num_other = int((merged != built.merged(reference)).sum())
    assert num_other <= max(2, merged.numel() // 100)  # only where the exact sum is near a tie


@pytest.mark.skipif(not HAS_DOT, reason="this CPU has no panels")
def test_padding_of_the_last_panel_stays_zero():
    built = Case(CASES[1], torch.bfloat16)
    packed = cpu.pack_linear(built.weight)
    target = cpu.empty_linear(packed)
    target.panels.fill_(7.0)
    place = built.pool, built.tiles, FIRST_SITE, built.out_bounds
    cpu.merge_linear_(target, packed, *place, (0, 7))
    assert not bool(target.panels.view(-1, 32, 2)[:, 7:].any())


@pytest.mark.parametrize("kernels", [reference, pytest.param(cpu, id="cpu")])
def test_rows_are_merged_piece_by_piece_and_no_others_are_written(kernels):
    if kernels is cpu and not HAS_DOT:
        pytest.skip("this CPU has no panels")
    built = Case(CASES[3], torch.bfloat16)
    whole = built.merged(kernels)
    for begin, end in ((0, 32), (32, 96), (64, 97), (96, 97), (64, 64)):
        merged = built.merged(kernels, (begin, end))
        assert torch.equal(merged[begin:end], whole[begin:end])
        assert not bool(merged[:begin].any())
        assert not bool(merged[end:].any())


def test_parts_without_tiles_keep_their_bits():
    built = Case(CASES[4], torch.bfloat16)
    for kernels in (reference, cpu) if HAS_DOT else (reference,):
        merged = built.merged(kernels)
        assert torch.equal(merged[133:133], built.weight[133:133])
        gone = replace(built.tiles, ranges=torch.zeros_like(built.tiles.ranges))
        built.tiles, before = gone, built.tiles
        assert torch.equal(built.merged(kernels), built.weight)
        built.tiles = before


def test_the_norm_of_an_update_is_known_without_making_it():
    built = Case(CASES[2], torch.bfloat16)
    total, _ = built.exact()
    expected = float(torch.linalg.vector_norm(total - built.weight.double()))
    found = update_norm(built.pool, built.tiles, FIRST_SITE, built.out_bounds, 100)
    assert found == pytest.approx(expected, rel=1e-4)
    norm = float(torch.linalg.vector_norm(built.weight.double()))
    packed = cpu.pack_linear(built.weight)
    assert reference.linear_norm(built.weight) == pytest.approx(norm, rel=1e-4)
    if packed is not None:
        assert cpu.linear_norm(packed) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_norm_of_an_update_is_not_above_its_bound(case):
    built = Case(case, torch.bfloat16)
    place = FIRST_SITE, built.out_bounds, case[0]
    norm = update_norm(built.pool, built.tiles, *place)
    bound = update_bound(built.pool, built.tiles, *place)
    assert norm <= bound * (1 + 1e-5)
    assert bound < norm * (case[2] + 1)


@pytest.mark.parametrize("kernels", [reference, pytest.param(cpu, id="cpu")])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (1, 32)}, "rows"),
        ({"rows": (0, MERGE_ROWS + 1)}, "rows"),
        ({"rows": (64, 32)}, "rows"),
        ({"rows": (0, 128)}, "rows"),
        ({"out_bounds": (0, 64, 96)}, "out_bounds"),
        ({"first_site": 4}, "sites"),
        ({"tiles": {"a_offset": 1 << 40}}, "outside of the pool"),
        ({"tiles": {"v_offset": 1 << 40}}, "outside of the pool"),
        ({"pool": torch.float32}, "pool is"),
    ],
)
def test_wrong_arguments_are_named(kernels, change, message):
    if kernels is cpu and not HAS_DOT:
        pytest.skip("this CPU has no panels")
    built = Case(CASES[3], torch.bfloat16)
    packed = kernels.pack_linear(built.weight)
    source = built.weight if packed is None else packed
    tiles = built.tiles
    for name, value in change.get("tiles", {}).items():
        tiles = replace(tiles, **{name: torch.full_like(getattr(tiles, name), value)})
    pool = built.pool.to(change.get("pool", torch.bfloat16))
    place = change.get("first_site", FIRST_SITE), change.get("out_bounds", built.out_bounds)
    with pytest.raises(ValueError, match=message):
        kernels.merge_linear_(
            kernels.empty_linear(source), source, pool, tiles, *place, change.get("rows", (0, 97))
        )


@pytest.mark.parametrize("kernels", [reference, pytest.param(cpu, id="cpu")])
def test_a_weight_is_never_merged_into_itself(kernels):
    built = Case(CASES[3], torch.bfloat16)
    packed = kernels.pack_linear(built.weight)
    source = built.weight if packed is None else packed
    place = built.pool, built.tiles, FIRST_SITE, built.out_bounds
    with pytest.raises(ValueError, match="the weight itself"):
        kernels.merge_linear_(source, source, *place, (0, 97))
    two = replace(built.tiles, ranges=built.tiles.ranges.repeat(1, 2, 1))
    with pytest.raises(ValueError, match="2 segments"):
        kernels.merge_linear_(
            kernels.empty_linear(source), source, built.pool, two, *place[2:], (0, 97)
        )
