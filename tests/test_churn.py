"""Generations under load: a few rounds of tests/long/churn.py, and files that are being written.

Whatever happens to the files of a name, an answer is that of one content; what is half written is
not served. Settling takes its real time here.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "long"))

from churn import KINDS, churn_of
from churn import Home as ChurnHome

from adapter_factory import CONFIG_FILE, WEIGHTS_FILE
from engine_factory import make_engine, make_request, prompt_of, run_alone, save_swarm, tokens_of
from loraswarm.adapters import catalog, scanner
from loraswarm.core.admin import LoadAdapter, RescanAdapters, UnloadAdapter
from loraswarm.core.events import ErrorInfo
from loraswarm.core.request import SamplingParams
from loraswarm.engine import loader_worker
from loraswarm.errors import LoRASwarmError

NUM_ROUNDS = 15
SETTLE_S = 0.5
SLOW_S = 0.08
PROMPT = prompt_of(2, 19)
ANSWER = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
REFUSALS = (404, 422, 503)


@pytest.fixture(scope="module")
def churn_home(tmp_path_factory):
    return ChurnHome(tmp_path_factory.mktemp("churn"))


@pytest.mark.parametrize(
    ("kind", "loader"),
    [*((kind, "thread") for kind in KINDS), ("change", "process"), ("reload", "process")],
)
def test_answers_are_of_one_generation_and_nothing_is_left(churn_home, kind, loader):
    churn = churn_of(churn_home, kind, loader == "process")
    try:
        churn.run(kind, NUM_ROUNDS)
        changing = {content for name, content in churn.answered if name not in (None, "calm")}
        assert len(changing) > 1, "no change was ever seen"
        assert churn.answered.total() > NUM_ROUNDS
    finally:
        churn.engine.close()


class Home:
    """Two contents, one of which is served as "x" from `store`, with their answers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        save_swarm(path, 2, ranks=(8,))
        self.old, self.new = path / "adapters" / "a000", path / "adapters" / "a001"
        config = json.loads((self.new / CONFIG_FILE).read_text())
        (self.new / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 24}))
        engine = make_engine(path)
        requests = [make_request(name, name, PROMPT, ANSWER) for name in ("a000", "a001")]
        self.answers = {name: tuple(v) for name, v in run_alone(engine, requests).items()}
        engine.close()
        assert len(set(self.answers.values())) == 2

    def store(self, path: Path) -> Path:
        store = path / "store"
        store.mkdir()
        shutil.copytree(self.old, store / "calm")
        return store

    def engine(self, store: Path, **options):
        return make_engine(self.path, adapters=(str(store),), **options)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("swarm"))


@pytest.fixture
def real_time(monkeypatch):
    monkeypatch.setattr(scanner, "SETTLE_S", SETTLE_S)


def copy_slowly(source: Path, to: Path, is_in_place: bool = False) -> None:
    """In pieces; `is_in_place` writes over what is there, or into a file of the full size."""
    content = source.read_bytes()
    if is_in_place and not to.exists():
        to.write_bytes(bytes(len(content)))
    with open(to, "r+b" if is_in_place else "wb", buffering=0) as file:
        size = len(content) // 5 + 1
        for begin in range(0, len(content), size):
            time.sleep(SLOW_S)
            file.write(content[begin : begin + size])
        os.fsync(file.fileno())


