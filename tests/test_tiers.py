"""Adapters on their way from the store to host memory to pages, beside the requests for them."""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "long"))

from zipf_swarm import vary

from engine_factory import GREEDY, make_engine, make_request, prompt_of, run_tokens, save_swarm
from engine_factory import tokens_of as tokens_of_events
from loraswarm import LLM, InvalidRequest, UnknownAdapter
from loraswarm.core.admin import AdapterState, PinAdapter, UnloadAdapter, UnpinAdapter
from loraswarm.core.events import ReportedError, SequenceEvent
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine import loader_worker
from loraswarm.engine.backoff import FIRST_WAIT_S
from loraswarm.engine.engine import Engine
from loraswarm.errors import AdapterError, LoRASwarmError
from loraswarm.memory import image_file
from method_cases import METHOD_CASES
from model_factory import load_reference

NAMES = [f"a{i:03}" for i in range(8)]
SHORT = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
PATIENCE_S = 60.0


@dataclass
class Reads:
    """Reads of adapters from stores, by name. Those in `held` wait; those in `broken` fail."""

    counts: Counter[str] = field(default_factory=Counter)
    held: dict[str, threading.Event] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def hold(self, name: str) -> threading.Event:
        self.held[name] = threading.Event()
        return self.held[name]


@pytest.fixture
def reads(monkeypatch):
    """Every read of an adapter in this process."""
    reads = Reads()
    read = loader_worker.read_adapter

    def watched(info, base, dtype):
        reads.counts[info.name] += 1
        if info.name in reads.held:
            assert reads.held[info.name].wait(PATIENCE_S)
        if info.name in reads.broken:
            raise AdapterError(f"tensor of {info.name} is spoiled")
        return read(info, base, dtype)

    monkeypatch.setattr(loader_worker, "read_adapter", watched)
    yield reads
    for event in reads.held.values():
        event.set()


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiers")
    save_swarm(path, len(NAMES), ranks=[8])
    return path


@dataclass(frozen=True)
class Sizes:
    """What one of the swarm's adapters takes, and a page."""

    image_bytes: int
    num_pages: int
    page_bytes: int

    def pool(self, num_adapters: int, num_kv_pages: int = 8) -> int:
        return (num_adapters * self.num_pages + num_kv_pages) * self.page_bytes


@pytest.fixture(scope="module")
def expected(swarm):
    """Undisturbed answers to `ask(name)`, by name; None is the base."""
    engine = make_engine(swarm)
    answers = {name: run_tokens(engine, [ask(name)])["x"] for name in (*NAMES, None)}
    assert len({tuple(answer) for answer in answers.values()}) == len(answers)
    engine.close()
    return answers


@pytest.fixture(scope="module")
def sizes(swarm):
    engine = make_engine(swarm)
    run_tokens(engine, [ask("a000")])
    stats = engine.stats()
    engine.close()
    return Sizes(stats.num_host_bytes, stats.num_adapter_pages, engine.info.page_bytes)


def ask(
    name: str | None, request_id: str = "x", params: SamplingParams = GREEDY, length: int = 40
) -> Request:
    return make_request(request_id, name, prompt_of(3, length), params)


def ask_sum(request_id: str, *names: str) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt_of(3, 40),
        params=GREEDY,
        adapters=tuple((name, 0.5) for name in names),
    )


def until(engine: Engine, condition) -> list[SequenceEvent]:
    """Step until the condition holds; what happened. Never waits for ever."""
    events = []
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "nothing happens any more"
        events += engine.step(may_wait=False)
        engine.check()
        time.sleep(0.0005)
    return events


def finish(engine: Engine) -> dict[str, list[SequenceEvent]]:
    """Step until every request has ended; events by request."""
    found: dict[str, list[SequenceEvent]] = {}
    for event in until(engine, lambda: not engine.has_work):
        found.setdefault(event.request_id, []).append(event)
    return found


def answer(engine: Engine, request: Request) -> list[int]:
    """Its tokens, beside whatever else is open."""
    engine.add(request)
    return tokens_of_events(finish(engine)[request.request_id])


def carry_out(engine: Engine, *commands) -> list:
    """Begin the commands at once; their results in their order."""
    answers = {}
    for number, command in enumerate(commands):
        engine.begin_command(number, command)

    def are_answered() -> bool:
        answers.update({one.command_id: one.result for one in engine.take_answers()})
        return len(answers) == len(commands)

    until(engine, are_answered)
    return [answers[number] for number in range(len(commands))]


