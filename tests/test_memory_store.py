"""What is written into pages is found there through tile tables and overlays, for every kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from image_cases import SHAPE
from loraswarm.adapters.adapter import EMBEDDING_A, Adapter, AdapterInfo, ModuleInfo
from loraswarm.core.base_shape import EMBEDDING, FINAL_NORM, LM_HEAD
from loraswarm.kernels.overlay import row_blocks
from loraswarm.memory.adapter_cache import AdapterLoad
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.memory import Memory
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_store import TileStore
from memory_cases import kinds, lora, random_adapter

KINDS = kinds(SHAPE)
DTYPES = [torch.float32, torch.bfloat16]


class Store:
    """Memory, pages full of NaN and a store, with what was loaded."""

    def __init__(self, dtype: torch.dtype = torch.float32, num_pages: int = 400) -> None:
        geometry = page_geometry(SHAPE, dtype.itemsize)
        self.dtype = dtype
        self.memory = Memory.of_pages(num_pages, SHAPE, geometry)
        self.buffer = PageBuffer(num_pages, SHAPE, geometry, dtype, torch.device("cpu"))
        self.buffer.pool.fill_(float("nan"))
        self.tiles = TileStore(self.buffer, SHAPE)
        self.adapters = {}

    def load(self, *infos: AdapterInfo) -> None:
        for info in infos:
            load = self.memory.adapters.pin(info)
            self.write(load, random_adapter(info, SHAPE, self.dtype))

    def write(self, load: AdapterLoad, adapter: Adapter) -> None:
        """Carry out a load."""
        self.adapters[load.info.name] = adapter
        self.tiles.load(load, adapter)
        self.memory.adapters.finish_load(load.info.key)

    def evict(self, num_free: int) -> None:
        for key in self.memory.make_room(num_free):
            self.tiles.drop(key)

    def evict_all(self) -> None:
        for adapter in self.adapters.values():
            self.memory.adapters.unpin(adapter.info.key)
        self.evict(self.memory.pool.num_pages)
        self.adapters.clear()


def one(info: AdapterInfo):
    """The mix of one adapter as it is."""
    return ((info.key, 1.0),)


def check_segment(store: Store, table, segment: int, terms) -> None:
    """Assert that a segment has exactly the tiles and gains of these (adapter, weight) terms."""
    expected = {
        module.info.site: [
            (other, weight, adapter)
            for adapter, weight in terms
            for other in adapter.modules
            if other.info.site == module.info.site
        ]
        for adapter, _ in terms
        for module in adapter.modules
    }
    head_bounds = SHAPE.head_bounds()
    for site in range(SHAPE.num_sites()):
        part = max(0, site - SHAPE.head_site)
        first, last = table.ranges[site, segment].tolist()
        assert last - first <= table.max_tiles[site]
        gains = table.gain_offset[site, segment].tolist()
        assert gains == [-1, -1] or table.has_gains[site]
        for module, weight, adapter in expected.get(min(site, SHAPE.head_site), []):
            out_size = SHAPE.site_sizes(module.info.site)[1]
            columns = slice(0, out_size)
            if site >= SHAPE.head_site:
                columns = slice(head_bounds[part], head_bounds[part + 1])
            num_tiles = -(-module.info.rank // 16)
            assert last - first >= num_tiles
            tiles = range(first, first + num_tiles)
            check_tiles(store, table, tiles, (module, weight, adapter), columns)
            check_gains(store, gains, module, columns)
            first += num_tiles
        assert first == last, f"site {site} runs tiles of nobody"
        if min(site, SHAPE.head_site) not in expected:
            assert gains == [-1, -1]


def check_tiles(store, table, tiles, term, columns) -> None:
    module, weight, adapter = term
    info, floats = module.info, store.buffer.floats
    in_size = SHAPE.site_sizes(info.site)[0]
    width = columns.stop - columns.start
    bt_RO = module.bt_RO if info.shared_bt is None else adapter.shared[info.shared_bt.digest]
    a_RI = module.a_RI if info.shared_a is None else adapter.shared[info.shared_a.digest]
    for index, tile in enumerate(tiles):
        ranks = slice(16 * index, min(16 * index + 16, info.rank))
        count = ranks.stop - ranks.start
        assert table.ranks[tile] == count
        assert table.scale[tile] == torch.tensor(info.scale) * weight
        if info.site == SHAPE.embedding_site:
            assert table.a_offset[tile] == table.a_stride[tile] == 0
        else:
            found = rows(store, table.a_offset[tile], table.a_stride[tile], count, in_size)
            assert torch.equal(found, a_RI[ranks, :in_size])
        found = rows(store, table.bt_offset[tile], table.bt_stride[tile], count, width)
        assert torch.equal(found, bt_RO[ranks, columns])
        for name, offset, part in (
            ("u", int(table.u_offset[tile]), ranks),
            ("v", int(table.v_offset[tile]), columns),
        ):
            assert (offset == -1) == (name not in module.vectors)
            if name in module.vectors:
                expected = module.vectors[name][part]
                assert torch.equal(floats[offset : offset + len(expected)], expected)


def check_gains(store, gains, module, columns) -> None:
    for name, offset in zip("gc", gains, strict=True):
        assert (offset == -1) == (name not in module.vectors)
        if name in module.vectors:
            expected = module.vectors[name][columns]
            assert torch.equal(store.buffer.floats[offset : offset + len(expected)], expected)


def rows(store, offset, stride, count, width) -> torch.Tensor:
    return store.buffer.pool.as_strided((count, width), (int(stride), 1), int(offset))


def check_overlays(store: Store, overlays, adapter, begin: int, end: int) -> None:
    """Assert that tokens begin : end have the adapter's overlays."""
    for info, rows_NW in zip(adapter.info.overlays, adapter.overlays, strict=True):
        for path in info.paths:
            (overlay,) = [each for each in overlays[path] if each.begin == begin]
            assert overlay.end == end
            assert overlay.rows.num_rows == info.num_rows
            assert torch.equal(torch.cat(row_blocks(store.buffer.pool, overlay.rows)), rows_NW)
            assert overlay.rows.offsets.tolist() == list(overlay.rows.block_offsets)
            ids = None if overlay.token_ids is None else tuple(overlay.token_ids.tolist())
            assert ids == info.token_ids


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_is_found_in_pages_through_its_table_beside_all_others(dtype):
    torch.manual_seed(0)
    store = Store(dtype)
    store.load(*KINDS.values())
    segments = [((), 3)]
    segments += [(one(info), 1 + index % 3) for index, info in enumerate(KINDS.values())]
    table, overlays = store.tiles.table(segments), store.tiles.overlays(segments)
    assert torch.equal(table.ranges[:, 0, 0], table.ranges[:, 0, 1]), "base rows run no tile"
    assert (table.gain_offset[:, 0] == -1).all()
    bounds = table.segments.tolist()
    assert bounds[:3] == [0, 3, 4]
    for index, name in enumerate(KINDS):
        adapter = store.adapters[name]
        check_segment(store, table, 1 + index, [(adapter, 1.0)])
        check_overlays(store, overlays, adapter, bounds[1 + index], bounds[2 + index])
    for site in range(SHAPE.num_sites()):
        counts = table.ranges[site, :, 1] - table.ranges[site, :, 0]
        assert table.max_tiles[site] == counts.max()
        assert table.has_gains[site] == bool((table.gain_offset[site] != -1).any())
    assert {EMBEDDING, EMBEDDING_A, LM_HEAD, FINAL_NORM} <= overlays.keys()
    assert len(overlays[FINAL_NORM]) == 2


