"""Reports of what an engine holds: entered one after the other they are what its caches hold."""

from __future__ import annotations

from random import Random

import pytest

from engine_factory import make_engine, make_request, prompt_of, run_tokens, save_swarm
from loraswarm.cluster.prefixes import PrefixIndex
from loraswarm.cluster.residency import ResidencyBook
from loraswarm.core.admin import LoadAdapter, UnloadAdapter
from loraswarm.core.request import SamplingParams
from loraswarm.core.residency_report import join_pages, page_ids
from loraswarm.engine.engine import Engine
from loraswarm.engine.reports import LEAST_GAP_S
from routing_cases import view_of

NUM_ADAPTERS = 8
SHORT = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("reports")
    save_swarm(path, NUM_ADAPTERS, ranks=[8])
    return path


@pytest.fixture(scope="module")
def sizes(swarm):
    """Bytes of a page, pages and image bytes of one adapter."""
    engine = make_engine(swarm)
    run_tokens(engine, [make_request("x", "a000", prompt_of(0, 5), SHORT)])
    stats = engine.stats()
    engine.close()
    return engine.info.page_bytes, stats.num_adapter_pages, stats.num_host_bytes


@pytest.fixture
def engine(swarm, sizes):
    """Room for three adapters and a few prefixes in pages, for five in the host."""
    page_bytes, num_pages, image_bytes = sizes
    engine = make_engine(
        swarm,
        pool_bytes=(3 * num_pages + 14) * page_bytes,
        host_cache_bytes=5 * image_bytes,
        prefix_caching=True,
    )
    engine.reports._clock = Clock()
    yield engine
    engine.close()


class Clock:
    """Seconds that pass only between reports."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Watcher:
    """Enters what an engine reports, as the front does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.view = view_of(1, {})
        self.prefixes = PrefixIndex(engine.info.page_tokens)
        self.book = ResidencyBook(self.view, self.prefixes)
        self.num_reports = 0

    def turn(self) -> None:
        """What is done at a turn of the engine's loop, and then has been told."""
        self.engine.take_catalog_changes()
        report = self.engine.reports.take(is_idle=True)
        if report is not None:
            self.num_reports += 1
            assert self.book.apply("r0", report) == "applied"

    def check(self) -> None:
        """What is known here is what the caches hold."""
        engine = self.engine
        truth = {}
        for summary in engine.adapters():
            tier = engine._residency.tier_of((summary.name, summary.digest))
            if tier != "store":
                truth[summary.name] = tier
        assert self.view.replicas["r0"].tiers == truth
        pages = page_ids(join_pages(engine._memory.prefixes.digests()))
        assert self.prefixes.pages_of("r0") == set(pages)


def serve(engine: Engine, *names: str | None, watcher: Watcher | None = None) -> None:
    """Requests with long common prefixes, one for each name, to their ends."""
    for index, name in enumerate(names):
        engine.add(make_request(f"x{index}", name, prompt_of(index % 2, 40), SHORT))
    while engine.has_work:
        engine.step()
        if watcher is not None:
            watcher.turn()


@pytest.mark.parametrize("seed", [0, 1])
def test_reports_of_random_traffic_add_up_to_what_the_caches_hold(engine, swarm, seed):
    rng = Random(seed)
    names = [f"a{index:03}" for index in range(NUM_ADAPTERS)]
    serve(engine, "a000", None)
    watcher = Watcher(engine)
    engine.reports.watch()
    tiers_seen = set()
    for turn in range(30):
        served = [each.name for each in engine.adapters() if each.refusal is None]
        name = rng.choice([*served, None])
        engine.add(make_request(f"x{turn}", name, prompt_of(turn % 3, 40), SHORT))
        if turn % 7 == 3:
            command = UnloadAdapter(names[turn % NUM_ADAPTERS])
            engine.begin_command(turn, command)
        if turn % 7 == 5:
            name = names[(turn - 2) % NUM_ADAPTERS]
            engine.begin_command(turn, LoadAdapter(name, str(swarm / "adapters" / "a001"), True))
        for _ in range(rng.randrange(12)):
            engine.step(may_wait=False)
            engine.take_answers()
            watcher.turn()
            watcher.check()
            tiers_seen |= set(watcher.view.replicas["r0"].tiers.values())
    while engine.has_work:
        engine.step()
        watcher.turn()
        watcher.check()
    stats = engine.stats()
    assert min(stats.total_device_evictions, stats.total_host_evictions) > 0
    assert stats.total_prefix_evictions > 0
    assert tiers_seen == {"device", "host"}
    assert watcher.num_reports > 15


