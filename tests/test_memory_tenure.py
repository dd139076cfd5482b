"""Which adapters stay in the pool and which leave: pinned, written, protected, kept, dropped."""

from __future__ import annotations

from itertools import count

import pytest

from loraswarm.errors import OutOfPages
from loraswarm.memory.memory import Memory, MemoryOptions
from loraswarm.memory.prefix_cache import PrefixSalt
from memory_cases import evict_all, written
from scheduler_cases import GEOMETRY, SHAPE, make_info

LRU = MemoryOptions(policy="lru")


def test_least_recently_used_idle_adapter_leaves_first_and_pinned_ones_stay():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY, LRU)
    a, b, c = (make_info(name) for name in "abc")
    for info in (a, b, c):
        assert memory.adapters.pin(info) is not None
        memory.adapters.finish_load(info.key)
    memory.adapters.unpin(b.key)
    memory.adapters.unpin(a.key)
    memory.adapters.unpin(c.key)
    assert memory.adapters.pin(a) is None, "a resident adapter needs no load"
    memory.adapters.unpin(a.key)
    memory.adapters.pin(c)
    assert evict_all(memory) == [b.key, a.key]
    assert memory.adapters.is_resident(c.key)


def test_by_cost_the_adapter_that_is_cheap_to_bring_back_leaves_first():
    is_in_host = {"read": False, "copied": True}
    options = MemoryOptions(is_in_host=lambda key: is_in_host[key[0]], clock=lambda: 0.0)
    for first, second in (("read", "copied"), ("copied", "read")):
        memory = Memory.of_pages(64, SHAPE, GEOMETRY, options)
        for name in (first, second):
            written(memory, make_info(name))
        assert [name for name, _ in evict_all(memory)] == ["copied", "read"]


def test_by_cost_the_adapter_that_is_asked_for_less_leaves_first():
    seconds = count(0.0, 133.0)
    options = MemoryOptions(clock=lambda: next(seconds))
    memory = Memory.of_pages(64, SHAPE, GEOMETRY, options)
    for name in "aababc":
        written(memory, make_info(name))
    assert [name for name, _ in evict_all(memory)] == ["c", "b", "a"]


def test_a_pin_that_leads_to_no_use_does_not_count_as_one():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY, LRU)
    for name in "ab":
        written(memory, make_info(name))
    memory.adapters.pin(make_info("a"))
    memory.adapters.unpin(("a", "0"), was_used=False)
    assert [name for name, _ in evict_all(memory)] == ["a", "b"]


def test_an_adapter_that_is_being_written_is_not_ready_and_stays():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    info = make_info("a")
    assert memory.adapters.pin(info) is not None
    assert memory.adapters.pin(info) is None, "one load for all"
    assert memory.adapters.is_resident(info.key)
    assert not memory.adapters.is_ready(info.key)
    for _ in range(2):
        memory.adapters.unpin(info.key)
    assert evict_all(memory) == []
    assert not memory.has_room(64)
    memory.adapters.finish_load(info.key)
    assert memory.adapters.is_ready(info.key)
    assert memory.has_room(64)
    memory.check()
    assert evict_all(memory) == [info.key]
    assert memory.take_dropped() == [info.key]
    assert memory.take_dropped() == []


def test_a_failed_adapter_is_freed_with_its_last_pin():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    info = make_info("a")
    for _ in range(2):
        memory.adapters.pin(info)
    memory.adapters.keep(info.key)
    memory.adapters.fail_load(info.key)
    assert not memory.adapters.is_ready(info.key)
    memory.adapters.unpin(info.key)
    assert memory.take_dropped() == []
    memory.adapters.unpin(info.key)
    assert memory.take_dropped() == [info.key]
    assert memory.pool.num_free == 64
    memory.adapters.unkeep(info.key)
    memory.adapters.pin(info)
    memory.adapters.unpin(info.key)
    memory.adapters.fail_load(info.key)
    assert memory.pool.num_free == 64, "at once if nobody has it pinned"


def test_a_failed_adapter_that_is_asked_for_again_is_loaded_again():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    info = make_info("a")
    first = memory.adapters.pin(info)
    memory.adapters.fail_load(info.key)
    assert memory.adapters.has_failed(info.key)
    assert memory.adapters.pin(info) is first
    assert not memory.adapters.has_failed(info.key)
    assert memory.adapters.pin(info) is None
    memory.adapters.finish_load(info.key)
    assert memory.adapters.is_ready(info.key)


