"""Page pool, K/V and adapter caches: who owns which page, what is shared, what is idle."""

from __future__ import annotations

import copy
import random

import pytest

from loraswarm.errors import OutOfPages
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.memory import Memory
from loraswarm.memory.page_pool import Owner, PagePool
from memory_cases import QWEN_SHAPE, describe, evict_all, kinds, lora, vera
from scheduler_cases import GEOMETRY, SHAPE, make_info


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


def test_a_transferred_page_is_the_new_owners_and_kinds_are_counted():
    pool = PagePool(6, 64)
    sequence, prefix = Owner("kv", "a"), Owner("prefix", "1")
    pages = pool.allocate(3, sequence)
    pool.transfer(pages[1], sequence, prefix)
    assert pool.pages_of(sequence) == [pages[0], pages[2]]
    assert pool.pages_of(prefix) == [pages[1]]
    assert [pool.num_owned(kind) for kind in ("kv", "prefix", "adapter")] == [2, 1, 0]
    pool.check()
    assert pool.free(sequence) == 2
    assert pool.free(prefix) == 1
    assert [pool.num_owned(kind) for kind in ("kv", "prefix", "adapter")] == [0, 0, 0]
    assert pool.num_free == 6


def test_check_finds_a_doubled_page():
    pool = PagePool(4, 64)
    pool.allocate(2, Owner("kv", "a")).clear()
    pool.pages_of(Owner("kv", "a")).append(3)
    with pytest.raises(AssertionError, match="lost or doubled"):
        pool.check()


@pytest.mark.parametrize(("shape", "element_bytes"), [(SHAPE, 4), (QWEN_SHAPE, 2)])
def test_a_page_holds_a_full_tile_of_the_widest_target(shape, element_bytes):
    geometry = page_geometry(shape, element_bytes)
    assert geometry.page_elements >= 16 * shape.widest()
    assert geometry.page_elements == geometry.page_tokens * shape.kv_elements_per_token()
    assert geometry.page_tokens >= 16
    half = geometry.page_tokens // 2 * shape.kv_elements_per_token()
    assert geometry.page_tokens == 16 or half < 16 * shape.widest()


def test_a_failing_pin_changes_nothing():
    memory = Memory.of_pages(1, SHAPE, GEOMETRY)
    info = make_info("a", rank=64)
    with pytest.raises(OutOfPages):
        memory.adapters.pin(info)
    assert memory.pool.num_free == 1
    assert not memory.adapters.is_resident(info.key)


def test_a_failing_pin_of_any_kind_changes_nothing():
    refused = 0
    for info in kinds(SHAPE).values():
        most = Memory.of_pages(1, SHAPE, GEOMETRY).adapters.num_pages(info)
        for num_pages in range(1, most):
            memory = Memory.of_pages(num_pages + 1, SHAPE, GEOMETRY)
            memory.kv_cache.reserve("s", 1)
            before = copy.deepcopy(memory)
            try:
                memory.adapters.pin(info)
            except OutOfPages:
                refused += 1
                assert state_of(memory) == state_of(before)
                assert not memory.adapters.is_resident(info.key)
            memory.pool.check()
            memory.adapters.check()
    assert refused > 100


def test_num_idle_pages_is_what_evicting_all_idle_adapters_frees_and_load_pages_are_a_bound():
    rng = random.Random(1)
    memory = Memory.of_pages(400, SHAPE, GEOMETRY)
    infos = list(kinds(SHAPE).values())
    pins: list = []
    shared_stays = shelves_stay = 0
    for operation in range(600):
        choice = rng.randrange(5)
        if choice < 2:
            info = rng.choice(infos)
            if not memory.adapters.is_resident(info.key):
                check_load_pages(memory, info)
            try:
                if memory.adapters.pin(info) is not None:
                    memory.adapters.finish_load(info.key)
                pins.append(info.key)
            except OutOfPages:
                pass
        elif choice < 4 and pins:
            memory.adapters.unpin(pins.pop(rng.randrange(len(pins))))
        elif operation % 4 == 0:
            memory.make_room(memory.pool.num_free + rng.randrange(40))
        idle_pages = memory.adapters.num_idle_pages()
        trial = copy.deepcopy(memory)
        assert trial.make_room(trial.pool.num_free + idle_pages + 1) is None
        evicted = evict_all(trial)
        assert trial.pool.num_free == memory.pool.num_free + idle_pages
        trial.check()
        alone = sum(memory.adapters.num_pages(info) for info in infos if info.key in evicted)
        shared_stays += bool(evicted) and idle_pages < alone
        shelves_stay += bool(len(memory.order)) and idle_pages == 0
    assert shared_stays > 50
    assert shelves_stay > 10


