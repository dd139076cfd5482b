"""A scan tells what changed, takes nothing half-written, and never loses what it cannot see."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from loraswarm.adapters import scanner as scanner_module
from loraswarm.adapters.local_store import LocalStore
from loraswarm.adapters.scanner import Clock, Scanner
from loraswarm.adapters.stores import Found
from loraswarm.errors import (
    AdapterError,
    ForbiddenPath,
    Overloaded,
    PathNotFound,
    StoreError,
)
from test_stores import CONFIG_FILE, WEIGHTS_FILE, fake_adapter


class Time:
    """A clock that tests move; `on_sleep` happens while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.on_sleep = lambda: None
        self.clock = Clock(lambda: self.now_s, lambda: self.now_s, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.on_sleep()


class ListedStore:
    """A store that shows what it is told to."""

    def __init__(self, root: str, *found: Found) -> None:
        self.root = root
        self.found = list(found)
        self.is_down = False

    def look(self):
        if self.is_down:
            raise StoreError(f"store {self.root!r}: down")
        return list(self.found)

    def locate(self, path):
        if not path.startswith(self.root + "/"):
            return None
        for found in self.look():
            if found.location == path:
                return found
        raise PathNotFound(f"there is no adapter at {path!r}")

    def fetch(self, found, into):
        raise NotImplementedError


def found_in(root: str, name: str, stamp: str = "1", changed_s: float = 0.0) -> Found:
    return Found(name, f"{root}/{name}", stamp, changed_s=changed_s)


def names(items) -> list[str]:
    return [found.name for found in items]


@pytest.fixture
def time():
    return Time()


def scanner_of(time: Time, *stores) -> Scanner:
    return Scanner(stores, settle_s=0.5, clock=time.clock)


def test_a_scan_tells_what_came_changed_and_went(time):
    store = ListedStore("/s", found_in("/s", "a"), found_in("/s", "b"), found_in("/s", "c"))
    scanner = scanner_of(time, store)
    first = scanner.scan()
    assert (names(first.found), first.is_first) == (["a", "b", "c"], True)
    assert (first.removed, first.pending, first.failures) == ((), (), ())
    store.found = [found_in("/s", "a"), found_in("/s", "b", "2"), found_in("/s", "d")]
    second = scanner.scan()
    assert names(second.found) == ["b", "d"]
    assert second.removed == (found_in("/s", "c"),)
    assert not second.is_first
    third = scanner.scan()
    assert (third.found, third.removed, third.pending) == ((), (), ())


def test_what_is_young_is_pending_until_its_files_have_rested(time):
    store = ListedStore("/s", found_in("/s", "old", changed_s=time.now_s - 0.5))
    store.found.append(found_in("/s", "young", changed_s=time.now_s - 0.4))
    scanner = scanner_of(time, store)
    change = scanner.scan()
    assert (names(change.found), names(change.pending)) == (["old"], ["young"])
    time.now_s += 0.11
    change = scanner.scan()
    assert (names(change.found), names(change.pending)) == (["young"], [])


def test_files_from_the_future_settle_by_two_looks_at_the_same(time):
    later_s = time.now_s + 3600
    store = ListedStore("/s", found_in("/s", "a", "1", later_s))
    scanner = scanner_of(time, store)
    assert names(scanner.scan().pending) == ["a"]
    time.now_s += 0.4
    assert names(scanner.scan().pending) == ["a"]
    store.found = [found_in("/s", "a", "2", later_s)]
    time.now_s += 0.4
    assert names(scanner.scan().pending) == ["a"]
    time.now_s += 0.6
    assert [found.stamp for found in scanner.scan().found] == ["2"]


def test_what_is_being_replaced_stays_as_it_was_until_it_has_settled(time):
    store = ListedStore("/s", found_in("/s", "a"))
    scanner = scanner_of(time, store)
    scanner.scan()
    store.found = [found_in("/s", "a", "2", time.now_s)]
    change = scanner.scan()
    assert (change.found, change.removed, names(change.pending)) == ((), (), ["a"])
    time.now_s += 0.6
    assert [found.stamp for found in scanner.scan().found] == ["2"]


def test_a_store_that_cannot_be_listed_keeps_its_adapters_and_harms_no_other(time):
    down, up = ListedStore("/d", found_in("/d", "a")), ListedStore("/u", found_in("/u", "b"))
    scanner = scanner_of(time, down, up)
    scanner.scan()
    down.is_down = True
    up.found.append(found_in("/u", "c"))
    change = scanner.scan()
    assert (names(change.found), change.removed) == (["c"], ())
    assert change.failures == ("store '/d': down",)
    down.is_down, down.found = False, []
    assert names(scanner.scan().removed) == ["a"]


def test_the_first_store_owns_a_name_and_gives_it_back(time):
    one, two = ListedStore("/1", found_in("/1", "a")), ListedStore("/2", found_in("/2", "a"))
    scanner = scanner_of(time, one, two)
    owner, shadow = scanner.scan().found
    assert (owner.location, owner.shadowed_by) == ("/1/a", None)
    assert (shadow.location, shadow.shadowed_by) == ("/2/a", "/1/a")
    one.found = []
    change = scanner.scan()
    assert [(found.location, found.shadowed_by) for found in change.found] == [("/2/a", None)]
    assert [found.location for found in change.removed] == ["/1/a"]


def test_a_name_changes_hands_only_when_the_new_owner_has_settled(time):
    one, two = ListedStore("/1"), ListedStore("/2", found_in("/2", "a"))
    scanner = scanner_of(time, one, two)
    scanner.scan()
    one.found = [found_in("/1", "a", changed_s=time.now_s)]
    assert scanner.scan().found == ()
    time.now_s += 0.6
    assert [found.shadowed_by for found in scanner.scan().found] == [None, "/1/a"]


def test_what_a_request_named_is_scanned_like_the_others(time):
    store = ListedStore("/s", found_in("/s", "a"))
    deep = Found("v7", "/s/deep/v7", "1")
    scanner = scanner_of(time, store)
    scanner.scan()
    store.found.append(deep)
    located = scanner.locate("mine", "/s/deep/v7")
    store.found.pop()
    assert located == Found("mine", "/s/deep/v7", "1", is_by_request=True)
    store.locate = lambda path: deep
    scanner.watch(located)
    assert scanner.scan().found == ()
    deep = replace(deep, stamp="2")
    assert scanner.scan().found == (replace(located, stamp="2"),)
    deep = None
    assert scanner.scan().removed == (replace(located, stamp="2"),)
    scanner.unwatch("mine")
    scanner.unwatch("mine")
    change = scanner.scan()
    assert (change.found, change.removed) == ((), ())


def test_what_a_request_named_keeps_its_name_from_a_scan(time):
    store = ListedStore("/s", found_in("/s", "a"), found_in("/s", "b"))
    scanner = scanner_of(time, store)
    scanner.scan()
    scanner.watch(replace(found_in("/s", "b"), name="a", is_by_request=True))
    (shadow,) = scanner.scan().found
    assert (shadow.location, shadow.shadowed_by) == ("/s/a", "/s/b")
    scanner.unwatch("a")
    assert [found.shadowed_by for found in scanner.scan().found] == [None]


def test_a_path_is_looked_for_in_every_store(time, tmp_path):
    for place in ("1/a", "2/b"):
        fake_adapter(tmp_path / place)
    stores = [LocalStore(str(tmp_path / root)) for root in ("1", "2")]
    scanner = Scanner(stores, settle_s=0)
    assert scanner.locate("x", "b").location == str(tmp_path / "2" / "b")
    assert scanner.locate("x", str(tmp_path / "1" / "a")).name == "x"
    with pytest.raises(PathNotFound):
        scanner.locate("x", "c")
    with pytest.raises(ForbiddenPath) as caught:
        scanner.locate("x", str(tmp_path / "3"))
    assert caught.value.http_status == 403
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(StoreError):
        scanner.locate("x", "c")
    assert scanner.locate("x", "b").name == "x"


def test_without_stores_every_path_is_forbidden():
    for path in ("a", "/etc", "s3://bucket/a"):
        with pytest.raises(ForbiddenPath):
            Scanner([]).locate("a", path)


def test_a_young_adapter_is_located_once_it_rests(time, tmp_path):
    path = fake_adapter(tmp_path / "a")
    time.now_s = os.stat(path / WEIGHTS_FILE).st_ctime + 0.1
    scanner = scanner_of(time, LocalStore(str(tmp_path)))
    assert scanner.locate("a", "a").location == str(path)
    time.on_sleep = lambda: (path / WEIGHTS_FILE).write_bytes(b"longer")
    time.now_s -= 0.5
    with pytest.raises(Overloaded, match="still being written") as caught:
        scanner.locate("a", "a")
    assert caught.value.retry_after_s == 1


def test_an_incomplete_directory_is_pending_then_refused_then_served(time, tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / CONFIG_FILE).write_text("{}")
    scanner = scanner_of(time, LocalStore(str(tmp_path)))
    time.now_s = os.stat(path).st_ctime + 0.1
    assert names(scanner.scan().pending) == ["a"]
    time.now_s += 1
    (found,) = scanner.scan().found
    assert f"{WEIGHTS_FILE} is missing" in found.problem
    with pytest.raises(AdapterError, match="missing"):
        scanner.locate("a", "a")
    (path / WEIGHTS_FILE).write_bytes(b"x")
    assert names(scanner.scan().found + scanner.scan().pending) == ["a"]
    time.now_s += 3600
    scanner.scan()
    assert scanner.locate("a", "a").problem is None


def test_a_directory_that_is_renamed_into_its_place_is_taken_at_once(time, tmp_path):
    path = fake_adapter(tmp_path / "staging" / "a")
    (tmp_path / "root").mkdir()
    scanner = scanner_of(time, LocalStore(str(tmp_path / "root")))
    time.now_s = os.stat(path / WEIGHTS_FILE).st_ctime + 10
    assert scanner.scan().found == ()
    os.rename(path, tmp_path / "root" / "a")
    assert names(scanner.scan().found) == ["a"]


def test_how_long_files_must_have_rested_can_be_set(tmp_path, monkeypatch):
    fake_adapter(tmp_path / "a")
    store = LocalStore(str(tmp_path))
    monkeypatch.setattr(scanner_module, "SETTLE_S", 3600)
    assert names(Scanner([store]).scan().pending) == ["a"]
    monkeypatch.setattr(scanner_module, "SETTLE_S", 0)
    assert names(Scanner([store]).scan().found) == ["a"]


def test_a_location_belongs_to_the_store_that_it_is_below(time):
    one, two = ListedStore("/a"), ListedStore("s3://bucket/x")
    scanner = scanner_of(time, one, two)
    assert scanner.store_of("/a/b") is one
    assert scanner.store_of("s3://bucket/x") is two
    for location in ("/a-evil/b", "s3://bucket/xy", "/"):
        with pytest.raises(StoreError):
            scanner.store_of(location)