def test_protected_adapters_leave_when_nothing_else_can_the_one_protected_last_first():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY, LRU)
    infos = {name: make_info(name) for name in "abcd"}
    memory.adapters.protect(infos["b"].key)
    for info in infos.values():
        written(memory, info)
    memory.adapters.protect(infos["a"].key)
    memory.adapters.protect(infos["a"].key)
    memory.adapters.protect(infos["d"].key)
    memory.adapters.unprotect(infos["a"].key)
    memory.adapters.unprotect(infos["d"].key)
    assert memory.has_room(64), "they count as room"
    memory.check()
    assert [name for name, _ in evict_all(memory)] == ["c", "d", "a", "b"]


def test_kept_adapters_are_never_evicted():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    info = make_info("a")
    written(memory, info)
    memory.adapters.keep(info.key)
    assert memory.adapters.is_kept(info.key)
    assert evict_all(memory) == []
    assert memory.make_room(64) is None
    memory.check()
    memory.adapters.unkeep(info.key)
    assert not memory.adapters.is_kept(info.key)
    assert memory.make_room(64) == [info.key]


def test_dropping_frees_an_idle_adapter_now_and_a_busy_one_when_it_is_done():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    info = make_info("a")
    assert memory.drop_adapter(info.key), "it is not there"
    written(memory, info)
    memory.adapters.keep(info.key)
    assert memory.drop_adapter(info.key), "kept or not"
    assert memory.take_dropped() == [info.key]
    memory.adapters.pin(info)
    assert not memory.drop_adapter(info.key), "pinned and being written"
    memory.adapters.unpin(info.key)
    assert not memory.drop_adapter(info.key), "being written"
    memory.adapters.finish_load(info.key)
    assert memory.take_dropped() == [info.key]
    assert memory.pool.num_free == 64
    written(memory, info)
    assert memory.adapters.is_resident(info.key), "a drop is not remembered for ever"


@pytest.mark.parametrize("unpins_first", [True, False])
def test_nothing_of_a_dropped_adapter_stays_when_its_last_sequence_ends(unpins_first):
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    info = make_info("a")
    salt = PrefixSalt(((info.key, 1.0),))
    written(memory, info)
    memory.adapters.pin(info)
    tokens = list(range(50))
    run(memory, "over", tokens, salt)
    memory.kv_cache.free("over")
    run(memory, "running", tokens[:20], salt)
    assert not memory.drop_adapter(info.key)
    assert memory.pool.num_owned("prefix") == 1
    memory.kv_cache.reserve("running", 50)
    memory.kv_cache.publish("running", tokens, 50)
    run(memory, "late", [7, *tokens], salt)
    assert memory.pool.num_owned("prefix") == 1, "nothing more of it is cached"
    if unpins_first:
        memory.adapters.unpin(info.key)
    for request_id in ("running", "late"):
        memory.kv_cache.free(request_id)
        memory.check()
    if not unpins_first:
        memory.adapters.unpin(info.key)
    assert memory.pool.num_free == 64
    assert memory.take_dropped() == [info.key]


def run(memory, request_id, tokens, salt):
    memory.kv_cache.begin(request_id, tokens, salt, len(tokens) - 1)
    memory.kv_cache.reserve(request_id, len(tokens))
    memory.kv_cache.publish(request_id, tokens, len(tokens))


def test_an_unpinned_adapter_stays_while_a_prefix_it_made_is_used():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    info = make_info("a")
    salt = PrefixSalt(((info.key, 1.0),))
    written(memory, info)
    run(memory, "first", list(range(50)), salt)
    memory.kv_cache.free("first")
    assert memory.kv_cache.begin("begun, not pinned yet", list(range(50)), salt, 20) > 0
    assert memory.adapters.num_idle_pages() == 0
    assert evict_all(memory) == []
    memory.check()
    memory.kv_cache.free("begun, not pinned yet")
    assert evict_all(memory) == [info.key]


