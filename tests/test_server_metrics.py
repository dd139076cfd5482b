"""/metrics over a scripted engine: what is counted, when, under which label, in which format."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as plain_families

import tiny_tokenizers
from fake_engine import IDLE, FakeEngine, Script
from loraswarm.core.client import AdapterSummary, EngineStats, MergeState, TimeTotals
from loraswarm.core.events import SequenceEvent
from loraswarm.core.request import Request, SamplingParams
from loraswarm.server.engine_metrics import pool_usage
from loraswarm.server.metrics import MAX_OWN_LABELS, RequestMetrics
from loraswarm.text.generation import TextDelta
from server_harness import TIMEOUT_S, RunningServer, running_server

TOKENIZER = tiny_tokenizers.byte_level()
OPEN_METRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
BUSY = EngineStats(
    num_waiting=3,
    num_running=0,
    num_free_pages=1,
    num_kv_pages=3,
    num_prefix_pages=2,
    num_adapter_pages=2,
    num_pinned_adapters=1,
    num_resident_adapters=2,
    num_host_adapters=7,
    num_host_bytes=1330,
    num_loading=1,
    total_preemptions=4,
    total_device_hits=50,
    total_host_hits=20,
    total_misses=10,
    total_load_failures=2,
    total_device_evictions=6,
    total_host_evictions=5,
    total_prefix_evictions=9,
    total_prefix_hit_tokens=133,
    total_prefix_asked_tokens=1000,
    loads={"read": TimeTotals(count=12, seconds=1.5, num_bytes=4096)},
    running_adapters=("sql", "team/router", "sql"),
    waiting_adapters=("team/router",),
    merging=MergeState(
        target="sql",
        share=0.25,
        num_merged_linears=3,
        merged_bytes=300,
        reserved_bytes=1200,
        total_switches=8,
    ),
)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(autouse=True)
def every_scrape_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraswarm.server.scrape.MAX_WRITING_SHARE", 1.0)
    monkeypatch.setattr("loraswarm.server.scrape.STATES_AGE_S", 0.0)


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(TOKENIZER)) as server:
        yield server


class Scrape:
    """One scrape, over a connection of its own; call it with a name and labels."""

    def __init__(self, server: RunningServer) -> None:
        response = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S)
        assert response.status_code == 200, response.text
        self.samples: Samples = {}
        for family in plain_families(response.text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.samples
                self.samples[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        """The value, or 0 for a series that is not there."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def labels_of(self, name: str) -> list[dict[str, str]]:
        return [dict(labels) for sample, labels in self.samples if sample == name]

    def outcomes(self, adapter: str = "tiny") -> tuple[int, int, int]:
        """Requests that ended with success, error and abort."""
        name = "loraswarm_requests_total"
        ended = [self(name, adapter=adapter, outcome=o) for o in ("success", "error", "abort")]
        return int(ended[0]), int(ended[1]), int(ended[2])


def count(scrape: Scrape, name: str, adapter: str = "tiny") -> float:
    return scrape(f"loraswarm_{name}_seconds_count", adapter=adapter)


def test_a_request_is_counted_and_timed_once(server: RunningServer) -> None:
    server.engine.num_cached_tokens = 3
    server.engine.queue_s = 0.125
    usage = server.complete(prompt="hello there", max_tokens=7, ignore_eos=True)["usage"]
    after = Scrape(server)
    assert after.outcomes() == (1, 0, 0)
    assert after("loraswarm_prompt_tokens_total", adapter="tiny") == usage["prompt_tokens"]
    assert after("loraswarm_generated_tokens_total", adapter="tiny") == 7
    assert after("loraswarm_cached_prompt_tokens_total", adapter="tiny") == 3
    assert count(after, "time_to_first_token") == 1
    assert count(after, "inter_token_latency") == 6
    assert count(after, "queue") == 1
    assert after("loraswarm_queue_seconds_sum", adapter="tiny") == 0.125
    assert after("loraswarm_time_to_first_token_seconds_sum", adapter="tiny") > 0
    assert after("loraswarm_open_requests") == 0