def test_parts_of_the_lm_head_run_tiles_over_the_same_a():
    store = Store()
    store.load(KINDS["head"])
    table = store.tiles.table([(one(KINDS["head"]), 1)])
    offsets = {
        tuple(table.a_offset[slice(*table.ranges[site, 0].tolist())].tolist())
        for site in range(SHAPE.head_site, SHAPE.num_sites())
    }
    assert SHAPE.num_sites() - SHAPE.head_site > 1
    assert len(offsets) == 1


def test_modules_and_adapters_of_one_digest_point_at_one_matrix():
    store = Store()
    infos = [KINDS["vera"], KINDS["vera-other"]]
    store.load(*infos)
    table = store.tiles.table([(one(info), 1) for info in infos])
    assert table.ranges[0, 0].tolist() != table.ranges[0, 1].tolist()
    assert len(set(table.a_offset.tolist())) == 2, "rank 24 is two tiles, the same at every site"
    assert len(set(table.bt_offset.tolist())) == 2
    assert table.a_stride.tolist() == [128] * len(table.a_stride)


def test_a_weighted_sum_runs_the_tiles_of_all_with_scales_times_weights():
    torch.manual_seed(0)
    store = Store()
    names = ["wide", "mixed", "vera", "tied"]
    store.load(*(KINDS[name] for name in names))
    weights = [1.0, -0.5, 0.25, 3.0]
    mix = tuple((KINDS[name].key, weight) for name, weight in zip(names, weights, strict=True))
    half = ((KINDS["mixed"].key, 0.5),)
    table = store.tiles.table([(one(KINDS["mixed"]), 2), (mix, 5), (half, 1), ((), 1)])
    terms = [(store.adapters[name], weight) for name, weight in zip(names, weights, strict=True)]
    check_segment(store, table, 0, [(store.adapters["mixed"], 1.0)])
    check_segment(store, table, 1, terms)
    check_segment(store, table, 2, [(store.adapters["mixed"], 0.5)])
    assert table.max_tiles[4] == 3 + 3 + 2
    assert store.tiles.overlays([(mix, 5)]) == {}