@pytest.mark.parametrize("policy", ["cost", "lru"])
def test_a_cached_prefix_never_outlives_its_adapter(policy):
    memory = Memory.of_pages(64, SHAPE, GEOMETRY, MemoryOptions(policy=policy))
    info = make_info("a", num_sites=1)
    for each in (info, make_info("other", num_sites=1)):
        written(memory, each)
    memory.adapters.pin(info)
    run(memory, "adapted", list(range(50)), PrefixSalt(((info.key, 1.0),)))
    run(memory, "base", list(range(50)), PrefixSalt(()))
    memory.kv_cache.free("adapted")
    memory.kv_cache.free("base")
    memory.adapters.unpin(info.key)
    left = []
    while memory.pool.num_free < 64:
        left += memory.make_room(memory.pool.num_free + 1)
        memory.check()
    assert info.key in left
    assert memory.prefixes.total_evicted_pages == 6


def test_an_adapter_that_comes_up_gives_its_prefixes_first_and_no_more_than_there_must_be():
    memory = Memory.of_pages(64, SHAPE, GEOMETRY, MemoryOptions(clock=lambda: 0.0))
    for _ in range(133):
        memory.costs.saw_step(0.0)  # else a load would cost steps, and few bytes be dear
    info = make_info("a")
    written(memory, info)
    for number in range(3):
        run(memory, f"s{number}", [number] * 50, PrefixSalt(((info.key, 1.0),)))
        memory.kv_cache.free(f"s{number}")
    for num_pages in reversed(range(9)):
        assert memory.order.lowest() == info.key, "its bytes are cheaper than those of its prefixes"
        assert memory.make_room(memory.pool.num_free + 1) == []
        assert memory.pool.num_owned("prefix") == num_pages
        memory.check()
    assert memory.make_room(memory.pool.num_free + 1) == [info.key]


def test_an_adapter_is_worth_as_much_as_it_and_the_prefixes_it_made():
    """Prefixes are dear here, and worth nothing without it; so one that made none leaves first."""
    memory = Memory.of_pages(64, SHAPE, GEOMETRY, MemoryOptions(clock=lambda: 0.0))
    memory.costs.saw_prefill(1, 1000.0)
    rich, poor = make_info("rich"), make_info("poor")
    for info in (rich, poor):
        written(memory, info)
        memory.adapters.pin(info)
    run(memory, "s", list(range(50)), PrefixSalt(((rich.key, 1.0),)))
    memory.kv_cache.free("s")
    for info in (rich, poor):
        memory.adapters.unpin(info.key)
    assert evict_all(memory) == [poor.key, rich.key]


def test_make_room_that_cannot_be_made_changes_nothing():
    memory = Memory.of_pages(20, SHAPE, GEOMETRY)
    written(memory, make_info("a"))
    run(memory, "over", list(range(50)), PrefixSalt(()))
    memory.kv_cache.free("over")
    memory.kv_cache.reserve("running", 20)
    before = memory.pool.num_free, len(memory.order)
    assert memory.make_room(19) is None
    assert (memory.pool.num_free, len(memory.order)) == before
    assert memory.make_room(18) == [("a", "0")]
    assert memory.pool.num_free == 18


def test_an_adapter_evicts_no_more_than_it_needs():
    memory = Memory.of_pages(20, SHAPE, GEOMETRY, LRU)
    names = []
    while memory.pool.num_free >= memory.adapters.num_load_pages(make_info("next")):
        names.append(f"a{len(names)}")
        written(memory, make_info(names[-1]))
    memory.kv_cache.reserve("s", memory.pool.num_free * GEOMETRY.page_tokens)
    load, evicted = memory.pin_adapter(make_info("next"))
    assert load is not None
    assert evicted == [(names[0], "0")]
    assert memory.take_dropped() == evicted
    assert memory.pin_adapter(make_info("next")) == (None, [])


def test_an_adapter_that_can_never_fit_evicts_nothing():
    memory = Memory.of_pages(20, SHAPE, GEOMETRY)
    written(memory, make_info("a"))
    memory.kv_cache.reserve("s", 10 * GEOMETRY.page_tokens)
    with pytest.raises(OutOfPages):
        memory.pin_adapter(make_info("large", rank=64))
    assert memory.adapters.is_resident(("a", "0"))
    memory.check()
