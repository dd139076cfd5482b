"""Adapters at run time over a scripted engine: vLLM's two endpoints, our own, and the listings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

import tiny_tokenizers
from fake_engine import FakeEngine, Script
from loraswarm.core.admin import (
    AdminCommand,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapter,
    RescanAdapters,
    ScanReport,
    UnloadAdapter,
    UnpinAdapter,
)
from loraswarm.core.client import AdapterSummary
from loraswarm.errors import (
    AdapterError,
    EngineError,
    InvalidRequest,
    LoRASwarmError,
    Overloaded,
    StoreError,
)
from server_harness import TIMEOUT_S, RunningServer, openai_client, running_server

TOKENIZER = tiny_tokenizers.byte_level()
LOAD, UNLOAD, ADAPTERS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters"
POSTS = (LOAD, UNLOAD, f"{ADAPTERS}/rescan", f"{ADAPTERS}/sql/pin", f"{ADAPTERS}/sql/prefetch")
NUM_MANY = 5000
ALREADY = (
    "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place,"
    " set 'load_inplace' to True."
)


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(TOKENIZER, Script.named())) as server:
        yield server


def vllm_error(response: httpx.Response, status: int, kind: str) -> str:
    """The message of an error in vLLM's shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, status)
    return str(error["message"])


def model_ids(server: RunningServer) -> list[str]:
    return [entry["id"] for entry in server.http.get("/v1/models").json()["data"]]


def test_a_loaded_adapter_is_listed_and_answers_until_it_is_unloaded(server: RunningServer) -> None:
    assert "new" not in model_ids(server)
    response = server.post(LOAD, {"lora_name": "new", "lora_path": "/adapters/new"})
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'new' added successfully."
    assert response.headers["content-type"].startswith("text/plain")
    assert "new" in model_ids(server)
    entry = server.http.get("/v1/models/new").json()
    assert (entry["root"], entry["parent"]) == ("/adapters/new", "tiny")
    answer = server.complete(model="new", max_tokens=100)
    assert answer["choices"][0]["text"] == "I am new."
    response = server.post(UNLOAD, {"lora_name": "new"})
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'new' removed successfully."
    assert "new" not in model_ids(server)
    assert server.http.get("/v1/models/new").status_code == 404
    assert server.post("/v1/completions", {"model": "new", "prompt": "x"}).status_code == 404
    assert server.engine.commands == [LoadAdapter("new", "/adapters/new"), UnloadAdapter("new")]


@pytest.mark.parametrize(
    "more",
    [
        {"base_model_name": None},
        {"base_model_name": ""},
        {"base_model_name": "tiny"},
        {"base_model_name": "/models/tiny"},
        {"base_model_name": "someone/tiny"},
        {"is_3d_lora_weight": False},
        {"load_inplace": False},
    ],
)
def test_what_controllers_send_besides_is_accepted(
    server: RunningServer, more: dict[str, object]
) -> None:
    body = {"lora_name": "new", "lora_path": "/adapters/new", **more}
    assert server.post(LOAD, body).status_code == 200
    assert server.engine.commands == [LoadAdapter("new", "/adapters/new")]
    assert server.post(UNLOAD, {"lora_name": "new", "lora_int_id": 7}).status_code == 200


def test_a_name_that_is_served_is_a_400_that_says_already(server: RunningServer) -> None:
    body = {"lora_name": "sql", "lora_path": "/adapters/sql-2"}
    assert vllm_error(server.post(LOAD, body), 400, "InvalidUserInput") == ALREADY
    assert server.http.get("/v1/models/sql").json()["root"] == "/adapters/sql"
    assert server.post(LOAD, {**body, "load_inplace": True}).status_code == 200
    assert server.http.get("/v1/models/sql").json()["root"] == "/adapters/sql-2"
    assert server.http.get(f"{ADAPTERS}/sql").json()["generation"] == 2


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"lora_name": "x"},
        {"lora_path": "/adapters/x"},
        {"lora_name": "", "lora_path": "/adapters/x"},
        {"lora_name": "x", "lora_path": ""},
        {"lora_name": None, "lora_path": None},
    ],
)
def test_a_load_without_name_or_path_is_refused_as_vllm_does(
    server: RunningServer, body: dict[str, object]
) -> None:
    message = vllm_error(server.post(LOAD, body), 400, "InvalidUserInput")
    assert message == "Both 'lora_name' and 'lora_path' must be provided."
    assert server.engine.commands == []


