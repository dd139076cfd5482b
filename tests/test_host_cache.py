"""Images in host memory: exact bytes, protected ones stay, shared matrices once."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from loraswarm.adapters.adapter import AdapterInfo, ModuleInfo, SharedMatrix
from loraswarm.memory.costs import CostModel
from loraswarm.memory.eviction import EvictionOrder
from loraswarm.memory.host_cache import HostCache
from loraswarm.memory.image import AdapterImage
from memory_cases import describe

MATRICES = tuple(SharedMatrix(f"shared-{number}", 4, 64) for number in range(3))
SHARED_BYTES = 1000


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 100.0
        return self.now


def cache_of(capacity_bytes: int, policy="lru") -> HostCache:
    return HostCache(capacity_bytes, EvictionOrder(policy, Clock()), CostModel())


def info_of(name: str, *matrices: SharedMatrix) -> AdapterInfo:
    modules = [ModuleInfo(site, 4, 1.0, ("u",), matrix) for site, matrix in enumerate(matrices)]
    return describe(name, modules)


def image_of(name: str, num_bytes: int, *matrices: SharedMatrix, skip=()) -> AdapterImage:
    shared = {
        matrix: np.zeros(SHARED_BYTES, dtype=np.uint8) for matrix in matrices if matrix not in skip
    }
    return AdapterImage(info_of(name, *matrices), np.zeros(num_bytes, dtype=np.uint8), shared)


def key(name: str):
    return (name, "0")


def test_an_image_is_found_under_its_key_only():
    host = cache_of(100)
    image = image_of("sql", 7)
    assert host.put(image) == []
    assert host.has(key("sql"))
    assert host.get(key("sql")).own is image.own
    assert host.get(("sql", "another generation")) is None
    assert host.keys() == (key("sql"),)
    assert (host.num_images, host.num_bytes) == (1, 7)
    assert host.put(image) == []
    assert (host.num_images, host.num_bytes) == (1, 7)


def test_the_least_recently_touched_leave_for_want_of_room():
    host = cache_of(30)
    for name in "abc":
        host.put(image_of(name, 10))
    host.touch(key("a"))
    assert host.put(image_of("d", 15)) == [key("b"), key("c")]
    assert set(host.keys()) == {key("a"), key("d")}
    assert (host.num_bytes, host.total_evictions) == (25, 2)
    host.check()


def test_by_cost_the_one_used_more_often_stays_although_used_before():
    host = cache_of(25, "cost")
    host.touch(key("a"))
    host.touch(key("a"))
    host.put(image_of("a", 10))
    host.put(image_of("b", 10))
    assert host.put(image_of("c", 10)) == [key("b")]


def test_protected_images_stay_although_there_is_too_little_room():
    host = cache_of(20)
    for name in "abc":
        host.protect(key(name))
        assert host.put(image_of(name, 10)) == []
    assert host.num_bytes == 30 > host.capacity_bytes
    host.protect(key("a"))
    assert host.unprotect(key("a")) == []
    assert host.has(key("a")), "protected once still"
    assert host.unprotect(key("b")) == [key("b")]
    assert host.put(image_of("d", 10)) == [key("d")], "only what is not protected may leave"
    assert host.num_bytes == 20
    host.check()


def test_an_image_larger_than_everything_is_kept_while_it_is_protected():
    host = cache_of(20)
    host.put(image_of("small", 10))
    assert host.put(image_of("huge", 21)) == [key("huge")]
    assert host.has(key("small")), "nobody leaves for one that cannot stay"
    host.protect(key("huge"))
    assert host.put(image_of("huge", 21)) == [key("small")]
    assert host.num_bytes == 21
    assert host.unprotect(key("huge")) == [key("huge")]
    assert host.num_bytes == 0


def test_an_unloaded_image_leaves_at_once_or_when_it_is_no_longer_protected():
    host = cache_of(100)
    for name in "ab":
        host.put(image_of(name, 10))
    assert host.drop(key("a"))
    assert not host.has(key("a"))
    host.protect(key("b"))
    host.protect(key("b"))
    assert not host.drop(key("b"))
    host.unprotect(key("b"))
    assert host.has(key("b"))
    host.unprotect(key("b"))
    assert not host.has(key("b"))
    assert (host.num_bytes, host.total_evictions) == (0, 0), "unloaded, not evicted"
    assert host.drop(key("b")), "nothing of it is here"
    host.put(image_of("b", 10))
    host.protect(key("b"))
    host.unprotect(key("b"))
    assert host.has(key("b")), "a drop acts once"
    host.check()


def test_an_image_that_comes_after_its_unload_leaves_with_its_protection():
    host = cache_of(100)
    host.protect(key("a"))
    assert not host.drop(key("a"))
    host.put(image_of("a", 10))
    assert host.has(key("a"))
    host.unprotect(key("a"))
    assert not host.has(key("a"))


def test_a_shared_matrix_is_kept_once_as_long_as_an_image_uses_it():
    host = cache_of(10_000)
    first, second, third = MATRICES
    host.put(image_of("a", 10, first, second))
    host.put(image_of("b", 10, second, third))
    assert host.num_bytes == 20 + 3 * SHARED_BYTES
    assert host.shared_matrices() == frozenset(MATRICES)
    assert host.get(key("a")).shared[second] is host.get(key("b")).shared[second]
    host.drop(key("a"))
    assert host.shared_matrices() == {second, third}
    assert host.num_bytes == 10 + 2 * SHARED_BYTES
    host.drop(key("b"))
    assert host.num_bytes == 0
    host.check()


def test_an_image_packed_without_matrices_at_hand_gets_them_or_is_known_to_lack_them():
    host = cache_of(10_000)
    first, second, _ = MATRICES
    partial = image_of("b", 10, first, second, skip=[first])
    assert host.missing(partial) == (first,)
    with pytest.raises(AssertionError, match="not at hand"):
        host.put(partial)
    assert (host.num_images, host.num_bytes) == (0, 0)
    host.put(image_of("a", 10, first))
    assert host.missing(partial) == ()
    host.put(partial)
    assert host.get(key("b")).shared.keys() == {first, second}
    host.drop(key("a"))
    assert host.get(key("b")).shared[first] is not None
    host.check()


def test_what_may_load_fits_beside_protected_images_and_loads_under_way():
    host = cache_of(100 + SHARED_BYTES)
    assert host.may_load(10**9, 0), "no adapter is too large to be served"
    assert not host.may_load(10**9, 1)
    assert host.may_load(10, SHARED_BYTES)
    host.put(image_of("idle", 90))
    assert host.may_load(10**9, 0), "idle images leave"
    host.put(image_of("a", 40, MATRICES[0]))
    host.protect(key("a"))
    assert host.may_load(60, 0)
    assert not host.may_load(61, 0)
    assert not host.may_load(50, 11)
    host.protect(key("not here yet"))
    host.unprotect(key("a"))
    assert host.may_load(10**9, 0)


@pytest.mark.parametrize("policy", ["cost", "lru"])
def test_bytes_are_exact_and_protected_images_stay_whatever_happens(policy):
    rng = Random(0)
    host = cache_of(5000, policy)
    names = [f"adapter-{number}" for number in range(12)]
    images = {
        name: image_of(name, rng.choice([0, 1, 133, 700, 2500]), *rng.sample(MATRICES, index % 3))
        for index, name in enumerate(names)
    }
    protections: list[str] = []
    num_over = 0
    for _ in range(3000):
        name = rng.choice(names)
        present = {each for each in protections if host.has(key(each))}
        action = rng.choice(["put", "put", "touch", "protect", "unprotect", "drop"])
        if action == "put" and not host.has(key(name)):
            host.put(images[name])
        elif action == "touch":
            host.touch(key(name))
        elif action == "protect" and len(protections) < 6:
            host.protect(key(name))
            protections.append(name)
        elif action == "unprotect" and protections:
            name = protections.pop(rng.randrange(len(protections)))
            host.unprotect(key(name))
            present -= {name}
        elif action == "drop":
            host.drop(key(name))
        host.check()
        assert all(host.has(key(each)) for each in present)
        if host.num_bytes > host.capacity_bytes:
            num_over += 1
            assert set(host.keys()) <= set(map(key, protections))
    assert host.total_evictions > 100
    assert num_over > 0
    for name in protections:
        host.unprotect(key(name))
    kept = host.keys()
    assert all(host.drop(each) for each in kept)
    assert (host.num_bytes, host.num_images, host.shared_matrices()) == (0, 0, frozenset())


def test_generations_of_one_name_are_images_of_their_own():
    host = cache_of(100)
    old = image_of("sql", 7)
    new = replace(old, info=replace(old.info, digest="1"))
    host.put(old)
    host.put(new)
    assert host.drop(old.info.key)
    assert host.keys() == (("sql", "1"),)
