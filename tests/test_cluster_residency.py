"""Reports of replicas: the view and the index of prefixes hold what was reported, gaps are seen."""

from __future__ import annotations

from random import Random

import pytest

from loraswarm.cluster.prefixes import PrefixIndex
from loraswarm.cluster.residency import ASK_AGAIN_S, ResidencyBook
from loraswarm.core.client import AdapterSummary
from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.residency_report import ResidencyReport, join_pages, page_ids
from loraswarm.memory.prefix_cache import PrefixSalt, prefix_digests
from routing_cases import view_of

SIZE = 4
MIX = ((("sql", "d1"), 1.0),)


def report(number, epoch=1, full=False, added=(), removed=(), **tiers):
    return ResidencyReport(
        epoch=epoch,
        number=number,
        is_full=full,
        tiers=tiers,
        added_pages=join_pages(added),
        removed_pages=join_pages(removed),
    )


def digests(tokens, mix=()):
    return list(prefix_digests(tokens, PrefixSalt(mix), SIZE))


def book_of(num_replicas=2, max_pages=1000):
    view = view_of(num_replicas)
    prefixes = PrefixIndex(SIZE, max_pages)
    return ResidencyBook(view, prefixes), view, prefixes


def test_reports_in_order_are_entered():
    book, view, _ = book_of()
    assert book.apply("r0", report(0, full=True, a="device", b="host")) == "applied"
    assert book.apply("r1", report(0, full=True, a="host")) == "applied"
    assert view.replicas["r0"].tiers == {"a": "device", "b": "host"}
    assert view.holders == {"a": {"r0", "r1"}, "b": {"r0"}}
    assert book.apply("r0", report(1, a=None, b="device")) == "applied"
    assert view.replicas["r0"].tiers == {"b": "device"}
    assert view.holders == {"a": {"r1"}, "b": {"r0"}}


def test_a_gap_asks_once_and_only_a_full_report_ends_it():
    book, view, _ = book_of()
    book.apply("r0", report(0, full=True, a="device"))
    assert book.apply("r0", report(2, b="device")) == "ask"
    assert book.apply("r0", report(3, c="device")) == "ignored"
    assert view.replicas["r0"].tiers == {"a": "device"}, "what was known stays"
    assert book.apply("r0", report(4, full=True, c="host")) == "applied"
    assert view.replicas["r0"].tiers == {"c": "host"}
    assert book.apply("r0", report(5, d="host")) == "applied"


def test_a_full_report_that_does_not_come_is_asked_for_again():
    book, view, _ = book_of()
    assert book.apply("r0", report(7)) == "ask"
    view.now_s += ASK_AGAIN_S / 2
    assert book.apply("r0", report(8)) == "ignored"
    view.now_s += ASK_AGAIN_S
    assert book.apply("r0", report(9)) == "ask"


def test_another_life_of_the_engine_must_begin_with_a_full_report():
    book, view, _ = book_of()
    book.apply("r0", report(0, full=True, a="device"))
    assert book.apply("r0", report(1, epoch=2, b="device")) == "ask"
    assert book.apply("r0", report(2, epoch=2, full=True, b="host")) == "applied"
    assert view.replicas["r0"].tiers == {"b": "host"}
    assert book.apply("r0", report(1, epoch=1, a="device")) == "ask", "a late one of the first"


def test_a_report_that_was_entered_already_changes_nothing():
    book, view, _ = book_of()
    book.apply("r0", report(0, full=True, a="device"))
    book.apply("r0", report(1, a=None))
    assert book.apply("r0", report(0, full=True, a="device")) == "ignored"
    assert book.apply("r0", report(1, b="host")) == "ignored"
    assert view.replicas["r0"].tiers == {}