def test_what_is_not_known_is_not_made_up(server: RunningServer) -> None:
    server.complete(max_tokens=3)
    after = Scrape(server)
    assert after.outcomes() == (1, 0, 0)
    assert count(after, "queue") == 0
    assert after("loraswarm_cached_prompt_tokens_total", adapter="tiny") == 0


def test_each_choice_is_a_request(server: RunningServer) -> None:
    server.complete(prompt=["a", "b", "c"], n=2, max_tokens=2, ignore_eos=True)
    after = Scrape(server)
    assert after.outcomes() == (6, 0, 0)
    assert after("loraswarm_generated_tokens_total", adapter="tiny") == 12


@pytest.mark.parametrize("stream", [False, True])
def test_an_end_at_a_stop_string_is_a_success(stream: bool) -> None:
    with running_server(FakeEngine(TOKENIZER, Script.text("Hello STOP and more"))) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 50, "stop": "STOP", "stream": stream}
        assert server.post("/v1/completions", body).status_code == 200
        assert len(server.engine.aborted) == 1
        assert Scrape(server).outcomes() == (1, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_after", [0, 3])
def test_a_failure_is_an_error_once(stream: bool, fail_after: int) -> None:
    with running_server(FakeEngine(TOKENIZER, fail_after=fail_after)) as server:
        body = {"model": "tiny", "prompt": "hello there", "max_tokens": 9, "stream": stream}
        server.post("/v1/completions", body)
        after = Scrape(server)
        assert after.outcomes() == (0, 1, 0)
        assert after("loraswarm_generated_tokens_total", adapter="tiny") == fail_after
        assert after("loraswarm_open_requests") == 0


def test_a_bug_is_an_error_once() -> None:
    def broken(*_: object) -> list[int]:
        raise ZeroDivisionError

    with running_server(FakeEngine(TOKENIZER, Script(broken))) as server:
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "x"}).status_code == 500
        after = Scrape(server)
        assert after.outcomes() == (0, 1, 0)
        assert after("loraswarm_http_errors_total", status="500") == 1


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_an_abort_once(n: int, stream: bool) -> None:
    with running_server(FakeEngine(TOKENIZER, hold_after=2)) as server:
        body = {"model": "tiny", "prompt": "hello there", "max_tokens": 9, "n": n}
        asyncio.run(ask_and_leave(server, {**body, "stream": stream}, n))
        after = Scrape(server)
        assert after.outcomes() == (0, 0, n)
        assert after("loraswarm_generated_tokens_total", adapter="tiny") == 2 * n
        assert after("loraswarm_open_requests") == 0
        server.call(server.engine.release())
        server.complete()
        assert Scrape(server).outcomes() == (1, 0, n)


async def ask_and_leave(server: RunningServer, body: dict[str, Any], num_open: int) -> None:
    """Leave when `num_open` requests have come so far that they wait in the engine."""
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
        asked = asyncio.create_task(http.post("/v1/completions", json=body))
        await asyncio.to_thread(server.call, server.wait_until_open(num_open))
        while Scrape(server)("loraswarm_generated_tokens_total", adapter="tiny") < 2 * num_open:
            await asyncio.sleep(0.005)
        assert Scrape(server)("loraswarm_open_requests") == num_open
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await asyncio.to_thread(server.call, server.wait_until_idle())


def test_refused_bodies_count_as_http_errors_only(server: RunningServer) -> None:
    assert server.post("/v1/completions", {"model": "tiny"}).status_code == 400
    assert server.post("/v1/completions", {"model": "nope", "prompt": "x"}).status_code == 404
    assert server.post("/v1/load_lora_adapter", {}).status_code == 400
    assert server.http.get("/nothing").status_code == 404
    after = Scrape(server)
    assert after.outcomes() == (0, 0, 0)
    assert after("loraswarm_http_errors_total", status="400") == 2
    assert after("loraswarm_http_errors_total", status="404") == 2