def check_load_pages(memory, info):
    """A pin takes no fewer than `least_load_pages` and at most `num_load_pages`, now and after
    everything idle has left."""
    for evicts in (False, True):
        trial = copy.deepcopy(memory)
        if evicts:
            evict_all(trial)
        least, most = trial.adapters.least_load_pages(info), trial.adapters.num_load_pages(info)
        assert most <= memory.adapters.num_load_pages(info) <= memory.adapters.num_pages(info)
        assert least >= memory.adapters.least_load_pages(info)
        before = trial.pool.num_free
        if before >= most:
            trial.adapters.pin(info)
            assert least <= before - trial.pool.num_free <= most


def state_of(memory):
    """Everything that a pin could change, comparable; no adapter is resident."""
    adapters = vars(memory.adapters).copy()
    pages = vars(adapters.pop("_pages")).copy()
    shelves = vars(pages.pop("_shelves"))
    pool = vars(pages.pop("_pool"))
    for fixed in ("_pool", "_order", "_costs"):
        del adapters[fixed]
    return adapters, pages, shelves, pool, len(memory.order)


def test_a_shared_matrix_is_kept_once_and_leaves_with_its_last_user():
    memory = Memory.of_pages(200, SHAPE, GEOMETRY)
    infos = [vera(name, SHAPE, 24) for name in "abc"]
    loads = [memory.adapters.pin(info) for info in infos]
    for info in infos:
        memory.adapters.finish_load(info.key)
    first, second, third = (load.shared for load in loads)
    assert len(first) == 2
    assert first == second == third, "one place each, the same object for all"
    with_all = memory.pool.num_owned("adapter")
    memory.adapters.unpin(infos[0].key)
    memory.adapters.unpin(infos[1].key)
    assert len(evict_all(memory)) == 2
    other = memory.adapters.pin(vera("d", SHAPE, 24)).shared
    memory.adapters.finish_load(("d", "0"))
    assert other == first, "the third adapter still uses it"
    for key in (infos[2].key, ("d", "0")):
        memory.adapters.unpin(key)
    assert memory.adapters.num_idle_pages() == memory.pool.num_owned("adapter")
    evict_all(memory)
    assert memory.pool.num_owned("adapter") == 0
    again = memory.adapters.pin(infos[0]).shared
    assert again[0] is not first[0], "a new place, to be written anew"
    assert memory.pool.num_owned("adapter") < with_all


def test_shared_matrices_of_a_pinned_adapter_need_not_be_loaded_and_those_of_an_idle_one_may():
    memory = Memory.of_pages(200, SHAPE, GEOMETRY)
    first, second = vera("first", SHAPE, 24), vera("second", SHAPE, 24)
    memory.adapters.pin(first)
    memory.adapters.finish_load(first.key)
    assert memory.adapters.num_load_pages(second) < memory.adapters.num_pages(second)
    memory.adapters.unpin(first.key)
    assert memory.adapters.num_load_pages(second) == memory.adapters.num_pages(second)


def test_matrices_of_one_digest_but_other_sizes_are_kept_apart():
    memory = Memory.of_pages(200, SHAPE, GEOMETRY)
    large, small = (memory.adapters.pin(vera(f"r{rank}", SHAPE, rank)) for rank in (24, 7))
    assert large.shared[0].matrix.digest == small.shared[0].matrix.digest
    assert [place.matrix.num_rows for place in (*large.shared, *small.shared)] == [24, 24, 7, 7]
    memory.adapters.check()


def test_shared_matrices_of_a_pinned_adapter_do_not_count_as_idle():
    memory = Memory.of_pages(200, SHAPE, GEOMETRY)
    pinned = vera("pinned", SHAPE, 24)
    idle = describe("idle", [*pinned.modules[:3], *lora("", SHAPE, 40).modules[3:]])
    memory.adapters.pin(pinned)
    before = memory.pool.num_free
    memory.adapters.pin(idle)
    taken = before - memory.pool.num_free
    memory.adapters.finish_load(idle.key)
    memory.adapters.unpin(idle.key)
    assert memory.adapters.num_idle_pages() == taken > 0
    evict_all(memory)
    assert memory.pool.num_free == before
    memory.adapters.check()


def test_a_failed_adapter_gives_back_its_pages_and_what_only_it_shared():
    memory = Memory.of_pages(200, SHAPE, GEOMETRY)
    failed, other = vera("failed", SHAPE, 24), vera("other", SHAPE, 24)
    memory.adapters.pin(failed)
    memory.adapters.unpin(failed.key)
    memory.adapters.fail_load(failed.key)
    assert memory.pool.num_free == 200
    place = memory.adapters.pin(failed).shared
    assert memory.adapters.pin(other).shared == place
    memory.adapters.unpin(failed.key)
    memory.adapters.fail_load(failed.key)
    memory.check()
    assert not memory.adapters.is_resident(failed.key)
    assert memory.adapters.pin(vera("third", SHAPE, 24)).shared == place
