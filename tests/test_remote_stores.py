"""Stores at URLs: S3 (by moto), a web server and fsspec's memory list, download and fail alike."""

from __future__ import annotations

import functools
import http.server
import os
import socket
import threading
import time
from collections import Counter

import fsspec
import pytest

from adapter_factory import CONFIG_FILE, SMALL_SHAPE, WEIGHTS_FILE, save_random_adapter
from loraswarm.adapters import remote_store
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.adapters.remote_files import Patience
from loraswarm.adapters.remote_store import RemoteStore
from loraswarm.adapters.scanner import Scanner
from loraswarm.adapters.stores import DRIVERS, Driver, open_store
from loraswarm.errors import ForbiddenPath, PathNotFound, StoreError

HASTY = Patience(answer_s=0.2, look_s=0.4, fetch_s=0.4, waits_s=(0.01,))
PEFT_NAMES = (CONFIG_FILE, WEIGHTS_FILE)


class Bucket:
    """Files by their path; written through what the store under test does not use."""

    url: str

    def put(self, path: str, content: bytes) -> None:
        raise NotImplementedError

    def remove(self, path: str) -> None:
        raise NotImplementedError

    def put_adapter(self, path: str, source) -> None:
        for name in PEFT_NAMES:
            self.put(f"{path}/{name}", (source / name).read_bytes())


class MemoryBucket(Bucket):
    url = "memory://bucket/adapters"

    def __init__(self) -> None:
        self.fs = fsspec.filesystem("memory")

    def put(self, path, content):
        self.fs.pipe_file(f"/bucket/{path}", content)

    def remove(self, path):
        self.fs.rm_file(f"/bucket/{path}")


class S3Bucket(Bucket):
    url = "s3://bucket/adapters"

    def __init__(self, client) -> None:
        self.client = client

    def put(self, path, content):
        self.client.put_object(Bucket="bucket", Key=path, Body=content)

    def remove(self, path):
        self.client.delete_object(Bucket="bucket", Key=path)


class WebBucket(Bucket):
    def __init__(self, directory, port: int) -> None:
        self.directory = directory
        self.url = f"http://127.0.0.1:{port}/adapters"

    def put(self, path, content):
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        # Its server tells whole seconds.
        os.utime(file, (0, int(time.time()) - 1000 + len(content)))

    def remove(self, path):
        (self.directory / path).unlink()


class WebHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files; `server.faults` are statuses to answer with first, by path."""

    def do_GET(self):
        if not self.is_faulty():
            super().do_GET()

    def do_HEAD(self):
        if not self.is_faulty():
            super().do_HEAD()

    def is_faulty(self) -> bool:
        self.server.asked[self.path] += 1
        faults = self.server.faults.get(self.path)
        if not faults:
            return False
        self.send_error(faults.pop(0))
        return True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tmp_path):
    """A running web server of `directory`, which holds adapters/."""
    (tmp_path / "web" / "adapters").mkdir(parents=True)
    handler = functools.partial(WebHandler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.faults, server.asked, server.directory = {}, Counter(), tmp_path / "web"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def moto_endpoint():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(moto_endpoint, monkeypatch):
    import boto3

    for key, value in {
        "AWS_ENDPOINT_URL": moto_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield S3Bucket(client)
    for item in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=item["Key"])
    client.delete_bucket(Bucket="bucket")
    client.close()


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setitem(DRIVERS, "memory", Driver("fsspec", None))
    yield MemoryBucket()
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "s3", "web"])
def bucket(request):
    found = request.getfixturevalue(request.param)
    if request.param == "web":
        return WebBucket(found.directory, found.server_address[1])
    return found


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_random_adapter(tmp_path_factory.mktemp("source") / "sql", SMALL_SHAPE, rank=3)


def names(found) -> list[str]:
    return [item.name for item in found]


def test_adapters_are_listed_as_in_a_directory(bucket, adapter):
    for name in ("sql", "router v2"):
        bucket.put_adapter(f"adapters/{name}", adapter)
    bucket.put("adapters/README.md", b"x")
    bucket.put("adapters/nothing/README.md", b"x")
    bucket.put("adapters/sql/checkpoint-7/adapter_config.json", b"x")
    bucket.put("adapters/.hidden/adapter_config.json", b"x")
    bucket.put("adapters/half/adapter_config.json", b"{}")
    bucket.put("adapters/packed/a.nemo", b"x")
    bucket.put("adapters/loose.nemo", b"x")
    bucket.put("adapters-evil/sql/adapter_config.json", b"{}")
    found = {item.name: item for item in open_store(bucket.url).look()}
    assert sorted(found) == ["half", "loose.nemo", "packed", "router v2", "sql"]
    assert found["sql"].location == f"{bucket.url}/sql"
    problems = {name: item.problem for name, item in found.items() if item.problem}
    assert sorted(problems) == ["half", "loose.nemo"]
    assert f"{WEIGHTS_FILE} is missing" in problems["half"]
    assert "beside other adapters" in problems["loose.nemo"]


def test_a_url_of_one_adapter_is_one_adapter(bucket, adapter):
    bucket.put_adapter("adapters", adapter)
    bucket.put_adapter("adapters/checkpoint-7", adapter)
    store = open_store(bucket.url + "/")
    (found,) = store.look()
    assert (found.name, found.location) == ("adapters", bucket.url)
    assert store.locate(bucket.url) == found


def test_what_is_fetched_can_be_read(bucket, adapter, tmp_path):
    bucket.put_adapter("adapters/sql", adapter)
    bucket.put("adapters/sql/training_args.bin", b"not needed")
    bucket.put("adapters/sql/adapter_model.bin", b"not what PEFT would read")
    store = open_store(bucket.url)
    (found,) = store.look()
    (tmp_path / "into").mkdir()
    path = store.fetch(found, tmp_path / "into")
    assert sorted(os.listdir(path)) == sorted(PEFT_NAMES)
    for name in PEFT_NAMES:
        assert (path / name).read_bytes() == (adapter / name).read_bytes()
    assert read_adapter_info(path, "sql", SMALL_SHAPE).max_rank == 3


def test_a_scan_sees_what_came_changed_and_went(bucket, adapter):
    bucket.put_adapter("adapters/kept", adapter)
    bucket.put_adapter("adapters/changed", adapter)
    bucket.put_adapter("adapters/gone", adapter)
    scanner = Scanner([open_store(bucket.url)], settle_s=0)
    assert names(scanner.scan().found) == ["changed", "gone", "kept"]
    assert scanner.scan().found == ()
    bucket.put(f"adapters/changed/{WEIGHTS_FILE}", b"other")
    bucket.put_adapter("adapters/come", adapter)
    for name in PEFT_NAMES:
        bucket.remove(f"adapters/gone/{name}")
    change = scanner.scan()
    assert (names(change.found), names(change.removed)) == (["changed", "come"], ["gone"])
    assert change.failures == ()


def test_a_request_names_what_is_below_the_url_and_nothing_else(bucket, adapter):
    bucket.put_adapter("adapters/sql", adapter)
    bucket.put_adapter("adapters/deep/er/a7", adapter)
    bucket.put_adapter("adapters-evil/sql", adapter)
    bucket.put_adapter("other/sql", adapter)
    store, url = open_store(bucket.url), bucket.url
    scanner = Scanner([store], settle_s=0)
    (listed,) = [item for item in store.look() if item.name == "sql"]
    for path in ("sql", "sql/", f"{url}/sql", f"{url}/sql/"):
        assert store.locate(path) == listed
    assert scanner.locate("x", f"{url}/deep/er/a7").location == f"{url}/deep/er/a7"
    outside = url.removesuffix("/adapters")
    for path in (
        f"{url}-evil/sql",
        f"{outside}/other/sql",
        f"{url}/../other/sql",
        f"{url}/%2e%2e/other/sql",
        f"{url}/%2E%2E%2Fother/sql",
        f"{url}//other/sql",
        f"{url}/./sql",
        f"{url}/sql?versionId=1",
        f"{url}/sql#x",
        f"{url}/sql\\..",
        f"{url}/sql\n",
        f"{url}/sql\0",
        "../other/sql",
        "sql/../../other/sql",
        "/adapters/sql",
        "file:///etc",
        "s3://elsewhere/sql",
        "https://127.0.0.1/sql",
        url.upper(),
        f"simplecache::{url}/sql",
    ):
        with pytest.raises(ForbiddenPath):
            scanner.locate("x", path)
    with pytest.raises(PathNotFound):
        scanner.locate("x", "nothing")


def test_files_that_have_changed_since_they_were_found_are_not_fetched(bucket, adapter, tmp_path):
    bucket.put_adapter("adapters/sql", adapter)
    store = open_store(bucket.url)
    (found,) = store.look()
    bucket.put("adapters/sql/adapter_config.json", b"{}")
    with pytest.raises(StoreError, match=r"adapter 'sql'.*has changed.*scan again"):
        store.fetch(found, tmp_path)
    for name in PEFT_NAMES:
        bucket.remove(f"adapters/sql/{name}")
    with pytest.raises(StoreError, match="not there any more"):
        store.fetch(found, tmp_path)


def test_files_that_change_while_they_are_fetched_are_not_mixed(memory, adapter, tmp_path):
    memory.put_adapter("adapters/sql", adapter)
    store = open_store(memory.url)
    (found,) = store.look()
    get = store._files.get

    def get_and_change(file, *arguments):
        get(file, *arguments)
        memory.put("adapters/sql/adapter_config.json", b'{"other": 1}')

    store._files.get = get_and_change
    with pytest.raises(StoreError, match="has changed"):
        store.fetch(found, tmp_path)


def test_an_adapter_too_large_for_us_is_not_downloaded(memory, adapter, tmp_path, monkeypatch):
    memory.put_adapter("adapters/sql", adapter)
    store = open_store(memory.url)
    (found,) = store.look()
    monkeypatch.setattr(remote_store, "MAX_ADAPTER_BYTES", 1000)
    with pytest.raises(StoreError, match="the limit is 1,000"):
        store.fetch(found, tmp_path)
    monkeypatch.setattr(remote_store, "MAX_ADAPTER_BYTES", 1 << 40)
    usage = remote_store.shutil.disk_usage(tmp_path)._replace(free=7)
    monkeypatch.setattr(remote_store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match="has 7 left"):
        store.fetch(found, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_bucket_that_does_not_exist_is_a_failure_and_removes_nothing(s3, adapter):
    s3.put_adapter("adapters/sql", adapter)
    scanner = Scanner([open_store(s3.url)], settle_s=0)
    assert names(scanner.scan().found) == ["sql"]
    for name in PEFT_NAMES:
        s3.remove(f"adapters/sql/{name}")
    s3.client.delete_bucket(Bucket="bucket")
    change = scanner.scan()
    s3.client.create_bucket(Bucket="bucket")
    assert change.removed == ()
    assert change.failures[0].startswith(f"store {s3.url!r}: ")
    assert names(scanner.scan().removed) == ["sql"]


def test_an_s3_that_is_down_is_a_store_error_that_names_it(s3, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(StoreError, match="s3://bucket/adapters") as caught:
        RemoteStore(s3.url, HASTY).look()
    assert caught.value.http_status == 503
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_server_that_never_answers_is_a_store_error_in_time(scheme, s3, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", place)
        store = RemoteStore(s3.url if scheme == "s3" else f"{place}/adapters", HASTY)
        with pytest.raises(StoreError, match=scheme) as caught:
            store.look()
        with pytest.raises(StoreError):
            store.locate("sql")
    assert str(caught.value).isprintable()


def test_a_look_ends_in_its_own_time_however_patient_the_client_is():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/adapters"
        store = RemoteStore(url, Patience(answer_s=3.0, look_s=0.2))
        with pytest.raises(StoreError, match="no answer in time"):
            store.look()


def test_a_driver_that_never_returns_is_left_in_time(memory, monkeypatch):
    ending = threading.Event()
    waits = lambda *arguments, **options: ending.wait()  # noqa: E731
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "find", waits)
    with pytest.raises(StoreError, match="no answer in time"):
        RemoteStore(memory.url, HASTY).look()
    ending.set()


def test_failures_that_pass_are_tried_again_and_others_are_not(web, adapter):
    bucket = WebBucket(web.directory, web.server_address[1])
    bucket.put_adapter("adapters/sql", adapter)
    store = RemoteStore(bucket.url, Patience(waits_s=(0.01, 0.01)))
    web.faults["/adapters/"] = [503, 503]
    assert names(store.look()) == ["sql"]
    web.faults["/adapters/"] = [503, 503, 503]
    with pytest.raises(StoreError, match="503"):
        store.look()
    web.asked.clear()
    with pytest.raises(StoreError, match="not found"):
        RemoteStore(f"{bucket.url}/nothing", Patience(waits_s=(0.01,))).look()
    assert web.asked["/adapters/nothing/"] == 1


def test_a_download_that_breaks_off_is_tried_again(web, adapter, tmp_path, monkeypatch):
    bucket = WebBucket(web.directory, web.server_address[1])
    bucket.put_adapter("adapters/sql", adapter)
    store = RemoteStore(bucket.url, Patience(waits_s=(0.01,)))
    (found,) = store.look()
    get, calls = store._files.get, []

    def cut(file, to, *arguments):
        get(file, to, *arguments)
        calls.append(file.name)
        if len(calls) == 2:
            to.write_bytes(to.read_bytes()[:-1])

    monkeypatch.setattr(store._files, "get", cut)
    path = store.fetch(found, tmp_path)
    assert len(calls) == 4
    assert (path / WEIGHTS_FILE).read_bytes() == (adapter / WEIGHTS_FILE).read_bytes()


def test_a_web_server_without_an_index_holds_the_one_adapter_of_the_url(web, adapter, tmp_path):
    bucket = WebBucket(web.directory, web.server_address[1])
    bucket.put_adapter("adapters/sql", adapter)
    for path in ("/adapters/", "/adapters/sql/"):
        web.faults[path] = [404] * 9
    one = open_store(f"{bucket.url}/sql")
    (found,) = one.look()
    assert (found.name, found.problem) == ("sql", None)
    assert one.fetch(found, tmp_path) == tmp_path
    many = open_store(bucket.url)
    with pytest.raises(StoreError, match="not found"):
        many.look()
    assert many.locate("sql").stamp == found.stamp