def test_nothing_is_noted_or_told_until_somebody_watches(engine):
    serve(engine, "a000", "a001", None)
    assert engine.reports.take(is_idle=True) is None
    assert engine._memory.adapters.touched is None
    assert engine._parts.host.touched is None
    assert engine._memory.prefixes.touched is None
    engine.take_catalog_changes()
    assert engine.reports._names == set()
    engine.reports.watch()
    report = engine.reports.take(is_idle=True)
    assert report is not None
    assert (report.number, report.is_full) == (0, True)
    assert report.tiers == {"a000": "device", "a001": "device"}
    assert report.added_pages != b""
    assert engine.reports.take(is_idle=True) is None, "nothing has changed"


def test_an_adapter_is_told_at_each_tier_though_its_name_stays_what_it_was(engine):
    watcher = Watcher(engine)
    engine.reports.watch()
    engine.add(make_request("x", "a000", prompt_of(0, 40), SHORT))
    seen = []
    while engine.has_work:
        engine.step()
        engine._catalog.take_changes()  # so that names are not looked at for the catalog's sake
        watcher.turn()
        watcher.check()
        seen.append(watcher.view.replicas["r0"].tiers.get("a000"))
    assert list(dict.fromkeys(seen))[-2:] == ["host", "device"]


def test_a_lost_report_is_noticed_and_made_good(engine):
    watcher = Watcher(engine)
    engine.reports.watch()
    serve(engine, "a000", watcher=watcher)
    serve(engine, "a001")
    assert engine.reports.take(is_idle=True) is not None  # lost
    serve(engine, "a002")
    report = engine.reports.take(is_idle=True)
    assert watcher.book.apply("r0", report) == "ask"
    engine.reports.watch()
    watcher.turn()
    watcher.check()


def test_a_busy_engine_reports_now_and_then_and_loses_nothing(engine):
    clock = engine.reports._clock
    watcher = Watcher(engine)
    engine.reports.watch()
    serve(engine, "a000", watcher=watcher)
    clock.now_s += 2 * LEAST_GAP_S
    serve(engine, "a001")
    assert engine.reports.take(is_idle=False) is not None
    serve(engine, "a002")
    assert engine.reports.take(is_idle=False) is None
    clock.now_s += 2 * LEAST_GAP_S
    report = engine.reports.take(is_idle=False)
    assert report is not None
    assert report.tiers["a002"] == "device"


def test_another_content_of_a_name_is_not_told_as_the_old_one(engine, swarm):
    watcher = Watcher(engine)
    engine.reports.watch()
    serve(engine, "a000", watcher=watcher)
    assert watcher.view.replicas["r0"].tiers == {"a000": "device"}
    engine.begin_command(1, LoadAdapter("a000", str(swarm / "adapters" / "a001"), True))
    while not engine.take_answers():
        engine.step()
    assert engine._memory.adapters.num_resident <= 1
    watcher.turn()
    watcher.check()
    assert watcher.view.replicas["r0"].tiers == {"a000": "host"}
    engine.begin_command(2, UnloadAdapter("a000"))
    while not engine.take_answers():
        engine.step()
    watcher.turn()
    assert watcher.view.replicas["r0"].tiers == {}


def test_a_name_that_is_served_no_more_is_told_while_its_last_request_runs(engine):
    watcher = Watcher(engine)
    engine.reports.watch()
    engine.add(make_request("x", "a000", prompt_of(0, 40)))
    while watcher.view.replicas["r0"].tiers != {"a000": "device"}:
        engine.step()
        watcher.turn()
    engine.begin_command(1, UnloadAdapter("a000"))
    engine.step()
    watcher.turn()
    assert engine.has_work
    assert watcher.view.replicas["r0"].tiers == {}
    watcher.check()