def state(engine: Engine, name: str) -> AdapterState:
    (row,) = [row for row in engine.adapter_states() if row.name == name]
    return row


def names_in_pages(engine: Engine) -> set[str]:
    return {name for name, _ in engine._memory.adapters.keys()}  # noqa: SIM118


def leave_pages(engine: Engine, name: str) -> None:
    assert engine._memory.drop_adapter(engine._catalog.resolve(name).key)


def leave_host(engine: Engine, name: str) -> None:
    assert engine._parts.host.drop(engine._catalog.resolve(name).key)


def test_a_request_whose_adapter_is_being_loaded_holds_up_nobody(swarm, reads, expected):
    engine = make_engine(swarm)
    answer(engine, ask("a001"))
    gate = reads.hold("a000")
    engine.add(ask("a000", "cold"))
    engine.add(ask("a001", "warm"))
    engine.add(ask(None, "base"))
    events = until(
        engine, lambda: engine.stats().num_waiting == 1 and not engine.stats().num_running
    )
    assert {event.request_id for event in events} == {"warm", "base"}
    for name, adapter in (("warm", "a001"), ("base", None)):
        own = [event for event in events if event.request_id == name]
        assert own[-1].finish_reason == "length"
        assert tokens_of_events(own) == expected[adapter]
    row = state(engine, "a000")
    assert (row.is_loading, row.tier, row.num_waiting, row.num_misses) == (True, "store", 1, 1)
    assert engine.stats().num_loading == 1
    assert engine.stats().waiting_adapters == ("a000",)
    gate.set()
    assert tokens_of_events(finish(engine)["cold"]) == expected["a000"]
    row = state(engine, "a000")
    assert (row.is_loading, row.tier, row.num_waiting) == (False, "device", 0)
    assert row.host_bytes > 0
    assert row.device_bytes > 0


def test_concurrent_requests_for_one_adapter_load_it_once(swarm, reads, expected):
    engine = make_engine(swarm)
    gate = reads.hold("a000")
    for number in range(5):
        engine.add(ask("a000", f"r{number}"))
        engine.step(may_wait=False)
    assert engine.stats().num_loading == 1
    gate.set()
    found = finish(engine)
    assert [tokens_of_events(found[f"r{i}"]) for i in range(5)] == 5 * [expected["a000"]]
    assert reads.counts == {"a000": 1}
    stats = engine.stats()
    assert (stats.total_misses, stats.total_host_hits, stats.total_device_hits) == (5, 0, 0)
    counts = {stage: total.count for stage, total in stats.loads.items() if total.count}
    assert counts == {"read": 1, "pack": 1, "copy": 1}


def test_a_load_begins_when_its_request_comes_though_no_seat_is_free(swarm, reads, expected):
    engine = make_engine(swarm, max_num_sequences=1)
    engine.add(ask(None, "long", LONG))
    engine.step(may_wait=False)
    engine.add(ask("a000"))
    until(engine, lambda: state(engine, "a000").tier == "host")
    assert engine.stats().running_adapters == ()
    assert engine.stats().num_running == 1
    assert state(engine, "a000").num_waiting == 1
    assert reads.counts == {"a000": 1}
    assert tokens_of_events(finish(engine)["x"]) == expected["a000"]
    assert reads.counts == {"a000": 1}


def test_a_failed_load_ends_its_own_requests_and_is_tried_again_later(swarm, reads, expected):
    engine = make_engine(swarm)
    now_s = 1000.0
    engine._residency._backoff._clock = lambda: now_s
    reads.broken.add("a000")
    requests = [ask("a000", "one"), ask("a001", "other"), ask("a000", "two"), ask(None, "base")]
    for request in requests:
        engine.add(request)
    found = finish(engine)
    for name in ("one", "two"):
        (event,) = found[name]
        assert (event.finish_reason, event.error.http_status) == ("error", 422)
        assert "tensor of a000 is spoiled" in event.error.message
    assert tokens_of_events(found["other"]) == expected["a001"]
    assert tokens_of_events(found["base"]) == expected[None]
    assert "spoiled" in state(engine, "a000").last_error
    for num_failures, wait_s in ((1, FIRST_WAIT_S), (2, 2 * FIRST_WAIT_S)):
        assert engine.stats().total_load_failures == reads.counts["a000"] == num_failures
        now_s += wait_s - 0.01
        with pytest.raises(ReportedError, match=r"spoiled.*tried again in 0\.0 s"):
            engine.add(ask("a000"))
        now_s += 0.02
        if num_failures == 1:
            assert answer(engine, ask("a000")) == []
    assert not engine.has_work
    reads.broken.clear()
    assert answer(engine, ask("a000")) == expected["a000"]
    assert state(engine, "a000").last_error is None
    assert reads.counts["a000"] == 3


