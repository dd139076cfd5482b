"""A store, a file, a disk or the loader fails: the rest is served on, and errors name the cause.

From the engine's side; tests/test_remote_stores.py has the stores themselves.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import resource
import shutil
import signal
import socket
import threading
import time

import pytest

from adapter_factory import WEIGHTS_FILE
from engine_factory import GREEDY, make_engine, make_request, prompt_of, save_swarm, tokens_of
from locked_files import lock
from loraswarm.adapters import remote_store
from loraswarm.adapters.remote_files import Patience
from loraswarm.core.admin import PrefetchAdapter, RescanAdapters
from loraswarm.core.events import ErrorInfo
from loraswarm.core.request import SamplingParams
from loraswarm.engine import backoff, setup
from loraswarm.errors import LoRASwarmError, UnknownAdapter
from test_remote_stores import PEFT_NAMES, moto_endpoint, s3  # noqa: F401

PROMPT = prompt_of(1, 19)
LONG = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)
HASTY = Patience(answer_s=1.0, look_s=3.0, fetch_s=3.0, waits_s=(0.01,))
WAIT_S = 60.0
NAMES = ("a000", "a001", "a002", "a003")


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, len(NAMES), ranks=(8, 24, 3, 40))
    return path


@pytest.fixture(scope="module")
def expected(swarm):
    """Tokens of each adapter, from an engine that nothing happens to."""
    engine = make_engine(swarm)
    return {name: ask(engine, name) for name in NAMES}


@pytest.fixture
def store(swarm, tmp_path, monkeypatch):
    """A copy of the adapters that a test may spoil; failures are tried again at once."""
    monkeypatch.setattr(backoff, "FIRST_WAIT_S", 0.0)
    return shutil.copytree(swarm / "adapters", tmp_path / "store")


@pytest.fixture
def engine(swarm, store):
    engine = make_engine(swarm, adapters=(str(store),))
    while engine._catalog.undescribed():  # on a slow machine some are looked into later
        engine.step(may_wait=False)
        engine.wait(0.01)
    yield engine
    engine.check()
    engine.close()


def start(engine, request_id, name, params=GREEDY):
    """Send a request; its error if it is refused at once."""
    try:
        engine.add(make_request(request_id, name, PROMPT, params))
    except LoRASwarmError as error:
        return ErrorInfo.of(error)
    return None


def finish(engine):
    """Serve all requests to their ends: tokens, or the error, by request id."""
    events = {}
    deadline = time.monotonic() + WAIT_S
    while engine.has_work:
        assert time.monotonic() < deadline, engine.stats()
        for event in engine.step(may_wait=False):
            events.setdefault(event.request_id, []).append(event)
        if engine.is_blocked:
            engine.wait(0.01)
    return {name: found[-1].error or tokens_of(found) for name, found in events.items()}


def ask(engine, name):
    """Tokens of one request alone, or its error."""
    return start(engine, "x", name) or finish(engine)["x"]


def command(engine, what):
    engine.begin_command(0, what)
    deadline = time.monotonic() + WAIT_S
    while not (answers := engine.take_answers()):
        assert time.monotonic() < deadline, engine.stats()
        engine.step(may_wait=False)
        engine.wait(0.01)
    return answers[0].result


def row(engine, name):
    return next(row for row in engine.adapter_states() if row.name == name)


def make_host_warm(engine, name):
    """In host memory, not in pages."""
    command(engine, PrefetchAdapter(name))
    engine._memory.drop_adapter(row(engine, name) and engine._catalog.entry_named(name).key)
    assert row(engine, name).tier == "host"


def test_a_store_that_is_deleted_takes_only_what_is_nowhere_else(engine, store, expected):
    assert ask(engine, "a000") == expected["a000"]
    make_host_warm(engine, "a001")
    assert [row(engine, name).tier for name in NAMES] == ["device", "host", "store", "store"]
    store.rename(store.parent / "gone")
    assert start(engine, "resident", "a000") is None
    assert start(engine, "warm", "a001") is None
    assert start(engine, "cold", "a002") is None
    found = finish(engine)
    assert (found["resident"], found["warm"]) == (expected["a000"], expected["a001"])
    assert found["cold"].http_status in (422, 503)
    assert "a002" in found["cold"].message
    report = command(engine, RescanAdapters())
    assert len(report.failures) == 1
    assert str(store) in report.failures[0]
    assert report.removed == ()
    assert [row.name for row in engine.adapters() if row.refusal is None] == list(NAMES)
    assert "a002" in row(engine, "a002").last_error
    assert ask(engine, "a000") == expected["a000"]
    (store.parent / "gone").rename(store)
    assert command(engine, RescanAdapters()).failures == ()
    assert ask(engine, "a002") == expected["a002"]
    assert row(engine, "a002").last_error is None


def test_a_directory_that_is_deleted_ends_no_request_that_runs(engine, store, expected):
    assert start(engine, "running", "a000", LONG) is None
    before = []
    while not before:
        before = [event for event in engine.step() if event.token_ids]
    shutil.rmtree(store / "a000")
    shutil.rmtree(store / "a003")
    assert start(engine, "cold", "a003") is None
    while engine.has_work and engine._residency.is_busy:
        before += engine.step()
    report = command(engine, RescanAdapters())
    assert report.removed == ("a000", "a003")
    assert report.failures == ()
    with pytest.raises(UnknownAdapter):
        engine.add(make_request("late", "a000", PROMPT))
    for event in before:
        if event.request_id == "cold":
            assert event.error.http_status in (422, 503)
            assert "a003" in event.error.message
    assert any(event.request_id == "cold" for event in before)
    assert len(finish(engine)["running"]) > 0
    assert engine.stats().num_host_bytes == engine.stats().num_adapter_pages == 0
    assert ask(engine, "a001") == expected["a001"]


SPOILED = {
    "cut short": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\xff" * len(content),
    "empty": lambda content: b"",
    "not finite": lambda content: content[:-4] + b"\x00\x00\xc0\x7f",
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_corrupt_file_ends_its_own_requests_and_is_served_once_it_is_mended(
    engine, store, expected, kind
):
    good = (store / "a001" / WEIGHTS_FILE).read_bytes()
    (store / "a001" / WEIGHTS_FILE).write_bytes(SPOILED[kind](good))
    assert start(engine, "good", "a000") is None
    for number in range(3):
        assert start(engine, f"bad{number}", "a001") is None
    found = finish(engine)
    assert found.pop("good") == expected["a000"]
    assert len(found) == 3
    for error in found.values():
        assert error.http_status == 422
        assert "a001" in error.message
        assert error.message.isprintable()
    assert row(engine, "a001").last_error == found["bad0"].message
    assert engine.stats().total_load_failures == 1
    (store / "a001" / WEIGHTS_FILE).write_bytes(good)
    command(engine, RescanAdapters())
    assert ask(engine, "a001") == expected["a001"]
    assert row(engine, "a001").last_error is None


def test_files_that_may_not_be_read_are_named(engine, store, expected, monkeypatch):
    with monkeypatch.context() as patch:
        lock(patch, store / "a002")
        error = ask(engine, "a002")
        assert error.http_status in (422, 503)
        assert "a002" in error.message
        assert "ermission" in error.message
        assert ask(engine, "a000") == expected["a000"]
    assert ask(engine, "a002") == expected["a002"]


def test_a_store_that_may_not_be_read_is_named_and_removes_nothing(
    engine, store, expected, monkeypatch
):
    with monkeypatch.context() as patch:
        lock(patch, store)
        report = command(engine, RescanAdapters())
        assert "ermission" in report.failures[0]
        assert str(store) in report.failures[0]
        assert report.removed == ()
    assert ask(engine, "a002") == expected["a002"]


def test_a_full_disk_under_the_host_cache_is_reported_and_harms_no_request(
    swarm, store, expected, tmp_path, caplog
):
    options = {"adapters": (str(store),), "host_cache_dir": str(tmp_path / "images")}
    engine = make_engine(swarm, **options)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        found = {name: ask(engine, name) for name in NAMES[:2]}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found == {name: expected[name] for name in NAMES[:2]}
    assert not list((tmp_path / "images").iterdir())
    (line, *_) = [r.getMessage() for r in caplog.records if "not kept" in r.getMessage()]
    assert "a000" in line
    assert os.strerror(27) in line
    assert ask(engine, "a002") == expected["a002"]
    assert len(list((tmp_path / "images").iterdir())) == 1
    engine.close()


def test_a_killed_loader_fails_open_loads_only_and_loads_again(swarm, store, expected, monkeypatch):
    build = setup.build_engine
    monkeypatch.setattr(
        "engine_factory.build_engine", lambda config: build(config, has_loader_process=True)
    )
    engine = make_engine(swarm, adapters=(str(store),))
    try:
        assert ask(engine, "a000") == expected["a000"]
        pid = engine._parts.loader.pid
        os.kill(pid, signal.SIGSTOP)
        assert start(engine, "running", "a000", LONG) is None
        assert start(engine, "cold", "a001") is None
        events = [event for _ in range(5) for event in engine.step(may_wait=False)]
        assert {event.request_id for event in events} == {"running"}
        os.kill(pid, signal.SIGKILL)
        found = finish(engine)
        assert len(tokens_of(events)) + len(found["running"]) == LONG.max_tokens
        assert (tokens_of(events) + found["running"])[: len(expected["a000"])] == expected["a000"]
        assert found["cold"].http_status == 503
        assert "a001" in found["cold"].message
        assert ask(engine, "a002") == expected["a002"]
        assert ask(engine, "a001") == expected["a001"]
        assert engine._parts.loader.pid not in (None, pid)
    finally:
        engine.close()


class FaultyProxy(http.server.BaseHTTPRequestHandler):
    """Hands requests on to an S3 server; `server.faults` has a status, or "silent", by what is
    asked: "list" or "get"."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.hand_on()

    do_HEAD = do_GET

    def hand_on(self):
        kind = "list" if "list-type" in self.path or self.path.count("/") < 2 else "get"
        fault = self.server.faults.get(kind)
        if fault == "silent":
            self.server.is_over.wait(WAIT_S)
            self.close_connection = True
        elif fault is not None:
            self.answer(fault, {}, b"")
        else:
            self.answer(*self.fetched())

    def fetched(self):
        place = self.server.moto.removeprefix("http://")
        with contextlib.closing(http.client.HTTPConnection(place, timeout=WAIT_S)) as connection:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            connection.request(self.command, self.path, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def answer(self, status, headers, body):
        self.send_response_only(status)
        skipped = ("connection", "transfer-encoding", "content-length")
        for key, value in headers.items():
            if key.lower() not in skipped:
                self.send_header(key, value)
        length = headers.get("Content-Length", len(body)) if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class ProxyServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that has gone is what some tests are about."""


@pytest.fixture
def faults(s3, moto_endpoint, monkeypatch):  # noqa: F811
    """What the S3 server does wrong now; the environment leads to it."""
    with ProxyServer(("127.0.0.1", 0), FaultyProxy) as server:
        server.faults, server.moto, server.is_over = {}, moto_endpoint, threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield server.faults
        server.is_over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def remote(faults, s3, swarm, monkeypatch):  # noqa: F811
    """An engine over a bucket that holds all adapters."""
    for name in NAMES:
        s3.put_adapter(f"adapters/{name}", swarm / "adapters" / name)
    monkeypatch.setattr(remote_store, "Patience", lambda: HASTY)
    monkeypatch.setattr(backoff, "FIRST_WAIT_S", 0.0)
    engine = make_engine(swarm, adapters=(s3.url,))
    yield engine
    engine.close()


@pytest.mark.parametrize("fault", [500, 403, "silent"])
def test_objects_that_s3_does_not_give_fail_their_own_requests_until_it_does(
    remote, faults, expected, fault
):
    assert ask(remote, "a000") == expected["a000"]
    faults["get"] = fault
    assert start(remote, "resident", "a000") is None
    assert start(remote, "cold", "a001") is None
    found = finish(remote)
    assert found["resident"] == expected["a000"]
    error = found["cold"]
    assert (error.http_status, error.error_type) == (503, "store_error")
    assert "s3://bucket/adapters" in error.message
    assert "a001" in error.message
    assert error.message.isprintable()
    assert row(remote, "a001").last_error == error.message
    faults.clear()
    assert ask(remote, "a001") == expected["a001"]


@pytest.mark.parametrize("fault", [500, 403, "silent"])
def test_a_bucket_that_cannot_be_listed_is_named_and_serves_on(remote, faults, expected, fault):
    assert ask(remote, "a000") == expected["a000"]
    faults["list"] = fault
    report = command(remote, RescanAdapters())
    assert len(report.failures) == 1
    assert report.failures[0].startswith("store 's3://bucket/adapters': ")
    assert report.removed == ()
    assert ask(remote, "a000") == expected["a000"]
    faults.clear()
    assert command(remote, RescanAdapters()).failures == ()
    assert ask(remote, "a002") == expected["a002"]


def test_an_s3_that_is_down_at_the_start_is_found_once_it_is_up(
    swarm,
    s3,  # noqa: F811
    expected,
    monkeypatch,
    caplog,
):
    s3.put_adapter("adapters/a000", swarm / "adapters" / "a000")
    monkeypatch.setattr(remote_store, "Patience", lambda: HASTY)
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    engine = make_engine(swarm, adapters=(str(swarm / "adapters"), s3.url))
    assert any("s3://bucket/adapters" in record.getMessage() for record in caplog.records)
    assert ask(engine, "a001") == expected["a001"]
    assert endpoint
    engine.close()