def test_series_are_by_adapter_and_sums_of_adapters_are_one(server: RunningServer) -> None:
    for model in ("tiny", "sql", "sql", "team/router"):
        server.complete(model=model, max_tokens=2)
    mix = [{"name": "sql", "weight": 0.5}, {"name": "team/router", "weight": 0.5}]
    server.complete(adapters=mix, max_tokens=2)
    after = Scrape(server)
    names = ("tiny", "sql", "team/router", "_mixed", "_other")
    assert [after.outcomes(name)[0] for name in names] == [1, 2, 1, 1, 0]


def test_labels_are_bounded_and_the_sum_stays_whole() -> None:
    num_adapters = MAX_OWN_LABELS + 33
    names = [f"a{i:03}" for i in range(num_adapters)] + ["_other", "_mixed"]
    many = [AdapterSummary(name=name, path="/a") for name in names]
    with running_server(FakeEngine(TOKENIZER, served=many)) as server:
        for name in [*names[-2:], *names[:-2]]:
            server.complete(model=name, max_tokens=1)
        after = Scrape(server)
    labels = {row["adapter"] for row in after.labels_of("loraswarm_generated_tokens_total")}
    assert labels == {*names[:MAX_OWN_LABELS], "_other"}
    assert after.outcomes("_other") == (33 + 2, 0, 0)
    assert sum(after.outcomes(name)[0] for name in labels) == len(names)
    assert len(after.labels_of("loraswarm_adapter_generation")) == MAX_OWN_LABELS


def test_the_engine_s_counts_are_those_of_its_stats() -> None:
    with running_server(FakeEngine(TOKENIZER, counts=BUSY)) as server:
        now = Scrape(server)
    pages = {name: now("loraswarm_pool_pages", owner=name) for name in ("kv", "prefix", "free")}
    assert pages == {"kv": 3, "prefix": 2, "free": 1}
    assert now("loraswarm_pool_pages", owner="adapter") == 2
    tiers = ("device", "host", "store")
    assert [now("loraswarm_adapter_lookups_total", tier=t) for t in tiers] == [50, 20, 10]
    assert [now("loraswarm_resident_adapters", tier=t) for t in tiers[:2]] == [2, 7]
    what = ("device_adapter", "host_adapter", "prefix_page")
    assert [now("loraswarm_evictions_total", what=w) for w in what] == [6, 5, 9]
    assert now("loraswarm_adapter_loads_total", stage="read") == 12
    assert now("loraswarm_adapter_load_seconds_total", stage="read") == 1.5
    assert now("loraswarm_adapter_load_bytes_total", stage="read") == 4096
    assert now("loraswarm_adapter_load_failures_total") == 2
    assert now("loraswarm_host_cache_bytes") == 1330
    assert now("loraswarm_host_cache_limit_bytes") == 2048
    assert now("loraswarm_prefix_hit_tokens_total") == 133
    assert now("loraswarm_prefix_asked_tokens_total") == 1000
    assert now("loraswarm_preemptions_total") == 4
    assert now("loraswarm_requests_waiting") == 3
    assert now("loraswarm_engine_up") == 1


def test_what_is_merged_is_told_where_merging_is_on() -> None:
    counts = dataclasses.replace(BUSY, merging=dataclasses.replace(BUSY.merging, target=None))
    for engine_counts, shares in ((BUSY, [{"adapter": "sql"}]), (counts, []), (IDLE, [])):
        with running_server(FakeEngine(TOKENIZER, counts=engine_counts)) as server:
            now = Scrape(server)
        assert now.labels_of("loraswarm_merged_share") == shares
        is_on = engine_counts is not IDLE
        assert bool(now.labels_of("loraswarm_merged_bytes")) == is_on
        if is_on:
            assert now("loraswarm_merged_share", adapter="sql") == (0.25 if shares else 0.0)
            assert now("loraswarm_merged_linears") == 3
            assert now("loraswarm_merged_bytes") == 300
            assert now("loraswarm_merge_reserved_bytes") == 1200
            assert now("loraswarm_merge_switches_total") == 8