def test_a_request_aborted_while_its_adapter_is_loaded_leaves_nothing(swarm, reads):
    engine = make_engine(swarm)
    gate = reads.hold("a000")
    engine.add(ask("a000"))
    engine.step(may_wait=False)
    assert engine.abort("x").finish_reason == "abort"
    assert engine.abort("x") is None
    assert not engine.has_work
    assert engine.stats().num_waiting == 0
    assert engine.stats().num_loading == 1
    gate.set()
    until(engine, lambda: engine.stats().num_loading == 0)
    assert state(engine, "a000").tier == "host"
    assert engine.stats().num_adapter_pages == 0
    (unloaded,) = carry_out(engine, UnloadAdapter("a000"))
    assert (unloaded.state, unloaded.tier) == ("unloaded", "store")
    assert engine.stats().num_host_bytes == 0


@pytest.mark.parametrize("is_queued", [True, False])
def test_adapters_of_queued_requests_leave_after_others(swarm, sizes, expected, is_queued):
    engine = make_engine(
        swarm, pool_bytes=sizes.pool(5, 2), max_num_sequences=1, eviction="lru", max_model_len=64
    )
    for name in ("a005", *NAMES[:5]):
        answer(engine, ask(name))
    engine.add(ask(None, "first"))
    engine.step(may_wait=False)
    assert names_in_pages(engine) == set(NAMES[:5])
    if is_queued:
        engine.add(ask("a000"))
    engine.begin_command(0, PinAdapter("a005"))
    assert names_in_pages(engine) - set(NAMES[2:5]) == {"a005", "a000" if is_queued else "a001"}
    found = finish(engine)
    if is_queued:
        assert tokens_of_events(found["x"]) == expected["a000"]
        assert state(engine, "a000").num_device_hits == 1


def test_an_adapter_larger_than_the_hosts_whole_budget_is_served(swarm, sizes, reads, expected):
    engine = make_engine(swarm, host_cache_bytes=sizes.image_bytes - 1)
    for name in ("a000", "a001", "a000"):
        assert answer(engine, ask(name)) == expected[name]
    assert engine.stats().num_host_bytes == 0
    assert reads.counts == {"a000": 1, "a001": 1}
    requests = [ask(name, name) for name in NAMES]
    assert run_tokens(engine, requests) == {name: expected[name] for name in NAMES}


def test_what_left_the_pages_comes_from_the_host_and_what_left_that_from_the_store(
    swarm, sizes, reads, expected
):
    engine = make_engine(
        swarm, pool_bytes=sizes.pool(2, 4), host_cache_bytes=4 * sizes.image_bytes, eviction="lru"
    )
    for name in ("a000", "a001", "a002", "a003"):
        assert answer(engine, ask(name)) == expected[name]
    row = state(engine, "a000")
    assert (row.tier, row.device_bytes, row.host_bytes) == ("host", 0, sizes.image_bytes)
    assert engine.stats().total_device_evictions > 0
    assert engine.stats().total_host_evictions == 0
    assert answer(engine, ask("a000")) == expected["a000"]
    assert reads.counts["a000"] == 1
    assert state(engine, "a000").num_host_hits == 1
    assert answer(engine, ask("a000")) == expected["a000"]
    assert state(engine, "a000").num_device_hits == 1
    for name in ("a004", "a005", "a006", "a007"):
        assert answer(engine, ask(name)) == expected[name]
    row = state(engine, "a000")
    assert (row.tier, row.device_bytes, row.host_bytes) == ("store", 0, 0)
    assert engine.stats().total_host_evictions == 4
    assert answer(engine, ask("a000")) == expected["a000"]
    row = state(engine, "a000")
    assert (row.num_requests, row.num_device_hits, row.num_host_hits) == (4, 1, 1)
    assert (row.num_misses, reads.counts["a000"]) == (2, 2)
    stats = engine.stats()
    assert (stats.total_misses, stats.total_host_hits, stats.total_device_hits) == (9, 1, 1)
    assert stats.loads["read"].count == 9
    assert stats.loads["copy"].count == 10


