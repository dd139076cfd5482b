"""Page pool, tile layout, K/V and adapter caches: who owns which page."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from loraswarm.adapters.adapter import Adapter, ModuleWeights
from loraswarm.core.base_shape import TARGETS, BaseShape
from loraswarm.errors import OutOfPages
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.memory import Memory
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.page_pool import Owner, PagePool
from loraswarm.memory.tile_layout import tile_layout
from loraswarm.memory.tile_store import TileStore
from scheduler_cases import GEOMETRY, SHAPE, make_info

QWEN_SHAPE = BaseShape(
    num_layers=24,
    num_kv_heads=2,
    head_size=64,
    vocab_size=151_936,
    target_sizes=(
        (896, 896),
        (896, 128),
        (896, 128),
        (896, 896),
        (896, 4864),
        (896, 4864),
        (4864, 896),
    ),
)


def test_allocate_is_all_or_nothing():
    pool = PagePool(10, 64)
    pool.allocate(7, Owner("kv", "a"))
    with pytest.raises(OutOfPages, match=r"4 pages needed, 3 free; largest owners: kv a 7"):
        pool.allocate(4, Owner("kv", "b"))
    assert pool.num_free == 3
    assert pool.pages_of(Owner("kv", "b")) == []
    pool.check()


def test_pages_of_an_owner_keep_their_order_and_return_on_free():
    pool = PagePool(6, 64)
    owner = Owner("kv", "a")
    first = pool.allocate(2, owner)
    second = pool.allocate(3, owner)
    assert pool.pages_of(owner) == first + second
    assert pool.free(owner) == 5
    assert pool.free(owner) == 0
    assert pool.num_free == 6


def test_check_finds_a_doubled_page():
    pool = PagePool(4, 64)
    pool.allocate(2, Owner("kv", "a")).clear()
    pool.pages_of(Owner("kv", "a")).append(3)
    with pytest.raises(AssertionError, match="lost or doubled"):
        pool.check()


def test_pool_is_conserved_under_ten_thousand_random_operations():
    rng = random.Random(0)
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    infos = [make_info(f"a{i}", rank=rng.choice([1, 4, 16, 33])) for i in range(12)]
    pins: list = []
    lengths: dict[str, int] = {}
    refused = 0
    for operation in range(10_000):
        choice = rng.randrange(6)
        try:
            if choice == 0:
                name = f"s{rng.randrange(20)}"
                longer = lengths.get(name, 0) + rng.randrange(1, 40)
                memory.kv_cache.reserve(name, longer)
                lengths[name] = longer
            elif choice == 1 and lengths:
                name = rng.choice(sorted(lengths))
                memory.kv_cache.free(name)
                del lengths[name]
            elif choice == 2:
                info = rng.choice(infos)
                memory.adapters.pin(info)
                pins.append(info.key)
            elif choice in (3, 4) and pins:
                memory.adapters.unpin(pins.pop(rng.randrange(len(pins))))
            else:
                before = set(pins)
                evicted = memory.adapters.evict_idle(rng.randrange(64))
                assert not before & set(evicted), "a pinned adapter was evicted"
        except OutOfPages:
            refused += 1
        memory.pool.check()
        memory.adapters.check()
        if operation % 100 == 0:
            held = sum(GEOMETRY.pages_for_tokens(n) for n in lengths.values())
            assert memory.pool.num_owned("kv") == held
    assert refused > 100


@pytest.mark.parametrize(("shape", "element_bytes"), [(SHAPE, 4), (QWEN_SHAPE, 2)])
def test_a_page_holds_a_full_tile_of_the_widest_target(shape, element_bytes):
    geometry = page_geometry(shape, element_bytes)
    assert geometry.page_elements >= 16 * shape.widest()
    assert geometry.page_elements == geometry.page_tokens * shape.kv_elements_per_token()
    assert geometry.page_tokens >= 16
    half = geometry.page_tokens // 2 * shape.kv_elements_per_token()
    assert geometry.page_tokens == 16 or half < 16 * shape.widest()


@pytest.mark.parametrize("rank", [1, 5, 8, 16, 17, 40, 64])
def test_layout_covers_every_rank_once_without_overlap(rank):
    geometry = page_geometry(QWEN_SHAPE, 2)
    sites = tuple((site, rank) for site in range(QWEN_SHAPE.num_sites()))
    layout = tile_layout(sites, QWEN_SHAPE, geometry)
    taken: dict[int, list[tuple[int, int]]] = {}
    ranks: dict[int, list[int]] = {}
    for tile in layout.tiles:
        ranks.setdefault(tile.site, []).extend(
            range(tile.first_rank, tile.first_rank + tile.num_ranks)
        )
        in_size, out_size = QWEN_SHAPE.target_sizes[tile.site % len(TARGETS)]
        for page, begin, size in (
            (tile.a_page, tile.a_element, tile.num_ranks * in_size),
            (tile.bt_page, tile.bt_element, tile.num_ranks * out_size),
        ):
            taken.setdefault(page, []).append((begin, begin + size))
            assert begin % geometry.alignment_elements == 0
    assert ranks == {site: list(range(rank)) for site, _ in sites}
    for blocks in taken.values():
        blocks.sort()
        assert blocks[-1][1] <= geometry.page_elements
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(blocks))
    assert set(taken) == set(range(layout.num_pages))
    if rank == 64:
        used = sum(end - begin for blocks in taken.values() for begin, end in blocks)
        assert used / (layout.num_pages * geometry.page_elements) > 0.85


def test_least_recently_used_idle_adapter_leaves_first_and_pinned_ones_stay():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    a, b, c = (make_info(name) for name in "abc")
    for info in (a, b, c):
        assert memory.adapters.pin(info) is not None
    memory.adapters.unpin(b.key)
    memory.adapters.unpin(a.key)
    memory.adapters.unpin(c.key)
    assert memory.adapters.pin(a) is None, "a resident adapter needs no load"
    memory.adapters.unpin(a.key)
    memory.adapters.pin(c)
    evicted = memory.adapters.evict_idle(num_free=10_000)
    assert evicted == [b.key, a.key]
    assert memory.adapters.is_resident(c.key)


def test_a_failing_pin_changes_nothing():
    memory = Memory.of_pages(1, SHAPE, GEOMETRY)
    info = make_info("a", rank=64)
    with pytest.raises(OutOfPages):
        memory.adapters.pin(info)
    assert memory.pool.num_free == 1
    assert not memory.adapters.is_resident(info.key)


def random_adapter(info):
    modules = []
    for module in info.modules:
        in_size, out_size = SHAPE.target_sizes[module.target]
        a_RI, bt_RO = torch.randn(module.rank, in_size), torch.randn(module.rank, out_size)
        modules.append(ModuleWeights(module, a_RI, bt_RO))
    return Adapter(info, tuple(modules))


def test_tile_table_points_at_each_adapters_own_weights():
    torch.manual_seed(0)
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    buffer = PageBuffer(64, SHAPE, GEOMETRY, torch.float32, torch.device("cpu"))
    store = TileStore(buffer, SHAPE)
    infos = [make_info("a", rank=5), make_info("b", rank=40)]
    adapters = [random_adapter(info) for info in infos]
    for info, adapter in zip(infos, adapters, strict=True):
        store.load(memory.adapters.pin(info), adapter)
    table = store.table([(None, 3), (infos[1].key, 7), (infos[0].key, 1)])
    assert table.segments.tolist() == [0, 3, 10, 11]
    for site in range(SHAPE.num_sites()):
        assert table.ranges[site, 0, 0] == table.ranges[site, 0, 1], "base rows run no tile"
        assert table.max_tiles[site] == 3
        for segment, adapter in ((1, adapters[1]), (2, adapters[0])):
            first, last = table.ranges[site, segment].tolist()
            module = adapter.modules[site]
            in_size, out_size = SHAPE.target_sizes[module.info.target]
            a_rows, bt_rows = [], []
            for tile in range(first, last):
                ranks = int(table.ranks[tile])
                a, bt = int(table.a_offset[tile]), int(table.bt_offset[tile])
                a_rows.append(buffer.pool[a : a + ranks * in_size].view(ranks, in_size))
                bt_rows.append(buffer.pool[bt : bt + ranks * out_size].view(ranks, out_size))
            assert torch.equal(torch.cat(a_rows), module.a_RI)
            assert torch.equal(torch.cat(bt_rows), module.bt_RO)


def test_a_batch_of_base_rows_has_no_tile_table():
    buffer = PageBuffer(2, SHAPE, GEOMETRY, torch.float32, torch.device("cpu"))
    assert TileStore(buffer, SHAPE).table([(None, 3)]) is None