def test_adapters_show_tier_bytes_and_generation_once_they_were_asked_for() -> None:
    engine = FakeEngine(TOKENIZER)
    for name, num_bytes in (("sql", 100), ("team/router", 33)):
        engine.states[name] = dataclasses.replace(
            engine.states[name], tier="host", host_bytes=num_bytes, generation=3
        )
    with running_server(engine) as server:
        before = Scrape(server)
        assert before("loraswarm_adapter_bytes", adapter="_other", tier="host") == 133
        server.complete(model="sql", max_tokens=1)
        after = Scrape(server)
    assert after("loraswarm_adapter_generation", adapter="sql") == 3
    tiers = ("device", "host", "store")
    assert [after("loraswarm_adapter_tier", adapter="sql", tier=t) for t in tiers] == [0, 1, 0]
    assert after("loraswarm_adapter_bytes", adapter="sql", tier="host") == 100
    assert after("loraswarm_adapter_bytes", adapter="_other", tier="host") == 33
    states = ("served", "refused", "pending")
    assert [after("loraswarm_catalog_adapters", state=s) for s in states] == [2, 1, 0]


def lora_info(scrape: Scrape) -> tuple[dict[str, str], float]:
    (labels,) = scrape.labels_of("vllm:lora_requests_info")
    return labels, scrape("vllm:lora_requests_info", **labels)


def test_gateways_read_vllm_s_gauges() -> None:
    with running_server(FakeEngine(TOKENIZER, counts=BUSY)) as server:
        first, second = Scrape(server), Scrape(server)
    labels, time_s = lora_info(second)
    assert labels == {
        "max_lora": "8",
        "running_lora_adapters": "sql,team/router",
        "waiting_lora_adapters": "team/router",
    }
    assert time_s > lora_info(first)[1] > 1.7e9
    of = {"model_name": "tiny", "engine": "0"}
    assert second("vllm:num_requests_waiting", **of) == 3
    assert second("vllm:num_requests_running", **of) == 0
    assert second("vllm:kv_cache_usage_perc", **of) == (3 + 2 * 0.5) / 8


def test_idle_adapters_in_pages_are_ready_to_serve_until_they_are_gone() -> None:
    engine = FakeEngine(TOKENIZER)
    engine.states["sql"] = dataclasses.replace(engine.states["sql"], tier="device")
    with running_server(engine) as server:
        assert lora_info(Scrape(server))[0]["running_lora_adapters"] == "sql"
        del engine.adapters["sql"]
        assert lora_info(Scrape(server))[0]["running_lora_adapters"] == ""


@pytest.mark.parametrize(
    ("changes", "usage"),
    [
        ({}, 0.0),
        ({"num_kv_pages": 8}, 1.0),
        ({"num_prefix_pages": 8}, 0.0),
        ({"num_adapter_pages": 8, "num_resident_adapters": 4}, 0.0),
        (
            {"num_adapter_pages": 8, "num_resident_adapters": 4, "num_pinned_adapters": 1},
            0.25,
        ),
    ],
)
def test_usage_is_what_running_requests_hold(changes: dict[str, int], usage: float) -> None:
    info = FakeEngine(TOKENIZER).info
    assert pool_usage(info, dataclasses.replace(IDLE, **changes)) == usage


def test_a_dead_engine_leaves_the_server_s_own_series(server: RunningServer) -> None:
    server.complete(max_tokens=1)
    assert Scrape(server)("loraswarm_engine_up") == 1

    async def die_and_scrape() -> httpx.Response:
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
            await http.get("/metrics")
            await asyncio.to_thread(server.call, server.engine.die())
            return await http.get("/metrics")

    text = asyncio.run(die_and_scrape()).text
    assert "loraswarm_engine_up 0.0" in text
    assert 'loraswarm_requests_total{adapter="tiny",outcome="success"} 1.0' in text
    assert "vllm:num_requests_running" not in text