def test_a_preempted_request_whose_adapter_is_gone_everywhere_comes_back_right(
    swarm, reads, expected
):
    engine = make_engine(swarm)
    engine.add(ask("a000"))
    events = until(engine, lambda: engine._scheduler._running and reads.counts["a000"])
    events += until(engine, lambda: len(engine._scheduler._running[0].token_ids) == 45)
    leave_host(engine, "a000")
    (sequence,) = engine._scheduler._running
    engine._scheduler._preempt(sequence)
    leave_pages(engine, "a000")
    assert state(engine, "a000").tier == "store"
    events += finish(engine)["x"]
    assert tokens_of_events(events) == expected["a000"]
    assert reads.counts["a000"] == 2
    assert engine.stats().total_preemptions == 1


def test_adapters_that_share_matrices_are_right_through_evictions_from_both_tiers(tmp_path, reads):
    import torch

    save_swarm(tmp_path, 0)
    model = load_reference(tmp_path / "model", torch.float32)
    METHOD_CASES["vera"](model, tmp_path / "template")
    names = [f"v{i}" for i in range(5)]
    for seed, name in enumerate(names):
        vary(tmp_path / "template", tmp_path / "adapters" / name, seed)
    roomy = make_engine(tmp_path)
    expected = {name: answer(roomy, ask(name)) for name in names}
    assert len({tuple(tokens) for tokens in expected.values()}) > 3
    infos = [roomy._catalog.resolve(name).info for name in names]
    num_pages = roomy._memory.adapters.num_pages(infos[0])
    host_bytes = roomy.stats().num_host_bytes - roomy._parts.host.get(infos[0].key).num_bytes
    small = make_engine(
        tmp_path, pool_bytes=(num_pages + 6) * roomy.info.page_bytes, host_cache_bytes=host_bytes
    )
    for turn in range(3):
        for name in names:
            request = ask(name)
            assert answer(small, request) == expected[name], turn
    leave_everything = [leave_pages, leave_host]
    for leave in leave_everything:
        for name in names:
            leave(small, name)
    assert small.stats().num_host_bytes == small.stats().num_adapter_pages == 0
    assert run_tokens(small, [ask(name, name) for name in names]) == expected
    assert small.stats().total_host_evictions > 0
    assert reads.counts["v0"] > 1


