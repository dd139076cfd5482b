"""Cached prefixes: who shares which pages, what is never shared, and in which order they leave."""

from __future__ import annotations

import itertools

import pytest

from loraswarm.memory.memory import Memory, MemoryOptions
from loraswarm.memory.prefix_cache import PrefixSalt
from memory_cases import written
from prefix_cases import SIZE, Simulation
from scheduler_cases import GEOMETRY, SHAPE, make_info

A, B = make_info("a", num_sites=1), make_info("b", num_sites=1)
MIX_A, MIX_B = ((A.key, 1.0),), ((B.key, 1.0),)
PROMPT = list(range(100, 100 + 3 * SIZE + 5))


def make_simulation(num_pages=64, **options):
    memory = Memory.of_pages(num_pages, SHAPE, GEOMETRY, MemoryOptions(**options))
    for info in (A, B):
        written(memory, info)
        memory.adapters.keep(info.key)
    return Simulation(memory)


def cached_pages(simulation):
    return simulation.memory.pool.num_owned("prefix")


def test_a_second_request_finds_the_whole_pages_of_the_first():
    simulation = make_simulation()
    assert simulation.run("first", PROMPT) == 0
    assert simulation.run("second", PROMPT) == 3 * SIZE
    first, second = map(simulation.memory.kv_cache.pages_of, ("first", "second"))
    assert first[:3] == second[:3]
    assert first[3:] != second[3:]
    simulation.end("first", "second")
    simulation.memory.check()
    assert simulation.run("third", PROMPT[: 2 * SIZE] + [7] * SIZE) == 2 * SIZE
    assert simulation.run("other", [1, *PROMPT]) == 0


def test_a_prefix_of_exactly_the_prompt_leaves_the_last_page_to_compute():
    simulation = make_simulation()
    simulation.run("first", PROMPT[: 2 * SIZE])
    assert simulation.run("second", PROMPT[: 2 * SIZE]) == SIZE


def test_no_more_than_max_tokens_are_taken():
    simulation = make_simulation()
    simulation.run("first", PROMPT)
    kv = simulation.memory.kv_cache
    for num, max_tokens in enumerate((0, SIZE - 1, SIZE, 2 * SIZE + 1)):
        expected = max_tokens // SIZE * SIZE
        assert kv.begin(f"s{num}", PROMPT, PrefixSalt(()), max_tokens) == expected


def test_without_prefix_cache_nothing_is_cached():
    simulation = make_simulation(has_prefix_cache=False)
    simulation.run("first", PROMPT)
    assert simulation.run("second", PROMPT) == 0
    assert cached_pages(simulation) == 0
    simulation.end("first", "second")
    assert simulation.memory.pool.num_owned("kv") == 0
    simulation.memory.check()