def config_first(source: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    copy_slowly(source / CONFIG_FILE, to / CONFIG_FILE)
    copy_slowly(source / WEIGHTS_FILE, to / WEIGHTS_FILE)


def weights_first(source: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    copy_slowly(source / WEIGHTS_FILE, to / WEIGHTS_FILE)
    copy_slowly(source / CONFIG_FILE, to / CONFIG_FILE)


def in_place(source: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        copy_slowly(source / name, to / name, is_in_place=True)


def one_after_the_other(source: Path, to: Path) -> None:
    """Each file from one moment to the next, but not both."""
    to.mkdir(exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(source / name, to / ".young")
        os.replace(to / ".young", to / name)
        time.sleep(3 * SLOW_S)


WAYS = {
    "config first": config_first,
    "weights first": weights_first,
    "in place": in_place,
    "one after the other": one_after_the_other,
}


def ask(engine, name="x") -> tuple[int, ...] | ErrorInfo:
    """One request alone, to its end."""
    try:
        engine.add(make_request("r", name, PROMPT, ANSWER))
    except LoRASwarmError as error:
        return ErrorInfo.of(error)
    events = []
    while engine.has_work:
        events += engine.step()
    return events[-1].error or tuple(tokens_of(events))


def command(engine, what):
    engine.begin_command(7, what)
    while not (answers := engine.take_answers()):
        engine.step(may_wait=False)
        engine.wait(0.01)
    return answers[0].result


def watch_while(engine, work, arguments) -> list[tuple[int, ...] | ErrorInfo]:
    """What requests for "x" get while `work` is done and until a scan finds nothing pending."""
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    found = []
    try:
        is_last = False
        while not is_last:
            is_last = not thread.is_alive()
            report = command(engine, RescanAdapters())
            is_last = is_last and not report.pending
            found.append(ask(engine))
            time.sleep(0.02)
    finally:
        thread.join()
    found.append(ask(engine))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_directory_that_is_being_written_is_served_when_it_is_whole(
    home, tmp_path, real_time, way
):
    store = home.store(tmp_path)
    time.sleep(SETTLE_S)
    engine = home.engine(store)
    *before, last = watch_while(engine, WAYS[way], (home.new, store / "x"))
    assert last == home.answers["a001"]
    refused = [one for one in before if isinstance(one, ErrorInfo)]
    assert refused, "it was written at once"
    assert {error.http_status for error in refused} <= set(REFUSALS)
    assert {one for one in before if not isinstance(one, ErrorInfo)} <= {last}
    assert ask(engine, "calm") == home.answers["a000"]
    engine.close()


@pytest.mark.parametrize("is_cold", [False, True], ids=["resident", "cold"])
@pytest.mark.parametrize("way", ["in place", "one after the other"])
def test_files_that_are_replaced_while_they_are_served_are_never_served_half(
    home, tmp_path, real_time, way, is_cold
):
    store = home.store(tmp_path)
    shutil.copytree(home.old, store / "x")
    time.sleep(SETTLE_S)
    engine = home.engine(store)
    if not is_cold:
        assert ask(engine) == home.answers["a000"]
    *before, last = watch_while(engine, WAYS[way], (home.new, store / "x"))
    assert last == home.answers["a001"]
    served = {one for one in before if not isinstance(one, ErrorInfo)}
    assert served <= set(home.answers.values()), "a mixture of contents was served"
    assert is_cold or home.answers["a000"] in served
    refused = {one.http_status for one in before if isinstance(one, ErrorInfo)}
    assert refused <= ({503, 422} if is_cold else set()), refused
    engine.close()


def test_loading_what_is_being_written_is_refused_until_it_is_whole(home, tmp_path, real_time):
    store = home.store(tmp_path)
    shutil.copytree(home.old, store / "y")
    thread = threading.Thread(target=in_place, args=(home.new, store / "y"))
    engine = home.engine(store)
    thread.start()
    time.sleep(2 * SLOW_S)
    early = command(engine, LoadAdapter("x", "y"))
    assert early.http_status in (422, 503), early
    thread.join()
    time.sleep(SETTLE_S)
    assert command(engine, LoadAdapter("x", "y")).name == "x"
    assert ask(engine) == home.answers["a001"]
    engine.close()


def point(store: Path, name: str, to: Path) -> None:
    """A link is renamed over."""
    (store.parent / "young").symlink_to(to)
    os.replace(store.parent / "young", store / name)


def test_going_back_to_the_content_before_is_seen_though_nobody_scanned_between(home, tmp_path):
    store = home.store(tmp_path)
    point(store, "x", home.old)
    engine = home.engine(store)
    point(store, "x", home.new)
    assert ask(engine) == home.answers["a001"]
    point(store, "x", home.old)
    command(engine, RescanAdapters())
    assert ask(engine) == home.answers["a000"]
    engine.close()


def test_a_load_under_way_is_not_shared_with_requests_for_later_content(
    home, tmp_path, monkeypatch
):
    """The load was begun for the old content and read the new one; since, the old one is back."""
    store = home.store(tmp_path)
    point(store, "x", home.old)
    engine = home.engine(store)
    has_read, may_pack = threading.Event(), threading.Event()
    pack = loader_worker.pack_adapter

    def pack_late(*arguments, **options):
        has_read.set()
        assert may_pack.wait(60)
        return pack(*arguments, **options)

    monkeypatch.setattr(loader_worker, "pack_adapter", pack_late)
    point(store, "x", home.new)
    engine.add(make_request("first", "x", PROMPT, ANSWER))
    assert has_read.wait(60)
    command(engine, RescanAdapters())
    point(store, "x", home.old)
    command(engine, RescanAdapters())
    engine.add(make_request("second", "x", PROMPT, ANSWER))
    may_pack.set()
    events = []
    while engine.has_work:
        events += engine.step()
    tokens = {
        name: tuple(tokens_of(event for event in events if event.request_id == name))
        for name in ("first", "second")
    }
    assert tokens["second"] == home.answers["a000"]
    assert tokens["first"] in home.answers.values()
    engine.close()


def test_unloading_waits_for_requests_of_a_name_that_was_described_long_ago(
    home, tmp_path, monkeypatch
):
    """Also when the catalog has forgotten the description meanwhile."""
    monkeypatch.setattr(catalog, "MAX_INFOS", 1)
    store = home.store(tmp_path)
    shutil.copytree(home.old, store / "x")
    engine = home.engine(store)
    engine.add(make_request("long", "x", PROMPT, LONG))
    while not engine.stats().num_running:
        engine.step()
    assert ask_beside(engine, "calm")
    engine.begin_command(0, UnloadAdapter("x"))
    while engine.has_work:
        engine.step()
        if engine.has_work:
            assert not engine.take_answers(), "answered while its request was running"
    command_answers = engine.take_answers()
    while not command_answers:
        engine.step(may_wait=False)
        command_answers = engine.take_answers()
    assert not isinstance(command_answers[0].result, ErrorInfo)
    resident = engine._memory.adapters.keys()
    assert {name for name, _ in resident} <= {"calm"}
    engine.close()


def ask_beside(engine, name) -> list[int]:
    """One request among others that go on."""
    engine.add(make_request("beside", name, PROMPT, ANSWER))
    events = []
    while not any(event.finish_reason for event in events):
        events += [event for event in engine.step() if event.request_id == "beside"]
    return tokens_of(events)