def test_the_next_start_reads_no_store_and_replaces_what_is_corrupt(
    swarm, tmp_path, reads, expected, caplog
):
    def serve() -> Counter[str]:
        reads.counts.clear()
        engine = make_engine(swarm, host_cache_dir=str(tmp_path))
        for name in ("a000", "a001"):
            assert answer(engine, ask(name)) == expected[name]
        engine.close()
        return reads.counts

    assert serve() == {"a000": 1, "a001": 1}
    assert serve() == {}
    assert "image file" not in caplog.text
    file = sorted(tmp_path.glob("*.image"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert serve().total() == 1
    assert "image file not used, removed" in caplog.text
    assert file.name in caplog.text
    assert serve() == {}


def test_a_full_disk_is_reported_and_the_request_served(
    swarm, tmp_path, reads, expected, caplog, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_file, "write_image", full)
    engine = make_engine(swarm, host_cache_dir=str(tmp_path))
    assert answer(engine, ask("a000")) == expected["a000"]
    assert "image of adapter 'a000' not kept in a file: No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert engine.stats().total_load_failures == 0


def test_a_sum_of_adapters_larger_than_the_host_together_is_served(swarm, sizes, reads):
    expected = run_tokens(make_engine(swarm), [ask_sum("x", "a000", "a001")])
    engine = make_engine(swarm, host_cache_bytes=sizes.image_bytes)
    engine.add(ask_sum("x", "a000", "a001"))
    assert tokens_of_events(finish(engine)["x"]) == expected["x"]


def test_sums_that_each_hold_a_part_of_a_full_host_do_not_wait_for_each_other(swarm, sizes):
    requests = [ask_sum("x", "a000", "a002"), ask_sum("y", "a001", "a003")]
    expected = run_tokens(make_engine(swarm), requests)
    engine = make_engine(swarm, host_cache_bytes=2 * sizes.image_bytes)
    for name in ("a000", "a001"):
        answer(engine, ask(name))
        leave_pages(engine, name)
    engine.add(ask(None, "beside", LONG))
    for request in requests:
        engine.add(request)
    found = finish(engine)
    assert {name: tokens_of_events(found[name]) for name in expected} == expected


@pytest.mark.parametrize("num_images", [0, 1])
def test_a_preempted_sum_larger_than_the_host_together_comes_back(swarm, sizes, num_images):
    older = [make_request(f"b{i}", None, prompt_of(i, 40), LONG) for i in range(3)]
    younger = Request(
        request_id="sum",
        prompt_token_ids=prompt_of(3, 40),
        params=LONG,
        adapters=(("a000", 0.5), ("a001", 0.5)),
    )
    expected = run_tokens(make_engine(swarm, pool_bytes=64 << 20), [*older, younger])
    engine = make_engine(
        swarm,
        pool_bytes=sizes.pool(2, num_kv_pages=9),
        host_cache_bytes=num_images * sizes.image_bytes + 1,
    )
    answer(engine, ask_sum("first", "a000", "a001"))
    for request in (*older, younger):
        engine.add(request)
    found = finish(engine)
    assert engine.stats().total_preemptions > 0
    assert {name: tokens_of_events(events) for name, events in found.items()} == expected


def test_a_part_of_a_sum_that_leaves_while_another_is_loaded_is_brought_back(swarm, reads):
    expected = run_tokens(make_engine(swarm), [ask_sum("x", "a000", "a001")])
    engine = make_engine(swarm)
    answer(engine, ask("a000", "warm"))
    leave_host(engine, "a000")
    gate = reads.hold("a001")
    engine.add(ask_sum("x", "a000", "a001"))
    engine.step(may_wait=False)
    leave_pages(engine, "a000")
    gate.set()
    assert tokens_of_events(finish(engine)["x"]) == expected["x"]


def test_a_start_that_evicts_what_a_later_one_needs_holds_up_that_one_only(swarm, sizes, expected):
    engine = make_engine(
        swarm, host_cache_bytes=sizes.image_bytes, pool_bytes=sizes.pool(2, 2), max_model_len=64
    )
    for name in ("a001", "a002", "a000"):
        answer(engine, ask(name))
    order = ("a001", "a002", "a000", "a003", "a000", "a001", "a002")
    for number, name in enumerate(order):
        engine.add(ask(name, f"r{number}"))
    found = finish(engine)
    assert [tokens_of_events(found[f"r{i}"]) for i in range(7)] == [expected[n] for n in order]


def test_an_adapter_evicted_for_a_pin_and_brought_back_before_the_next_step_is_right(
    swarm, sizes, expected, monkeypatch
):
    engine = make_engine(swarm, pool_bytes=sizes.pool(4, 3), max_model_len=64, eviction="lru")
    monkeypatch.setattr(engine._administration, "_check_room", lambda _: None)
    for name in NAMES[:5]:
        answer(engine, ask(name))
    assert names_in_pages(engine) == set(NAMES[1:5])
    engine.begin_command(0, PinAdapter("a000"))
    assert "a001" not in names_in_pages(engine)
    engine.begin_command(1, PinAdapter("a001"))
    end_s = time.monotonic() + PATIENCE_S
    while len(engine._parts.copier._done) < 2:
        assert time.monotonic() < end_s, "the second adapter was not pinned"
        time.sleep(0.001)
    assert answer(engine, ask("a001")) == expected["a001"]


def test_an_adapter_pinned_twice_at_once_is_free_after_one_unpin(swarm):
    engine = make_engine(swarm)
    results = carry_out(engine, PinAdapter("a000"), PinAdapter("a000"))
    assert [row.is_pinned for row in results] == [True, True]
    assert engine.stats().num_pinned_adapters == 1
    carry_out(engine, UnpinAdapter("a000"))
    assert engine.stats().num_pinned_adapters == 0


def test_an_adapter_unloaded_while_it_is_being_pinned_leaves_nothing(swarm):
    engine = make_engine(swarm)
    _, unloaded = carry_out(engine, PinAdapter("a000"), UnloadAdapter("a000"))
    assert isinstance(unloaded, AdapterState)
    until(engine, lambda: engine.stats().num_loading == 0)
    engine.step(may_wait=False)
    stats = engine.stats()
    assert stats.num_pinned_adapters == stats.num_adapter_pages == stats.num_host_bytes == 0


@pytest.fixture
def home(tmp_path):
    """A swarm of three with a tokenizer."""
    save_swarm(tmp_path, 3, ranks=[8], has_tokenizer=True)
    return tmp_path


@pytest.fixture
def llm(home):
    with LLM(
        str(home / "model"),
        adapters=str(home / "adapters"),
        pool_bytes=8 << 20,
        num_threads=2,
        host_cache_bytes=64 << 20,
    ) as llm:
        yield llm


def status_of(error: pytest.ExceptionInfo[LoRASwarmError]) -> int:
    return error.value.http_status


def test_llm_loads_and_unloads_adapters_beside_open_streams(llm, home):
    prompt = [5, 6, 7, 8]
    (before,) = llm.generate(prompt, SHORT, adapter="a001")
    stream = llm.stream(prompt, SHORT, adapter="a001")
    pieces = [next(stream)]
    row = llm.load_adapter("twin", str(home / "adapters" / "a001"))
    assert (row.name, row.state, row.generation, row.tier) == ("twin", "served", 1, "host")
    assert llm.generate(prompt, SHORT, adapter="twin")[0].token_ids == before.token_ids
    with pytest.raises(LoRASwarmError, match="'twin' has already been loaded") as error:
        llm.load_adapter("twin", str(home / "adapters" / "a002"))
    assert status_of(error) == InvalidRequest.http_status
    row = llm.load_adapter("twin", str(home / "adapters" / "a002"), in_place=True)
    assert row.generation == 2
    (other,) = llm.generate(prompt, SHORT, adapter="a002")
    assert llm.generate(prompt, SHORT, adapter="twin")[0].token_ids == other.token_ids
    assert other.token_ids != before.token_ids
    assert llm.unload_adapter("twin").name == "twin"
    with pytest.raises(UnknownAdapter, match="'twin'"):
        llm.generate(prompt, SHORT, adapter="twin")
    pieces += stream
    assert tuple(t for piece in pieces for t in piece.token_ids) == before.token_ids


def test_llm_pins_unpins_and_prefetches(llm):
    row = llm.prefetch_adapter("a000")
    assert (row.tier, row.is_pinned, row.num_requests) == ("device", False, 0)
    assert llm.pin_adapter("a001").is_pinned
    assert [row.is_pinned for row in llm.adapters()] == [False, True, False]
    assert [row.tier for row in llm.adapters()] == ["device", "device", "store"]
    assert not llm.unpin_adapter("a001").is_pinned
    assert not llm.unpin_adapter("a001").is_pinned
    llm.pin_adapter("a001")
    llm.unload_adapter("a001")
    rows = {row.name: row for row in llm.adapters()}
    assert (rows["a001"].state, rows["a001"].tier) == ("unloaded", "store")
    assert llm._engine.stats().num_pinned_adapters == 0


def test_llm_finds_new_and_removed_adapters_when_asked(llm, home):
    report = llm.rescan_adapters()
    assert (report.added, report.changed, report.removed) == ((), (), ())
    (home / "adapters" / "a000").rename(home / "adapters" / "b000")
    report = llm.rescan_adapters()
    assert (report.added, report.removed) == (("b000",), ("a000",))
    with pytest.raises(UnknownAdapter):
        llm.generate([5], SHORT, adapter="a000")
    assert llm.generate([5], SHORT, adapter="b000")[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("ask_for", "status", "message"),
    [
        (lambda llm, _: llm.unload_adapter("nobody"), 404, "'nobody'"),
        (lambda llm, _: llm.pin_adapter("nobody"), 404, "'nobody'"),
        (lambda llm, _: llm.unpin_adapter("nobody"), 404, "'nobody'"),
        (lambda llm, _: llm.prefetch_adapter("nobody"), 404, "'nobody'"),
        (lambda llm, home: llm.load_adapter("x", str(home / "adapters" / "none")), 404, "none"),
        (lambda llm, home: llm.load_adapter("x", str(home / "model")), 403, "model"),
        (lambda llm, _: llm.load_adapter("x", "s3://bucket/adapter"), 403, "s3://bucket"),
        (lambda llm, home: llm.load_adapter("", str(home / "adapters" / "a000")), 400, "lora_name"),
    ],
)
def test_llm_refuses_what_cannot_be_done_and_goes_on(llm, home, ask_for, status, message):
    with pytest.raises(LoRASwarmError, match=message) as error:
        ask_for(llm, home)
    assert status_of(error) == status
    assert llm.generate([5], SHORT, adapter="a000")[0].finish_reason == "length"


def test_a_closed_llm_waits_for_nothing(llm):
    llm.generate([5, 6], SHORT, adapter="a000")
    llm.close()
    llm.close()
    assert [row.name for row in llm.adapters()] == ["a000", "a001", "a002"]
    for use in (
        lambda: llm.generate([5, 6], SHORT, adapter="a001"),
        lambda: llm.rescan_adapters(),
        lambda: llm.load_adapter("x", "somewhere"),
        lambda: llm.prefetch_adapter("a002"),
    ):
        with pytest.raises(LoRASwarmError, match="closed"):
            use()