def test_an_engine_that_does_not_answer_does_not_hold_up_a_scrape(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never() -> EngineStats:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("loraswarm.server.scrape.ENGINE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(server.engine, "stats", never)
    assert Scrape(server)("loraswarm_engine_up") == 0


@pytest.mark.parametrize("counts", [IDLE, BUSY])
def test_both_formats_are_valid_and_the_client_chooses(counts: EngineStats) -> None:
    with running_server(FakeEngine(TOKENIZER, counts=counts)) as server:
        server.complete(model="sql", max_tokens=2)
        plain = server.http.get("/metrics")
        rich = server.http.get("/metrics", headers=OPEN_METRICS)
        again = server.http.get("/metrics")
    assert plain.headers["content-type"] == again.headers["content-type"]
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert rich.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert rich.text.endswith("# EOF\n")
    assert rich.text.count("# EOF") == 1
    assert "# EOF" not in again.text
    names = {family.name for family in open_families(rich.text)}
    assert {"loraswarm_requests", "vllm:lora_requests_info", "loraswarm_pool_pages"} <= names
    of_plain = [f.name for f in plain_families(plain.text) if not f.name.endswith("_created")]
    assert set(of_plain) == names


def test_metrics_need_no_key_and_touch_no_registry_of_the_process() -> None:
    with running_server(FakeEngine(TOKENIZER), api_key="secret") as server:
        assert server.post("/v1/completions", {}).status_code == 401
        assert Scrape(server)("loraswarm_http_errors_total", status="401") == 1
    with running_server(FakeEngine(TOKENIZER)) as other:
        assert Scrape(other)("loraswarm_http_errors_total", status="401") == 0
    assert not any(family.name.startswith("loraswarm") for family in REGISTRY.collect())


def test_large_pages_are_written_again_only_for_a_share_of_the_time(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraswarm.server.scrape.MAX_WRITING_SHARE", 1e-9)
    monkeypatch.setattr("loraswarm.server.scrape.STATES_AGE_S", 1e9)
    assert Scrape(server).outcomes() == (0, 0, 0)
    server.complete(max_tokens=1)
    later = Scrape(server)
    assert later.outcomes() == (0, 0, 0)
    assert server.engine.num_state_queries == 1
    first, second = Scrape(server), Scrape(server)
    assert lora_info(second)[1] > lora_info(first)[1]
    ended = 'outcome="success"} 1.0'
    assert ended in server.http.get("/metrics", headers=OPEN_METRICS).text
    assert ended not in server.http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ],
)
@pytest.mark.parametrize("num_cached", [None, 0, 5])
def test_usage_tells_the_cached_tokens(
    server: RunningServer,
    path: str,
    asked: dict[str, Any],
    stream: bool,
    num_cached: int | None,
) -> None:
    server.engine.num_cached_tokens = num_cached
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "n": 3, **asked}
    if stream:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body |= {"stream": True, "stream_options": options}
        lines = server.post(path, body).text.split("\n\n")
        usage = httpx.Response(200, content=lines[-3].removeprefix("data: ")).json()["usage"]
    else:
        usage = server.post(path, body).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": num_cached or 0}


def test_cached_tokens_are_the_sum_over_prompts_of_their_first_choice(
    server: RunningServer,
) -> None:
    server.engine.num_cached_tokens = 4
    usage = server.complete(prompt=["one", "two two", "three"], n=2, max_tokens=2)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 12
    assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


def watched(use: Callable[[Any], None]) -> RequestMetrics:
    metrics = RequestMetrics("tiny")
    request = Request(request_id="r", prompt_token_ids=(1, 2, 3), params=SamplingParams())
    with metrics.watch(request) as watch:
        use(watch)
    return metrics


def test_the_gap_before_several_tokens_is_shared_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter((10.0, 10.5, 10.75))
    monkeypatch.setattr("loraswarm.server.metrics.time.monotonic", lambda: next(times))

    def use(watch: Any) -> None:
        for ids in ((1,), (2, 3), (), (4,)):
            event = SequenceEvent(request_id="r", token_ids=ids)
            watch.saw(event, TextDelta(text="", token_ids=ids, num_tokens=0))

    registry = watched(use).registry
    name, labels = "loraswarm_inter_token_latency_seconds", {"adapter": "tiny"}
    assert registry.get_sample_value(f"{name}_count", labels) == 2
    assert registry.get_sample_value(f"{name}_sum", labels) == 0.5 / 2 + 0.25
    ended = {"adapter": "tiny", "outcome": "error"}
    assert registry.get_sample_value("loraswarm_requests_total", ended) == 1
