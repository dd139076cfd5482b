"""The HTTP target against a server that knows what it sent when, and that misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from bench_server import (
    DONE,
    Answer,
    BenchServer,
    Body,
    Write,
    bench_server,
    event,
    json_answer,
    stream_answer,
    text_chunk,
    usage_chunk,
)
from loraswarm.bench.http_target import HttpTarget, ListedModel, list_models
from loraswarm.bench.metrics import metrics_of, summarize
from loraswarm.bench.records import PlannedRequest, RequestRecord
from loraswarm.bench.runner import run
from loraswarm.bench.sse import EventReader, error_line
from loraswarm.errors import ConfigError

END = text_chunk("", "length")


def planned(count: int = 1, adapter: str | None = None) -> list[PlannedRequest]:
    return [
        PlannedRequest(index=index, adapter=adapter, prompt_token_ids=(5, 6, 7), max_tokens=4)
        for index in range(count)
    ]


def drive(
    answer: Answer | Callable[[Body, int], Answer],
    requests: list[PlannedRequest] | None = None,
    concurrency: int = 1,
    **options: Any,
) -> tuple[list[RequestRecord], BenchServer]:
    """Send requests to a server that answers so; the records, and what the server saw."""
    make = answer if callable(answer) else lambda body, number: answer

    async def work() -> tuple[list[RequestRecord], BenchServer]:
        async with bench_server(make) as server:
            target = HttpTarget(server.url, "base", **{"timeout_s": 20.0, **options})
            try:
                requests_ = planned() if requests is None else requests
                return await run(target, requests_, concurrency=concurrency), server
            finally:
                await target.close()

    return asyncio.run(work())


def send_one(answer: Answer, **options: Any) -> RequestRecord:
    (record,), _ = drive(answer, **options)
    return record


def stream(*data: bytes, **options: Any) -> Answer:
    return Answer([Write(one) for one in data], **options)


def test_a_request_says_what_is_measured():
    _, server = drive(stream_answer([0.0]), [*planned(adapter="one")], api_key="secret")
    (received,) = server.requests
    assert received.path == "/v1/completions"
    assert received.headers["authorization"] == "Bearer secret"
    assert "accept-encoding" not in received.headers  # nothing is compressed
    assert received.body == {
        "model": "one",
        "prompt": [5, 6, 7],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_request_without_an_adapter_names_the_base():
    _, server = drive(stream_answer([0.0]), extra_body={"temperature": 1, "lora": []})
    assert server.requests[0].body["model"] == "base"
    assert server.requests[0].body["temperature"] == 1
    assert server.requests[0].body["lora"] == []


def test_a_body_may_be_made_in_another_way():
    def body_of(request: PlannedRequest) -> Body:
        return {"index": request.index, "stream": True}

    chunk = event({"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]})
    records, server = drive(stream(chunk), body_of=body_of, path="/v1/chat/completions")
    assert server.requests[0].path == "/v1/chat/completions"
    assert server.requests[0].body == {"index": 0, "stream": True}
    assert records[0].error is None
    assert records[0].num_output == 1


def test_responses_are_timed_between_the_write_that_caused_them_and_the_next():
    async def work() -> tuple[RequestRecord, list[float], float]:
        async with bench_server(lambda body, number: stream_answer([0.03] + [0.02] * 3)) as server:
            target = HttpTarget(server.url, "base")
            try:
                record = await target.send(planned()[0], asyncio.get_running_loop().time)
            finally:
                await target.close()
            return record, server.requests[0].sent_s, server.requests[0].arrived_s

    record, sent_s, arrived_s = asyncio.run(work())
    assert record.error is None
    assert len(record.response_s) == 4
    assert len(sent_s) == 5  # the last has counts only
    assert record.start_s <= arrived_s
    for index, seen_s in enumerate(record.response_s):
        assert sent_s[index] <= seen_s
    for seen_s, next_s in zip(record.response_s[:-1], sent_s[1:4], strict=True):
        assert seen_s <= next_s
    metrics = metrics_of(record)
    assert metrics is not None
    assert metrics.time_to_first_token_s >= 0.029
    assert metrics.request_latency_s >= 0.089


def test_several_events_in_one_write_have_the_time_of_the_write():
    record = send_one(stream(text_chunk("a") + text_chunk("b") + text_chunk("c"), END + DONE))
    assert record.error is None
    assert len(record.response_s) == 3
    assert len(set(record.response_s)) == 1
    assert record.num_output == 3


def test_the_servers_counts_are_believed():
    record = send_one(stream(text_chunk("a b c"), END, usage_chunk(9, 5, num_cached=4), DONE))
    assert record.error is None
    assert (record.num_prompt, record.num_output, record.cached_tokens) == (9, 5, 4)
    assert len(record.response_s) == 1  # the counts and the empty end are no responses


def test_without_counts_parts_with_text_are_counted():
    record = send_one(stream(text_chunk("a"), text_chunk(""), text_chunk("b"), END, DONE))
    assert (record.num_prompt, record.num_output, record.cached_tokens) == (3, 2, None)
    assert not record.is_counted
    assert send_one(stream_answer([0.0])).is_counted


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"data: ", b"data:"),
        lambda data: b": a comment\n\nid: 7\nevent: message\n" + data,
        lambda data: data.replace(DONE, b""),
        lambda data: data.removesuffix(b"\n\n"),
        lambda data: data.replace(b'"choices": []', b'"choices": null, "error": null'),
    ],
)
def test_every_way_to_write_a_stream_is_read(rewrite):
    whole = rewrite(text_chunk("a") + text_chunk("b", "stop") + usage_chunk(7, 2) + DONE)
    for size in (1, 3, 7, 133, len(whole)):
        pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
        record = send_one(stream(*pieces))
        assert record.error is None
        assert (record.num_prompt, record.num_output, len(record.response_s)) == (7, 2, 2)


def test_an_event_may_span_lines():
    reader = EventReader()
    assert reader.feed(b'data: {"a":\ndata: 1}\n') == []
    assert reader.feed(b"\ndata: x") == [b'{"a":\n1}']
    assert reader.feed(b"") == [b"x"]


REFUSAL = {"error": {"message": "no model\nis named x", "type": "not_found_error"}}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (json_answer(REFUSAL, 404), "HTTP 404: no model is named x"),
        (json_answer({"object": "error", "message": "too long"}, 400), "HTTP 400: too long"),
        (json_answer({"detail": [{"msg": "x"}]}, 422), 'HTTP 422: [{"msg":"x"}]'),
        (Answer([Write(b"<h1>\xff bad</h1>")], 502, "text/html"), "HTTP 502: <h1>\ufffd bad</h1>"),
        (Answer(status=500), "HTTP 500: Error"),
        (Answer(status=307), "HTTP 307: Temporary Redirect"),
        (json_answer(REFUSAL), "answered with application/json, not a stream: no model is named x"),
        (stream(event(REFUSAL)), "error event: no model is named x"),
        (stream(b'error: {"code": 500, "message": "full"}\n\n'), "error event: full"),
        (stream(event({"error": "plain"})), "error event: plain"),
        (stream(b"data: {no json\n\n"), "an event cannot be read: "),
        (stream(event({"choices": "x"})), "an event cannot be read: "),
        (stream(), "the stream closed before the answer ended"),
        (stream(text_chunk("a")), "the stream closed before the answer ended"),
        (stream(END, DONE), "the answer has no text"),
        (stream(text_chunk("a"), then="cut"), "connection failed: "),
        (stream(text_chunk("a"), then="reset"), "connection failed: "),
    ],
)
def test_what_goes_wrong_becomes_one_line_and_the_next_request_is_sent(answer, error):
    def make(body: Body, number: int) -> Answer:
        return stream_answer([0.0]) if number == 1 else answer

    (failed, good, again), _ = drive(make, planned(3))
    for record in (failed, again):
        assert record.error is not None
        assert record.error.startswith(error)
        assert "\n" not in record.error
    assert good.error is None
    assert summarize([failed, good, again]).num_errors == 2


def test_a_failed_request_keeps_what_it_got():
    record = send_one(stream(text_chunk("a"), text_chunk("b"), then="hang"), timeout_s=0.3)
    assert record.error == "not answered within 0.3 s"
    assert len(record.response_s) == record.num_output == 2


def test_a_server_that_is_not_there_is_an_error_of_the_request():
    async def work() -> RequestRecord:
        async with bench_server(lambda body, number: stream()) as server:
            url = server.url
        target = HttpTarget(url, "base")
        try:
            (record,) = await run(target, planned(), concurrency=1)
            return record
        finally:
            await target.close()

    record = asyncio.run(work())
    assert record.error is not None
    assert record.error.startswith("connection failed: ")
    assert record.response_s == ()


def test_long_errors_are_cut():
    body = json.dumps({"error": {"message": "x" * 1000}}).encode()
    assert error_line(body) == "x" * 300 + "..."


@pytest.mark.parametrize(("keeps_alive", "num_connections"), [(True, 1), (False, 3)])
def test_connections_are_kept_as_told(keeps_alive, num_connections):
    records, server = drive(stream_answer([0.0, 0.0]), planned(3), keeps_alive=keeps_alive)
    assert [record.error for record in records] == [None] * 3
    assert server.num_connections == num_connections


def test_as_many_requests_are_open_as_the_concurrency_says():
    def make(body: Body, number: int) -> Answer:
        return stream_answer([0.01, 0.001 * (number % 3)])

    records, server = drive(make, planned(133), concurrency=7)
    assert [record.error for record in records] == [None] * 133
    assert server.max_open == 7
    assert summarize(records).total_output_tokens == 266


MODELS = {
    "object": "list",
    "data": [{"id": "m", "parent": None, "created": 1}, {"id": "a", "parent": "m"}, {"id": "b"}],
}


def ask_models(answer: Answer, suffix: str = "") -> list[ListedModel]:
    async def work() -> list[ListedModel]:
        async with bench_server(lambda body, number: stream(), answer) as server:
            return await list_models(server.url + suffix)

    return asyncio.run(work())


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_models_are_listed_with_their_parents(suffix):
    found = ask_models(json_answer(MODELS), suffix)
    assert found == [ListedModel("m"), ListedModel("a", "m"), ListedModel("b")]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (json_answer(REFUSAL, 401), "HTTP 401: no model is named x"),
        (json_answer({"data": 3}), "did not answer with a list of models"),
        (Answer([Write(b"hello")]), "did not answer with a list of models"),
        (stream(b"x", then="reset"), "cannot be asked"),
    ],
)
def test_a_list_of_models_that_cannot_be_had_is_refused(answer, message):
    with pytest.raises(ConfigError, match=message):
        ask_models(answer)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "localhost:8000",
            "ftp://x",
            "http://",
            "http://[::1",
            "http://x:99999",
            "http://x:y",
        ),
        *(
            "http://:80",
            "http://x y",
            "http://x\ny",
            "http://x/?a=b",
            "http://x#a",
            "http://\udcff",
        ),
    ],
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="write http://HOST:PORT"):
        HttpTarget(url, "base")
