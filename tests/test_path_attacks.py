"""POST /v1/load_lora_adapter with paths that lead where they should not, to a server as it is run.

None is loaded, nothing that lies outside is told, and requests beside them are answered as ever.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import httpx
import pytest

from adapter_factory import CONFIG_FILE
from engine_factory import make_engine, make_request, prompt_of, save_swarm
from loraswarm.adapters.scanner import Scanner
from loraswarm.core.admin import LoadAdapter
from loraswarm.core.events import ErrorInfo
from loraswarm.errors import UnknownAdapter
from served_process import served
from test_remote_stores import PEFT_NAMES, moto_endpoint  # noqa: F401

SECRET = "the-secret-of-another-tenant"
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """home/adapters is the root; beside it lies what must not be reached.

    adapters/a000, a001        served
    adapters/link-out          a link to outside/stolen, put there by an operator: served
    adapters/deep/link-out     the same, deeper
    adapters/half/             a directory with one link, of its weights, to outside
    outside/stolen             an adapter
    outside/secret             no adapter; its config is text
    adapters-evil/stolen       begins like the root
    """
    path = tmp_path_factory.mktemp("home")
    save_swarm(path, 3, has_tokenizer=True)
    adapters, outside = path / "adapters", path / "outside"
    outside.mkdir()
    (adapters / "a002").rename(outside / "stolen")
    shutil.copytree(outside / "stolen", path / "adapters-evil" / "stolen")
    (outside / "secret").mkdir()
    for name in PEFT_NAMES:
        (outside / "secret" / name).write_text(SECRET)
    (outside / "passwords").write_text(SECRET)
    (adapters / "deep").mkdir()
    (adapters / "deep" / "link-out").symlink_to(outside / "stolen")
    (adapters / "deep" / "secret-link").symlink_to(outside / "secret")
    (adapters / "deep" / "file-link").symlink_to(outside / "passwords")
    (adapters / "deep" / "up").symlink_to("../..")
    (adapters / "deep" / "loop").symlink_to("loop")
    half = adapters / "deep" / "half"
    half.mkdir()
    shutil.copy(outside / "stolen" / CONFIG_FILE, half)
    (half / PEFT_NAMES[1]).symlink_to(outside / "stolen" / PEFT_NAMES[1])
    os.mkfifo(adapters / "deep" / "pipe")
    return path


@pytest.fixture(scope="module")
def server(home, moto_endpoint):  # noqa: F811
    """Serves the root and one place in a bucket; another bucket and place are there too."""
    import boto3

    environment = {
        "AWS_ENDPOINT_URL": moto_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        client = boto3.client("s3")
        for bucket, place in (("bucket", "mine/b000"), ("bucket", "hers/b"), ("other", "mine/b")):
            client.create_bucket(Bucket=bucket)
            for name in PEFT_NAMES:
                body = (home / "outside" / "stolen" / name).read_bytes()
                client.put_object(Bucket=bucket, Key=f"{place}/{name}", Body=body)
        client.close()
        arguments = [
            *(str(home / "model"), "--served-model-name", "tiny"),
            *("--adapters", str(home / "adapters"), "--adapters", "s3://bucket/mine"),
            *("--pool-bytes", str(4 << 20), "--num-threads", "1"),
        ]
        with served(*arguments) as running:
            yield running


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        yield client


def paths(home: Path) -> dict[str, str]:
    """Attacks by what they are."""
    root, outside = home / "adapters", home / "outside"
    return {
        "parent": "../outside/stolen",
        "parent in the middle": "a000/../../outside/stolen",
        "parent that comes back": "../adapters/a000",
        "parent, absolute": f"{root}/../outside/stolen",
        "a link to the parent": "deep/up/outside/stolen",
        "many parents": "../" * 40 + str(outside / "stolen").lstrip("/"),
        "absolute": str(outside / "stolen"),
        "absolute, no adapter": "/etc",
        "absolute, a file": "/etc/passwd",
        "absolute, a process": "/proc/self/cwd",
        "the place of all": "/",
        "doubled slashes": "/" + str(outside / "stolen"),
        "begins like the root": str(home / "adapters-evil" / "stolen"),
        "begins like the root, relative": "../adapters-evil/stolen",
        "a link out of the root": f"{root}/deep/link-out",
        "a link out of the root, relative": "deep/link-out",
        "a link to a secret": "deep/secret-link",
        "a link to a file": "deep/file-link",
        "one file is a link": f"{root}/deep/half",
        "a link to itself": "deep/loop",
        "a pipe": "deep/pipe",
        "a home": "~/adapters",
        "a variable": "$HOME/adapters",
        "a nul": "a000\0",
        "a nul in the middle": "a000\0/../../outside/stolen",
        "a nul and a way out": f"{outside}/stolen\0",
        "very long": "a" * 100_000,
        "very long, many parts": "a/" * 20_000,
        "line breaks": "a000\n\n../outside/stolen",
        "a half of a pair": "\ud800",
        "back slashes": "..\\outside\\stolen",
        "encoded": "%2e%2e/outside/stolen",
        "encoded slashes": "..%2foutside%2fstolen",
        "encoded twice": "%252e%252e/outside/stolen",
        "overlong dots": "\u2025/outside/stolen",
        "a dot": ".",
        "spaces": "   ",
        "file://": f"file://{outside}/stolen",
        "file:///, in the root": f"file://{root}/a000",
        "file:": f"file:{outside}/stolen",
        "local://": f"local://{outside}/stolen",
        "chained": f"simplecache::file://{outside}/stolen",
        "chained from s3": "simplecache::s3://bucket/mine/b000",
        "zip": f"zip://stolen::file://{outside}/a.zip",
        "http": "http://127.0.0.1:1/mine/b",
        "https": "https://127.0.0.1:1/mine/b",
        "metadata": "http://169.254.169.254/latest/meta-data",
        "ftp": "ftp://127.0.0.1/mine/b",
        "memory": "memory://mine/b",
        "hf": "hf://someone/something",
        "gs": "gs://bucket/mine/b000",
        "data": "data:text/plain,x",
        "another bucket": "s3://other/mine/b",
        "another place in the bucket": "s3://bucket/hers/b",
        "begins like the place": "s3://bucket/mine-evil/b",
        "parent in the bucket": "s3://bucket/mine/../hers/b",
        "encoded parent in the bucket": "s3://bucket/mine/%2e%2e/hers/b",
        "a query in the bucket": "s3://bucket/mine/b000?versionId=1",
        "a key in the bucket": "s3://key:secret@bucket/mine/b000",
        "the scheme in capitals": "S3://bucket/mine/b000",
        "s3a": "s3a://bucket/mine/b000",
        "no bucket": "s3://",
    }


def load(http, body):
    content = json.dumps(body).encode("ascii")  # surrogates as escapes
    headers = {"Content-Type": "application/json"}
    return http.post("/v1/load_lora_adapter", content=content, headers=headers)


def names(http):
    return {row["id"] for row in http.get("/v1/models").json()["data"]}


def complete(http, model="a001"):
    body = {"model": model, "prompt": "hello", "max_tokens": 9, "temperature": 0}
    response = http.post("/v1/completions", json=body | {"ignore_eos": True})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_what_is_within_the_stores_is_loaded(http, home):
    for number, path in enumerate(
        ("a000", str(home / "adapters" / "a000"), "./a000/", "b000", "s3://bucket/mine/b000")
    ):
        response = load(http, {"lora_name": f"good-{number}", "lora_path": path})
        assert response.status_code == 200, (path, response.text)
        assert complete(http, f"good-{number}")
        http.post("/v1/unload_lora_adapter", json={"lora_name": f"good-{number}"})


def test_no_path_leads_out_and_nothing_is_told_of_what_lies_there(http, home):
    before, answer = names(http), complete(http)
    statuses = {}
    for what, path in paths(home).items():
        for in_place in (False, True):
            name = "a000" if in_place else "stolen"
            body = {"lora_name": name, "lora_path": path, "load_inplace": in_place}
            response = load(http, body)
            assert response.status_code in (400, 403, 404), (what, response.text)
            statuses[what] = response.status_code
            message = response.json()["error"]["message"]
            assert SECRET not in message, what
            assert "root:" not in message, what
    ways = ("parent", "absolute", "another", "file://", "http", "hf", "begins like")
    plain = ("a link out of the root", "one file is a link")
    ways_out = {what: statuses[what] for what in statuses if what.startswith(ways)}
    ways_out |= {what: statuses[what] for what in plain}
    assert ways_out == dict.fromkeys(ways_out, 403)
    assert names(http) == before
    assert complete(http) == answer
    assert complete(http, "a000") != answer


@pytest.mark.parametrize("path", ["", None, 7, 1.5, True, [], ["a000"], {}, {"path": "a000"}])
def test_what_is_no_text_is_no_path(http, path):
    before = names(http)
    response = load(http, {"lora_name": "stolen", "lora_path": path})
    assert response.status_code == 400, response.text
    assert names(http) == before


@pytest.mark.parametrize("name", ["", " ", "tiny", "a\0b", "a\nb", None, 7, ["a"], "\ud800"])
def test_what_can_be_no_name_is_refused(http, name):
    before = names(http)
    response = load(http, {"lora_name": name, "lora_path": "a000"})
    assert response.status_code == 400, response.text
    assert names(http) == before


def test_names_are_no_paths(http, home):
    """A name may look like a path; it names what is loaded, nothing else."""
    response = load(http, {"lora_name": "../../outside/stolen", "lora_path": "a000"})
    assert response.status_code == 200, response.text
    answers = {complete(http, name) for name in ("../../outside/stolen", "a000")}
    assert len(answers) == 1
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "../../outside/stolen"})
    assert gone.status_code == 200


def test_a_link_that_moves_to_and_fro_never_gets_its_target_loaded(http, home):
    """What is outside answers unlike what is inside, so one hit in many tries would show."""
    inside = shutil.copytree(home / "adapters" / "a000", home / "adapters" / "deep" / "inside")
    place, young = home / "adapters" / "deep" / "moving", home / "young"
    is_over = threading.Event()

    def move():
        while not is_over.is_set():
            for target in (home / "outside" / "stolen", inside):
                young.symlink_to(target)
                os.replace(young, place)

    place.symlink_to(inside)
    expected = complete(http, "a000")
    thread = threading.Thread(target=move)
    thread.start()
    try:
        statuses = set()
        for _ in range(25):
            response = load(http, {"lora_name": "moving", "lora_path": "deep/moving"})
            statuses.add(response.status_code)
            if response.status_code == 200:
                assert complete(http, "moving") == expected
                http.post("/v1/unload_lora_adapter", json={"lora_name": "moving"})
    finally:
        is_over.set()
        thread.join()
    assert statuses <= {200, 403, 404, 503}, statuses


def test_a_directory_that_becomes_a_link_between_check_and_use_is_not_read(home, monkeypatch):
    place = shutil.copytree(home / "adapters" / "a000", home / "adapters" / "deep" / "swapped")
    locate = Scanner.locate

    def locate_and_swap(scanner, name, path):
        found = locate(scanner, name, path)
        place.rename(home / "away")
        place.symlink_to(home / "outside" / "stolen")
        return found

    engine = make_engine(home)
    monkeypatch.setattr(Scanner, "locate", locate_and_swap)
    engine.begin_command(0, LoadAdapter("swapped", "deep/swapped"))
    while not (answers := engine.take_answers()):
        engine.step(may_wait=False)
        engine.wait(0.01)
    assert isinstance(answers[0].result, ErrorInfo)
    assert answers[0].result.http_status == 403
    with pytest.raises(UnknownAdapter):
        engine.add(make_request("x", "swapped", prompt_of(0, 3)))
    engine.close()
