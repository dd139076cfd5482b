"""Shelves: extents of several holders in one page, gaps that close, plans that change nothing."""

from __future__ import annotations

import copy
import itertools
import random

import pytest

from loraswarm.memory.shelves import Extent, Shelves

PAGE = 160


class Pages:
    """Hands out page numbers; knows which are in use."""

    def __init__(self):
        self._numbers = itertools.count(7)
        self.in_use = set()

    def put(self, shelves, holder, bins):
        """Plan and commit; returns the number of new pages."""
        plan = shelves.plan({holder: bins})
        new = [next(self._numbers) for _ in range(plan.num_new_pages)]
        self.in_use |= set(new)
        shelves.commit(plan, new)
        return len(new)

    def take_away(self, shelves, holder):
        empty = shelves.release(holder)
        assert set(empty) <= self.in_use
        self.in_use -= set(empty)
        return empty


def test_extents_of_several_holders_share_a_page_and_the_last_one_gives_it_up():
    shelves, pages = Shelves(PAGE), Pages()
    assert pages.put(shelves, "a", [[30, 30]]) == 1
    assert pages.put(shelves, "b", [[40]]) == 0
    assert pages.put(shelves, "c", [[61]]) == 1, "60 are left in the first page"
    assert shelves.extents_of("b") == (Extent(7, 60, 40),)
    assert pages.take_away(shelves, "a") == []
    assert pages.take_away(shelves, "b") == [7]
    assert pages.take_away(shelves, "c") == [8]
    assert shelves.pages == set()


def test_gaps_on_both_sides_of_a_released_extent_become_one():
    shelves, pages = Shelves(PAGE), Pages()
    for holder in "abcd":
        pages.put(shelves, holder, [[40]])
    for holder in "acb":
        pages.take_away(shelves, holder)
        shelves.check("abcd")
    assert pages.put(shelves, "e", [[120]]) == 0
    assert shelves.extents_of("e") == (Extent(7, 0, 120),)


def test_a_plan_changes_nothing():
    shelves, pages = Shelves(PAGE), Pages()
    pages.put(shelves, "a", [[40, 20]])
    before = copy.deepcopy(vars(shelves))
    assert shelves.plan({"b": [[50, 50]], "c": [[100]]}).num_new_pages == 1
    assert vars(shelves) == before


def test_an_outdated_plan_is_a_bug():
    shelves, pages = Shelves(PAGE), Pages()
    pages.put(shelves, "a", [[40]])
    plan = shelves.plan({"b": [[50]]})
    pages.put(shelves, "c", [[60]])
    with pytest.raises(AssertionError, match="changed since the plan"):
        shelves.commit(plan, [])


def test_pages_stay_covered_under_random_use_and_no_bin_takes_two_new_pages():
    rng = random.Random(0)
    shelves, pages = Shelves(PAGE), Pages()
    holders = {}
    reused = 0
    for number in range(3000):
        if holders and rng.random() < 0.48:
            holder = rng.choice(sorted(holders))
            del holders[holder]
            pages.take_away(shelves, holder)
        else:
            holder = f"h{number}"
            holders[holder] = [random_bin(rng) for _ in range(rng.choice([0, 1, 3]))]
            num_new = pages.put(shelves, holder, holders[holder])
            assert num_new <= len(holders[holder])
            reused += num_new < len(holders[holder])
        shelves.check(holders)
        assert shelves.pages == pages.in_use
        for name, bins in holders.items():
            sizes = [size for sizes in bins for size in sizes]
            assert [extent.size for extent in shelves.extents_of(name)] == sizes
    assert reused > 300


def random_bin(rng):
    """Sizes that fit one page together, some of them nearly a page."""
    sizes, room = [], PAGE
    while room and len(sizes) < 7 and (not sizes or rng.random() < 0.8):
        sizes.append(rng.randint(1, room))
        room -= sizes[-1]
    return sizes


def test_check_finds_overlaps_holes_and_holders_that_are_gone():
    def shelves_of_two():
        shelves, pages = Shelves(PAGE), Pages()
        pages.put(shelves, "a", [[40]])
        pages.put(shelves, "b", [[20]])
        return shelves

    shelves_of_two().check("ab")
    with pytest.raises(AssertionError, match="holder that is gone"):
        shelves_of_two().check("a")
    overlapping = shelves_of_two()
    overlapping._extents["b"] = (Extent(7, 30, 20),)
    with pytest.raises(AssertionError, match="overlap or part"):
        overlapping.check("ab")
    leaking = shelves_of_two()
    del leaking._extents["a"]
    with pytest.raises(AssertionError, match="not covered from its start"):
        leaking.check("ab")
