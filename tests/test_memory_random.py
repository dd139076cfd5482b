"""Memory under random use, against plain models of who may stay and of what each page holds."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from loraswarm.errors import OutOfPages
from loraswarm.memory.memory import Memory, MemoryOptions
from memory_cases import kinds
from prefix_cases import SIZE, Simulation
from scheduler_cases import GEOMETRY, SHAPE, make_info


class RandomUse:
    """One operation after another, and what must be true after each.

    `pins`, `protected`, `kept`, `writing` and `dropped` are what has been asked of the memory, as
    plain sets and counters.
    """

    def __init__(self, seed, num_pages, **options):
        self.rng = random.Random(seed)
        self.clock = 0.0
        options = MemoryOptions(clock=lambda: self.clock, **options)
        self.memory = Memory.of_pages(num_pages, SHAPE, GEOMETRY, options)
        self.simulation = Simulation(self.memory)
        self.infos = [make_info(f"a{i}", rank=rank) for i, rank in enumerate((1, 4, 16, 33))]
        self.infos += [kinds(SHAPE)[name] for name in ("vera", "vera-other", "gains", "ia3")]
        self.pins, self.protected, self.kept = Counter(), Counter(), set()
        self.writing, self.dropped = set(), set()
        self.mixes = {}
        self.seen = Counter()

    def start(self):
        """A sequence as the scheduler starts it: pins, prefix, room, loads; or nothing at all."""
        rng, memory = self.rng, self.memory
        infos = rng.sample(self.infos, rng.choice([0, 1, 1, 1, 2]))
        resident = [info for info in infos if memory.adapters.is_resident(info.key)]
        absent = [info for info in infos if info not in resident]
        for info in resident:
            assert memory.adapters.pin(info) is None
        name = f"s{self.seen['start']}"
        self.seen["start"] += 1
        mix = tuple((info.key, 0.5) for info in infos)
        tokens = [rng.choice([1, 1, 1, 2])] * SIZE + [rng.choice([3, 3, 4])] * SIZE
        tokens = tokens[: rng.choice([1, SIZE, 2 * SIZE])] + [5] * rng.choice([1, 7, SIZE, 40])
        self.simulation.begin(name, tokens, mix, rng.choice([0, 0, 7, SIZE, 133]) if mix else 0)
        num_pages = memory.kv_cache.num_missing_pages(name, len(tokens))
        num_all = num_pages + sum(memory.adapters.num_load_pages(info) for info in absent)
        if not memory.has_room(num_all):
            self.simulation.end(name)
            for info in resident:
                memory.adapters.unpin(info.key, was_used=False)
            self.seen["refused"] += 1
            return
        assert self.evict(num_pages) is not None
        memory.kv_cache.reserve(name, len(tokens))
        for info in absent:
            self.load(info)
        self.pins.update(info.key for info in infos)
        self.mixes[name] = [info.key for info in infos]

    def load(self, info):
        """Take pages for an adapter; there is room, and it must be found."""
        before = self.may_not_leave()
        load, evicted = self.memory.pin_adapter(info)
        assert not before & set(evicted)
        self.writing.add(info.key)
        for start in load.starts + tuple(each for p in load.shared for each in p.starts):
            self.simulation.contents[start // GEOMETRY.page_elements] = "tiles"

    def compute(self):
        name = self.pick(self.mixes)
        if name is None or self.writing & set(self.mixes[name]):
            return
        running = self.simulation.running[name]
        left = len(running.token_ids) - running.num_computed
        self.simulation.compute(name, running.num_computed + self.rng.randint(0, left))

    def grow(self):
        """One token more, as a decode has it."""
        name = self.pick(self.mixes)
        if name is None:
            return
        running = self.simulation.running[name]
        num_tokens = len(running.token_ids) + 1
        if self.evict(self.memory.kv_cache.num_missing_pages(name, num_tokens)) is None:
            self.seen["refused"] += 1
            return
        self.memory.kv_cache.reserve(name, num_tokens)
        running.token_ids.append(self.rng.choice([5, 5, 6]))

    def end(self):
        name = self.pick(self.mixes)
        if name is None:
            return
        keys = self.mixes.pop(name)
        self.pins.subtract(keys)
        frees_first = self.rng.random() < 0.7
        if frees_first:
            self.simulation.end(name)
        for key in keys:
            self.memory.adapters.unpin(key)
        if not frees_first:
            self.simulation.end(name)

    def finish(self):
        key = self.pick(self.writing)
        if key is None:
            return
        self.writing.remove(key)
        if self.rng.random() < 0.8:
            self.memory.adapters.finish_load(key)
            return
        self.memory.adapters.fail_load(key)
        self.kept.discard(key)
        for name in [name for name, keys in self.mixes.items() if key in keys]:
            self.simulation.end(name)
            keys = self.mixes.pop(name)
            self.pins.subtract(keys)
            for each in keys:
                self.memory.adapters.unpin(each)
        assert not self.memory.adapters.is_resident(key)
        self.seen["failed"] += 1

    def protect(self):
        key = self.rng.choice(self.infos).key
        if self.protected[key] and self.rng.random() < 0.7:
            self.protected[key] -= 1
            self.memory.adapters.unprotect(key)
        else:
            self.protected[key] += 1
            self.memory.adapters.protect(key)

    def keep(self):
        key = self.pick(self.memory.adapters.keys())
        if key is None:
            return
        if self.rng.random() < 0.3 and key not in self.dropped:
            self.memory.adapters.keep(key)
            self.kept.add(key)
        else:
            self.memory.adapters.unkeep(key)
            self.kept.discard(key)

    def drop(self):
        key = self.rng.choice(self.infos).key
        self.kept.discard(key)
        is_gone = self.memory.drop_adapter(key)
        assert is_gone == (key not in self.writing and not self.pins[key])
        if not is_gone:
            self.dropped.add(key)
            self.seen["dropped later"] += 1

    def make_room(self):
        self.evict(self.memory.pool.num_free + self.rng.randrange(12))

    def evict(self, num_pages):
        """`make_room`, with what it promises."""
        memory, stay = self.memory, self.may_not_leave()
        before = memory.pool.num_free, memory.adapters.keys(), memory.prefixes.num_pages
        has_room = memory.has_room(num_pages)
        protected = {key for key, count in self.protected.items() if count}
        evicted = memory.make_room(num_pages)
        assert (evicted is not None) == has_room
        if evicted is None:
            after = memory.pool.num_free, memory.adapters.keys(), memory.prefixes.num_pages
            assert before == after
            return None
        assert memory.pool.num_free >= num_pages
        assert not stay & set(evicted)
        if protected & set(evicted):
            self.seen["protected left"] += 1
            assert len(memory.order) == 0, "a protected adapter left before something else"
        self.seen["evicted"] += len(evicted)
        return evicted

    def may_not_leave(self):
        return {key for key, count in self.pins.items() if count} | self.kept | self.writing

    def pick(self, items):
        return self.rng.choice(sorted(items)) if items else None

    def check(self):
        memory = self.memory
        memory.check()
        resident = set(memory.adapters.keys())
        assert self.may_not_leave() <= resident
        self.dropped &= resident
        assert self.dropped <= self.may_not_leave() - self.kept
        for page in memory.prefixes._pages.values():
            assert set(page.keys) <= resident, "a prefix outlived its adapter"
        for name, running in self.simulation.running.items():
            assert not memory.kv_cache.num_missing_pages(name, running.num_computed)


@pytest.mark.parametrize("policy", ["cost", "lru"])
@pytest.mark.parametrize("seed", range(3))
def test_random_use_breaks_no_promise_and_hands_out_no_wrong_page(policy, seed):
    use = RandomUse(seed, num_pages=40, policy=policy)
    operations = [use.start] * 4 + [use.compute] * 5 + [use.grow] * 4 + [use.end] * 3
    operations += [use.finish] * 3 + [use.protect, use.keep, use.drop, use.make_room]
    for _ in range(1500):
        use.clock += use.rng.random()
        use.rng.choice(operations)()
        use.check()
    assert use.simulation.num_hits > 30
    assert use.memory.prefixes.total_evicted_pages > 20
    for what in ("refused", "failed", "dropped later", "evicted", "protected left"):
        assert use.seen[what] > 0, what
    finish_all(use)


def finish_all(use):
    """Everything ends; nothing stays that was not asked for."""
    for name in list(use.mixes):
        use.simulation.end(name)
        for key in use.mixes.pop(name):
            use.memory.adapters.unpin(key)
            use.pins[key] -= 1
    for key in use.writing:
        use.memory.adapters.finish_load(key)
    for info in use.infos:
        use.memory.adapters.unkeep(info.key)
    use.memory.check()
    use.memory.make_room(40)
    use.memory.check()
    assert use.memory.pool.num_free == 40


def test_reserving_and_freeing_conserves_pages():
    rng = random.Random(0)
    memory = Memory.of_pages(64, SHAPE, GEOMETRY)
    lengths: dict[str, int] = {}
    refused = 0
    for _ in range(3000):
        name = f"s{rng.randrange(20)}"
        if rng.random() < 0.3:
            memory.kv_cache.free(name)
            lengths.pop(name, None)
        else:
            longer = lengths.get(name, 0) + rng.randrange(1, 40)
            try:
                memory.kv_cache.reserve(name, longer)
                lengths[name] = longer
            except OutOfPages:
                refused += 1
        memory.check()
        held = sum(GEOMETRY.pages_for_tokens(n) for n in lengths.values())
        assert memory.pool.num_owned("kv") == held
    assert refused > 100