def test_tokens_that_are_not_computed_are_not_handed_out():
    simulation = make_simulation()
    simulation.begin("first", PROMPT)
    simulation.compute("first", SIZE + SIZE // 2)
    assert cached_pages(simulation) == 1
    assert simulation.begin("second", PROMPT) == SIZE
    simulation.compute("first", 2 * SIZE)
    assert simulation.begin("third", PROMPT) == 2 * SIZE


def test_generated_tokens_are_cached_for_the_next_turn():
    simulation = make_simulation()
    simulation.run("turn", PROMPT)
    simulation.running["turn"].token_ids += [5] * SIZE
    simulation.compute("turn", len(PROMPT) + SIZE)
    answer = simulation.running["turn"].token_ids
    simulation.end("turn")
    assert simulation.run("next", [*answer, 1, 2, 3]) == 4 * SIZE


def test_adapters_generations_and_weights_never_share_what_they_made():
    simulation = make_simulation()
    newer = ((("a", "another digest"), 1.0),)
    half = ((A.key, 0.5),)
    sum_of_both = ((A.key, 1.0), (B.key, 1.0))
    mixes = [(), MIX_A, MIX_B, half, sum_of_both]
    for number, mix in enumerate(mixes):
        assert simulation.run(f"first {number}", PROMPT, mix) == 0
    assert simulation.begin("newer", PROMPT, newer) == 0
    for number, mix in enumerate(mixes):
        assert simulation.run(f"second {number}", PROMPT, mix) == 3 * SIZE


@pytest.mark.parametrize(
    ("first_adapted", "shared_with_base"),
    [
        (0, 0),
        (1, 0),
        (SIZE - 1, 0),
        (SIZE, SIZE),
        (SIZE + 3, SIZE),
        (2 * SIZE, 2 * SIZE),
        (9 * SIZE, 3 * SIZE),
    ],
)
def test_an_activated_adapter_shares_the_bases_pages_before_its_invocation(
    first_adapted, shared_with_base
):
    for base_first in (True, False):
        simulation = make_simulation()
        runs = [("base", (), 0), ("activated", MIX_A, first_adapted)]
        first, second = runs if base_first else runs[::-1]
        assert simulation.run(first[0], PROMPT, *first[1:]) == 0
        assert simulation.run(second[0], PROMPT, *second[1:]) == shared_with_base
        assert simulation.run("again", PROMPT, MIX_A, first_adapted) == 3 * SIZE
        simulation.memory.check()


def test_invocations_at_different_tokens_do_not_share_pages_after_the_first_of_them():
    starts = (0, 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE)
    for first, second in itertools.permutations(starts, 2):
        simulation = make_simulation()
        simulation.run("first", PROMPT, MIX_A, first)
        expected = min(first, second) // SIZE * SIZE
        assert simulation.run("second", PROMPT, MIX_A, second) == expected


def test_sequences_that_compute_the_same_at_once_keep_their_own_pages():
    simulation = make_simulation()
    for name in ("first", "second"):
        simulation.begin(name, PROMPT)
    simulation.compute("first", 2 * SIZE)
    simulation.compute("second", len(PROMPT))
    first, second = map(simulation.memory.kv_cache.pages_of, ("first", "second"))
    assert not set(first) & set(second)
    assert cached_pages(simulation) == 3, "two of the first, and the third page of the second"
    simulation.memory.check()
    simulation.end("first")
    assert simulation.memory.prefixes.num_idle_pages == 0, "the second's page hangs below them"
    assert simulation.memory.make_room(62) is None
    simulation.compute("second", len(PROMPT))
    simulation.end("second")
    simulation.memory.check()
    assert simulation.memory.prefixes.num_idle_pages == 3
    assert simulation.memory.pool.num_owned("kv") == 0
    assert simulation.run("third", PROMPT) == 3 * SIZE


def test_pages_in_use_stay_and_the_end_of_a_prefix_leaves_first():
    simulation = make_simulation()
    memory = simulation.memory
    simulation.run("long", PROMPT)
    simulation.run("short", PROMPT[: SIZE + 1])
    simulation.end("long")
    assert memory.prefixes.num_idle_pages == 2
    assert memory.make_room(memory.pool.num_free + 1) == []
    assert simulation.begin("probe", PROMPT) == 2 * SIZE
    simulation.end("probe")
    free = memory.pool.num_free + 1
    assert memory.make_room(free + 64) is None
    assert memory.make_room(free) == []
    assert simulation.begin("probe", PROMPT) == SIZE
    memory.check()
    assert memory.prefixes.total_evicted_pages == 2


@pytest.mark.parametrize("policy", ["cost", "lru"])
def test_prefixes_leave_by_their_last_use(policy):
    ticks = itertools.count()
    simulation = make_simulation(policy=policy, clock=lambda: float(next(ticks)))
    memory = simulation.memory
    prompts = {name: [number] * (SIZE + 1) for number, name in enumerate("abc")}
    for name in "abca":
        simulation.run(name, prompts[name])
        simulation.end(name)
    for gone in "bca":
        assert simulation.begin("probe", prompts[gone]) == SIZE
        memory.kv_cache.free("probe")
        memory.make_room(memory.pool.num_free + 1)
        assert simulation.begin("probe", prompts[gone]) == 0
        memory.kv_cache.free("probe")


def test_a_sequence_that_begins_but_cannot_start_counts_as_no_use():
    simulation = make_simulation(policy="lru")
    memory = simulation.memory
    for name in "ab":
        simulation.run(name, [ord(name)] * (SIZE + 1))
        simulation.end(name)
    asked = memory.prefixes.total_asked_tokens
    for _ in range(7):
        assert simulation.begin("blocked", [ord("a")] * (SIZE + 1)) == SIZE
        simulation.end("blocked")
    assert memory.prefixes.total_asked_tokens == asked
    memory.make_room(memory.pool.num_free + 1)
    assert simulation.begin("b", [ord("b")] * (SIZE + 1)) == SIZE
    assert simulation.begin("a", [ord("a")] * (SIZE + 1)) == 0


def test_hits_are_counted_in_tokens():
    simulation = make_simulation()
    simulation.run("first", PROMPT)
    simulation.run("second", PROMPT)
    prefixes = simulation.memory.prefixes
    assert prefixes.total_asked_tokens == 2 * len(PROMPT)
    assert prefixes.total_hit_tokens == 3 * SIZE
    simulation.running["second"].token_ids += [5] * SIZE
    simulation.compute("second", len(PROMPT) + SIZE)
    assert prefixes.total_asked_tokens == 2 * len(PROMPT), "once a start, not once a step"


def test_dropping_an_adapter_frees_its_idle_pages_now_and_those_in_use_later():
    simulation = make_simulation()
    memory = simulation.memory
    both = ((A.key, 1.0), (B.key, 1.0))
    simulation.run("base", PROMPT[:SIZE])
    simulation.run("running", PROMPT, MIX_A)
    simulation.run("over", [9, *PROMPT], MIX_A)
    simulation.run("activated", PROMPT, both, SIZE)
    simulation.run("other", PROMPT, MIX_B)
    simulation.end("over")
    assert cached_pages(simulation) == 1 + 3 + 3 + 2 + 3
    memory.prefixes.drop_adapter(A.key)
    memory.check()
    assert cached_pages(simulation) == 1 + 3 + 0 + 2 + 3
    for number, mix in enumerate((MIX_A, both)):
        assert simulation.begin(f"new {number}", PROMPT, mix, number * SIZE) == number * SIZE
    simulation.compute("running", len(PROMPT))
    simulation.end("running", "activated", "new 0", "new 1")
    memory.check()
    assert cached_pages(simulation) == 1 + 3
    assert simulation.begin("again", PROMPT, MIX_B) == 3 * SIZE


def test_what_is_dropped_can_be_cached_again_while_the_old_pages_are_in_use():
    simulation = make_simulation()
    memory = simulation.memory
    simulation.run("old", PROMPT, MIX_A)
    memory.prefixes.drop_adapter(A.key)
    assert simulation.run("new", PROMPT, MIX_A) == 0
    memory.check()
    assert cached_pages(simulation) == 6
    simulation.end("old")
    memory.check()
    assert cached_pages(simulation) == 3
    assert simulation.run("next", PROMPT, MIX_A) == 3 * SIZE


def test_a_sequence_whose_prefix_was_dropped_caches_nothing_below_it():
    simulation = make_simulation()
    memory = simulation.memory
    simulation.begin("running", PROMPT, MIX_A)
    simulation.compute("running", SIZE)
    memory.prefixes.drop_adapter(A.key)
    simulation.compute("running", len(PROMPT))
    memory.check()
    assert cached_pages(simulation) == 1
    simulation.end("running")
    assert cached_pages(simulation) == 0