def test_an_unknown_replica_is_ignored_and_a_forgotten_one_begins_anew():
    book, view, prefixes = book_of()
    assert book.apply("gone", report(0, full=True, a="device")) == "ignored"
    assert view.holders == {}
    page = digests([1] * SIZE)
    book.apply("r0", report(0, full=True, added=page))
    assert prefixes.num_pages == 1
    book.forget("r0")
    assert prefixes.num_pages == 0
    assert book.apply("r0", report(1, a="device")) == "ask"


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_lost_the_view_comes_to_hold_what_the_replica_does(seed):
    """Reports are lost at random; those that are asked for come. At last nothing is lost."""
    rng = Random(seed)
    book, view, prefixes = book_of(1)
    tiers, pages = {}, set()
    is_full, num_lost, num_asked = True, 0, 0
    for number in range(300):
        changed = {f"a{rng.randrange(6)}": rng.choice(["device", "host", None]) for _ in range(2)}
        tiers.update(changed)
        tiers = {name: tier for name, tier in tiers.items() if tier is not None}
        added = {bytes([rng.randrange(20)]) * 8 for _ in range(2)} - pages
        removed = set(rng.sample(sorted(pages), min(len(pages), rng.randrange(3))))
        pages = (pages | added) - removed
        content = tiers if is_full else changed
        came = report(number, full=is_full, added=pages if is_full else added, **content)
        if not is_full:
            came = report(number, added=added, removed=removed, **changed)
        is_lost = number < 280 and rng.random() < 0.2
        num_lost += is_lost
        view.now_s += 2 * ASK_AGAIN_S
        is_full = is_full and is_lost
        if not is_lost and book.apply("r0", came) == "ask":
            is_full, num_asked = True, num_asked + 1
    assert (num_lost > 20, num_asked > 10) == (True, True)
    assert view.replicas["r0"].tiers == tiers
    assert prefixes.pages_of("r0") == set(page_ids(join_pages(pages)))


def test_a_prompt_is_found_as_far_as_a_replica_has_it():
    book, _, prefixes = book_of()
    tokens = list(range(13))
    pages = digests(tokens)
    assert len(pages) == 3
    book.apply("r0", report(0, full=True, added=pages))
    book.apply("r1", report(0, full=True, added=pages[:1]))
    found = prefixes.find(tokens, ())
    assert [found.tokens_at(name) for name in ("r0", "r1", "gone")] == [12, 4, 0]
    assert found.best_replicas() == ("r0",)
    other = prefixes.find([*tokens[:8], 99, *tokens[9:]], ())
    assert [other.tokens_at(name) for name in ("r0", "r1")] == [8, 4]
    book.apply("r1", report(1, removed=pages[:1], added=pages[1:]))
    assert prefixes.find(tokens, ()).tokens_at("r1") == 0, "what follows a gap is of no use"
    book.apply("r1", report(2, removed=pages[1:], added=pages[:1]))
    book.apply("r0", report(1, removed=pages[1:]))
    assert prefixes.find(tokens, ()).best_replicas() == ("r0", "r1")
    assert prefixes.find([99, *tokens], ()).best_replicas() == ()


def test_pages_of_an_adapter_are_no_others():
    book, _, prefixes = book_of()
    tokens = list(range(8))
    book.apply("r0", report(0, full=True, added=digests(tokens, MIX)))
    assert prefixes.find(tokens, MIX).tokens_at("r0") == 8
    assert prefixes.find(tokens, ()).tokens_at("r0") == 0
    assert prefixes.find(tokens, ((("sql", "d2"), 1.0),)).tokens_at("r0") == 0


def test_a_request_is_looked_for_with_the_content_that_the_catalog_names():
    book, _, prefixes = book_of()
    tokens = tuple(range(8))
    book.apply("r0", report(0, full=True, added=digests(tokens, MIX)))
    request = Request(
        request_id="x", prompt_token_ids=tokens, params=SamplingParams(), adapter="sql"
    )

    def found(digest):
        catalog = {"sql": AdapterSummary(name="sql", path="", digest=digest)}
        return prefixes.find_for(request, catalog).tokens_at("r0")

    assert [found("d1"), found("d2"), found("")] == [8, 0, 0]
    assert prefixes.find_for(request, {}).tokens_at("r0") == 0


def test_the_index_is_bounded_and_says_what_it_left_out():
    book, _, prefixes = book_of(2, max_pages=10)
    tokens = list(range(80))
    pages = digests(tokens)
    book.apply("r0", report(0, full=True, added=pages[:3]))
    book.apply("r1", report(0, full=True, added=pages))
    assert (prefixes.num_pages, prefixes.num_left_out) == (8, 15)
    assert prefixes.find(tokens, ()).tokens_at("r1") == 5 * SIZE
    book.apply("r1", report(1, removed=pages))
    assert prefixes.num_pages == 3
    assert prefixes.find(tokens, ()).best_replicas() == ("r0",)