@pytest.mark.parametrize("body", [{}, {"lora_name": ""}, {"lora_int_id": 3}])
def test_an_unload_without_a_name_is_refused_as_vllm_does(
    server: RunningServer, body: dict[str, object]
) -> None:
    message = vllm_error(server.post(UNLOAD, body), 400, "InvalidUserInput")
    assert message == "'lora_name' needs to be provided to unload a LoRA adapter."
    assert server.engine.commands == []


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"base_model_name": "other"}, "base_model_name"),
        ({"base_model_name": "tiny/other"}, "base_model_name"),
        ({"is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ({"load_inplace": "yes"}, "load_inplace"),
        ({"lora_name": 7}, "lora_name"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_fields_that_cannot_be_honoured_are_refused_by_name(
    server: RunningServer, more: dict[str, object], param: str
) -> None:
    response = server.post(LOAD, {"lora_name": "x", "lora_path": "/adapters/x", **more})
    assert param in vllm_error(response, 400, "InvalidUserInput")
    assert response.json()["error"]["param"] == param
    assert server.engine.commands == []


def test_missing_and_forbidden_paths_have_their_own_status(server: RunningServer) -> None:
    body = {"lora_name": "x", "lora_path": "/adapters/missing"}
    message = vllm_error(server.post(LOAD, body), 404, "NotFoundError")
    assert message.startswith("Loading lora x failed: No adapter found for /adapters/missing")
    response = server.post(LOAD, {"lora_name": "x", "lora_path": "/etc"})
    message = vllm_error(response, 403, "PermissionDeniedError")
    assert "/etc is outside /adapters" in message
    message = vllm_error(server.post(UNLOAD, {"lora_name": "x"}), 404, "NotFoundError")
    assert message == "The lora adapter 'x' cannot be found."
    assert "x" not in model_ids(server)


@pytest.mark.parametrize(
    ("error", "kind", "retry_after"),
    [
        (AdapterError("lora_A of q_proj is missing"), "UnprocessableEntityError", None),
        (StoreError("s3://x: timed out", retry_after_s=3), "ServiceUnavailableError", "3"),
        (Overloaded("still being written", retry_after_s=2), "ServiceUnavailableError", "2"),
        (EngineError("a bug"), "InternalServerError", None),
        (InvalidRequest("'tiny' is the base model's name"), "InvalidUserInput", None),
    ],
)
def test_what_the_engine_refuses_keeps_its_status_and_reason(
    server: RunningServer, error: LoRASwarmError, kind: str, retry_after: str | None
) -> None:
    server.engine.admin_error = error
    response = server.post(LOAD, {"lora_name": "x", "lora_path": "/adapters/x"})
    assert vllm_error(response, error.http_status, kind) == str(error)
    assert response.headers.get("retry-after") == retry_after
    for path in POSTS[2:]:
        response = server.http.post(path)
        assert response.status_code == error.http_status
        assert response.json()["error"]["message"] == str(error)
        assert response.headers.get("retry-after") == retry_after


def test_rows_tell_generation_tier_and_reason(server: RunningServer) -> None:
    body = server.http.get(ADAPTERS).json()
    assert body["object"] == "list"
    assert [row["name"] for row in body["data"]] == ["broken", "sql", "team/router"]
    broken, sql, router = body["data"]
    assert server.http.get("/v1/models/broken").status_code == 404
    assert (broken["state"], broken["reason"]) == ("refused", "tensor x has 3 dimensions")
    assert (sql["state"], sql["method"], sql["max_rank"]) == ("served", "LoRA", 8)
    assert (sql["generation"], sql["tier"], sql["is_pinned"]) == (1, "store", False)
    assert {"digest", "num_bytes", "host_bytes", "device_bytes", "num_running"} <= set(sql)
    assert {"num_waiting", "num_device_hits", "num_host_hits", "num_misses"} <= set(sql)
    assert {"is_loading", "last_error", "path", "file_format", "num_requests"} <= set(sql)
    assert server.http.get(f"{ADAPTERS}/team/router").json() == router
    assert server.http.get(f"{ADAPTERS}/team%2Frouter").json() == router
    two = server.http.get(ADAPTERS, params=[("name", "team/router"), ("name", "sql")]).json()
    assert two["data"] == [router, sql]


@pytest.mark.parametrize("name", ["sql", "team/router", "team%2Frouter"])
@pytest.mark.parametrize(
    ("action", "command", "is_pinned"),
    [
        ("pin", PinAdapter, True),
        ("unpin", UnpinAdapter, False),
        ("prefetch", PrefetchAdapter, False),
    ],
)
def test_actions_reach_the_engine_and_answer_with_the_row(
    server: RunningServer, name: str, action: str, command: type[Any], is_pinned: bool
) -> None:
    response = server.http.post(f"{ADAPTERS}/{name}/{action}")
    assert response.status_code == 200, response.text
    plain = name.replace("%2F", "/")
    assert server.engine.commands == [command(plain)]
    assert (response.json()["name"], response.json()["is_pinned"]) == (plain, is_pinned)
    assert server.http.get(f"{ADAPTERS}/{name}").json() == response.json()


def test_names_that_look_like_actions_are_names() -> None:
    adapters = [AdapterSummary(name=name, path="/a") for name in ("x/pin", "rescan")]
    with running_server(FakeEngine(TOKENIZER, served=adapters)) as server:
        assert server.http.post(f"{ADAPTERS}/x/pin/pin").status_code == 200
        assert server.http.post(f"{ADAPTERS}/rescan/prefetch").status_code == 200
        assert server.http.get(f"{ADAPTERS}/rescan").json()["name"] == "rescan"
        assert server.engine.commands == [PinAdapter("x/pin"), PrefetchAdapter("rescan")]


def test_a_rescan_reports_what_changed_and_what_failed(server: RunningServer) -> None:
    server.engine.scan = ScanReport(added=("a", "b"), failures=("s3://x: timed out",))
    response = server.http.post(f"{ADAPTERS}/rescan")
    assert response.status_code == 200
    assert server.engine.commands == [RescanAdapters()]
    assert response.json()["added"] == ["a", "b"]
    assert response.json()["failures"] == ["s3://x: timed out"]
    assert response.json()["removed"] == []


def test_unknown_names_are_not_found_and_the_known_are_named(server: RunningServer) -> None:
    answers = [server.http.post(f"{ADAPTERS}/nope/{a}") for a in ("pin", "unpin", "prefetch")]
    answers += [server.http.get(f"{ADAPTERS}/nope"), server.http.get(f"{ADAPTERS}?name=nope")]
    for response in answers:
        assert response.status_code == 404
        assert "'nope'" in response.json()["error"]["message"]
        assert "team/router" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b"[]", b"5", b'{"nonsense": 1}', b"[" * 99_999])
def test_nonsense_is_one_json_error_on_every_endpoint(
    server: RunningServer, path: str, raw: bytes
) -> None:
    response = server.http.post(path, content=raw)
    assert response.status_code == 400, response.text
    assert set(response.json()) == {"error"}
    assert response.headers["content-type"] == "application/json"
    assert server.engine.commands == []
    server.complete(max_tokens=1)


def test_wrong_methods_paths_and_parameters_are_errors(server: RunningServer) -> None:
    assert server.http.get(LOAD).status_code == 405
    assert server.http.post(ADAPTERS).status_code == 405
    assert server.http.post(f"{ADAPTERS}/sql").status_code == 405
    assert server.http.post(f"{ADAPTERS}/sql/drop").status_code == 405
    assert server.http.delete(f"{ADAPTERS}/sql").status_code == 405
    response = server.http.get(ADAPTERS, params={"nmae": "sql"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "nmae"
    assert server.engine.commands == []


def test_commands_need_the_api_key_as_requests_do() -> None:
    with running_server(FakeEngine(TOKENIZER), api_key="secret") as server:
        key = {"Authorization": "Bearer secret"}
        for path in POSTS:
            assert server.http.post(path).status_code == 401
        assert server.http.get(ADAPTERS).status_code == 401
        assert server.engine.commands == []
        assert server.http.get(ADAPTERS, headers=key).status_code == 200
        assert server.http.post(f"{ADAPTERS}/sql/pin", headers=key).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        (UNLOAD, {"lora_name": "sql"}, UnloadAdapter),
        (f"{ADAPTERS}/sql/pin", None, PinAdapter),
    ],
)
def test_a_client_that_leaves_a_long_command_leaves_the_server_sane(
    path: str, body: object, kind: type[AdminCommand]
) -> None:
    engine = FakeEngine(TOKENIZER, held=(kind,))
    with running_server(engine) as server:
        asyncio.run(_ask_and_leave(server, path, body))
        assert len(engine.commands) == 1
        left = 'loraswarm_http_errors_total{status="499"} 1.0'
        asyncio.run(_until(lambda: left in server.http.get("/metrics").text))
        server.complete(max_tokens=1)
        assert server.http.get(f"{ADAPTERS}/sql").status_code == 200
        server.call(engine.release())
        if kind is UnloadAdapter:
            server.call(_until(lambda: "sql" not in engine.adapters))
            assert server.post(UNLOAD, {"lora_name": "sql"}).status_code == 404


def test_a_command_whose_engine_dies_is_an_error() -> None:
    engine = FakeEngine(TOKENIZER, held=(UnloadAdapter,))
    with running_server(engine) as server:

        async def unload_and_die() -> httpx.Response:
            async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
                asked = asyncio.create_task(http.post(UNLOAD, json={"lora_name": "sql"}))
                await _until(lambda: engine.commands)
                await asyncio.to_thread(server.call, engine.die())
                return await asked

        response = asyncio.run(unload_and_die())
    vllm_error(response, 500, "InternalServerError")


def test_thousands_of_adapters_are_listed_whole_and_live() -> None:
    names = [f"tenant/{i:04}" for i in range(NUM_MANY)]
    many = [AdapterSummary(name=name, path=f"/adapters/{name}") for name in names]
    with running_server(FakeEngine(TOKENIZER, served=many)) as server:
        started_s = time.perf_counter()
        ids = model_ids(server)
        print(f"models={len(ids)} seconds={time.perf_counter() - started_s:.4f}")
        assert ids == ["tiny", *names]
        rows = server.http.get(ADAPTERS).json()["data"]
        assert [row["name"] for row in rows] == ids[1:]
        server.post(UNLOAD, {"lora_name": "tenant/0133"})
        assert len(model_ids(server)) == NUM_MANY
        with openai_client(server.base_url) as client:
            assert client.models.retrieve("tenant/4999").id == "tenant/4999"
            with pytest.raises(openai.NotFoundError, match="tenant/0133"):
                client.models.retrieve("tenant/0133")


async def _ask_and_leave(server: RunningServer, path: str, body: object) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
        asked = asyncio.create_task(http.post(path, json=body))
        await _until(lambda: server.engine.commands)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def _until(is_true: Any) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not is_true():
            await asyncio.sleep(0.005)