def test_wide_sides_of_the_embedding_lie_one_after_the_other_in_a_sum():
    store = Store()
    store.load(KINDS["embedding"], KINDS["lora"])
    key = KINDS["embedding"].key
    mix = ((KINDS["lora"].key, 1.0), (key, 0.5))
    (alone,) = store.tiles.overlays([(one(KINDS["embedding"]), 3)])[EMBEDDING_A]
    (summed,) = store.tiles.overlays([((), 2), (mix, 3)])[EMBEDDING_A]
    assert (summed.begin, summed.end, summed.first_column) == (2, 5, 0)
    assert summed.rows is alone.rows
    store.load(replace(KINDS["embedding"], name="second"))
    twice = (*mix, (("second", KINDS["embedding"].digest), 1.0))
    first, second = store.tiles.overlays([(twice, 3)])[EMBEDDING_A]
    width = first.rows.width
    assert (first.first_column, second.first_column) == (0, -(-width // 16) * 16)


@pytest.mark.parametrize("name", ["gains", "ia3", "norms"])
def test_what_cannot_be_summed_is_a_bug_of_ours(name):
    store = Store()
    store.load(KINDS[name], KINDS["lora"])
    for mix in (((KINDS[name].key, 0.5),), (*one(KINDS[name]), *one(KINDS["lora"]))):
        with pytest.raises(AssertionError, match=r"cannot be summed|are never summed"):
            store.tiles.table([(mix, 1)])


def test_other_numbers_of_tokens_reuse_the_arrays_and_may_be_zero():
    store = Store()
    store.load(KINDS["lora"], KINDS["norms"])
    lora_mix, norms_mix = one(KINDS["lora"]), one(KINDS["norms"])
    tokens = store.tiles.table([(lora_mix, 5), (norms_mix, 7), ((), 2)])
    logit_rows = store.tiles.table([(lora_mix, 0), (norms_mix, 1), ((), 1)])
    assert tokens.segments.tolist() == [0, 5, 12, 14]
    assert logit_rows.segments.tolist() == [0, 0, 1, 2]
    assert logit_rows.ranges is tokens.ranges
    assert logit_rows.a_offset is tokens.a_offset
    overlays = store.tiles.overlays([(lora_mix, 0), (norms_mix, 1), ((), 1)])
    assert [(each.begin, each.end) for each in overlays[FINAL_NORM]] == [(0, 1)]
    assert store.tiles.overlays([(norms_mix, 0), ((), 1)]) == {}


def test_a_table_of_other_adapters_or_of_reloaded_ones_is_built_anew():
    torch.manual_seed(0)
    store = Store()
    store.load(KINDS["lora"], KINDS["wide"], KINDS["norms"])
    segments = [(one(KINDS["lora"]), 1), (one(KINDS["norms"]), 1)]
    first, overlays = store.tiles.table(segments), store.tiles.overlays(segments)
    store.evict_all()
    store.memory.kv_cache.reserve("takes pages that the adapters had", 100)
    store.load(KINDS["wide"], KINDS["norms"], KINDS["lora"])
    again = store.tiles.table(segments)
    assert not torch.equal(first.a_offset, again.a_offset)
    check_segment(store, again, 0, [(store.adapters["lora"], 1.0)])
    assert store.tiles.overlays(segments) is not overlays
    check_overlays(store, store.tiles.overlays(segments), store.adapters["norms"], 1, 2)
    swapped = store.tiles.table([(one(KINDS["wide"]), 1), (one(KINDS["norms"]), 1)])
    check_segment(store, swapped, 0, [(store.adapters["wide"], 1.0)])


@pytest.mark.parametrize("names", [[], ["norms"], ["rows", "norms"]])
def test_a_batch_without_tiles_and_gains_has_no_table(names):
    store = Store()
    store.load(*(KINDS[name] for name in names))
    segments = [((), 3), *((one(KINDS[name]), 1) for name in names)]
    assert store.tiles.table(segments) is None
    assert bool(store.tiles.overlays(segments)) == bool(names)


def test_an_adapter_of_gains_alone_has_a_table_without_tiles():
    store = Store()
    store.load(KINDS["ia3"])
    table = store.tiles.table([(one(KINDS["ia3"]), 1)])
    assert table.a_offset.numel() == 0
    assert not any(table.max_tiles)
    assert [site for site, has in enumerate(table.has_gains) if has] == [1, 8]


def test_shared_matrices_of_a_load_that_failed_are_written_by_the_next_one():
    torch.manual_seed(0)
    store = Store()
    failed = store.memory.adapters.pin(KINDS["vera"])
    load = store.memory.adapters.pin(KINDS["vera-other"])
    assert load.shared == failed.shared, "planned in one step"
    adapter = random_adapter(KINDS["vera-other"], SHAPE, store.dtype)
    store.memory.adapters.fail_load(KINDS["vera"].key)
    store.memory.adapters.unpin(KINDS["vera"].key)
    assert not store.memory.adapters.is_resident(KINDS["vera"].key)
    store.write(load, adapter)
    table = store.tiles.table([(one(KINDS["vera-other"]), 1)])
    check_segment(store, table, 0, [(adapter, 1.0)])


def test_a_shared_matrix_is_written_once_while_resident_and_again_when_it_comes_back():
    torch.manual_seed(0)
    store = Store()
    store.load(KINDS["vera"])
    other = random_adapter(KINDS["vera-other"], SHAPE, store.dtype)
    unread = {digest: torch.full_like(matrix, 9.0) for digest, matrix in other.shared.items()}
    store.write(store.memory.adapters.pin(other.info), replace(other, shared=unread))
    table = store.tiles.table([(one(other.info), 1)])
    check_segment(store, table, 0, [(other, 1.0)])
    store.adapters["vera-other"] = other
    store.evict_all()
    store.buffer.pool.fill_(float("nan"))
    store.load(KINDS["vera-qv"])
    table = store.tiles.table([(one(KINDS["vera-qv"]), 1)])
    check_segment(store, table, 0, [(store.adapters["vera-qv"], 1.0)])


def test_vectors_keep_all_bits_of_float32_in_a_pool_of_16_bits():
    store = Store(torch.bfloat16)
    store.load(KINDS["gains"])
    table = store.tiles.table([(one(KINDS["gains"]), 1)])
    vector = store.adapters["gains"].modules[0].vectors["g"]
    assert not torch.equal(vector, vector.bfloat16().float())
    offset = int(table.gain_offset[2, 0, 0])
    assert torch.equal(store.buffer.pool.view(torch.float32)[offset : offset + 32], vector)


def test_adapters_that_come_and_go_are_found_where_they_are():
    torch.manual_seed(0)
    store = Store(num_pages=80)
    names, num_evicted = list(KINDS), 0
    for turn in range(60):
        chosen = [KINDS[names[(turn * step + step) % len(names)]] for step in (1, 3, 7)]
        chosen = list({info.name: info for info in chosen}.values())
        store.memory.check()
        for info in chosen:
            load, evicted = store.memory.pin_adapter(info)
            num_evicted += len(evicted)
            for key in evicted:
                store.tiles.drop(key)
            if load is not None:
                store.write(load, random_adapter(info, SHAPE, store.dtype))
        segments = [(one(info), 1 + turn % 3) for info in chosen]
        table = store.tiles.table(segments)
        overlays = store.tiles.overlays(segments)
        for segment, info in enumerate(chosen):
            adapter = store.adapters[info.name]
            if table is not None:
                check_segment(store, table, segment, [(adapter, 1.0)])
            size = 1 + turn % 3
            check_overlays(store, overlays, adapter, segment * size, (segment + 1) * size)
        for info in chosen:
            store.memory.adapters.unpin(info.key)
    assert num_evicted > 0


def test_an_embedding_and_linears_of_other_ranks_are_in_one_table():
    store = Store()
    embedding = KINDS["embedding"]
    modules = (ModuleInfo(0, 17, 1.0), ModuleInfo(9, 1, 1.0), *embedding.modules)
    info = replace(embedding, name="both", modules=modules)
    store.load(lora("other", SHAPE, 3), info)
    segments = [(one(info), 3)]
    check_segment(store, store.tiles.table(segments), 0, [(store.adapters["both"], 1.0)])
    check_overlays(store, store.tiles.overlays(segments), store.adapters["both"], 0, 3)
