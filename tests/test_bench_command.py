"""`loraswarm bench`: what is sent, what is written, exit codes."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import signal
import sys

import pytest

from bench_endpoint import TIMEOUT_S, answer, fake_server, options, prompts_of
from bench_server import stream_answer
from loraswarm.bench.report import read_result
from loraswarm.commands.bench import bench
from loraswarm.errors import ConfigError, LoRASwarmError, UnknownAdapter


@pytest.fixture
def server():
    with fake_server() as running:
        yield running


def test_adapters_get_the_requests_and_the_base_its_share(server, capsys):
    assert (
        bench(options(server, adapters="sql,pirate", base_share=3 / 7, popularity="identical")) == 0
    )
    models = [one.body["model"] for one in server.requests]
    assert sorted(models) == ["sql"] * 4 + ["tiny"] * 3
    shown = capsys.readouterr().out
    assert "requests in flight" in shown
    assert "(base)" in shown


def test_without_adapters_every_request_is_for_the_base(server):
    assert bench(options(server)) == 0
    assert [one.body["model"] for one in server.requests] == ["tiny"] * 7


def test_listed_adapters_are_those_with_a_parent(server):
    assert bench(options(server, adapters_from="/v1/models", popularity="distinct")) == 0
    assert {one.body["model"] for one in server.requests} == {"sql", "pirate"}


def test_lengths_and_sampling_are_as_asked(server):
    assert bench(options(server, prompt_tokens="133", vocab_size=50)) == 0
    for one in server.requests:
        assert len(one.body["prompt"]) == 133
        assert max(one.body["prompt"]) < 50
        assert one.body["max_tokens"] == 3
        assert one.body["ignore_eos"] is True


def test_a_sweep_with_repeats_is_one_point_each_with_its_own_prompts(server, tmp_path):
    file = tmp_path / "a.json"
    assert bench(options(server, concurrency="1,3", repeats=2, json=str(file), seed=5)) == 0
    found = read_result(file)
    assert [(one["concurrency"], one["seed"]) for one in found["points"]] == [
        (1, 5), (3, 6), (1, 7), (3, 8),
    ]  # fmt: skip
    assert len(set(prompts_of(server))) == 28
    assert all(one["summary"]["num_requests"] == 7 for one in found["points"])


def test_a_seed_repeats_the_workload_and_another_does_not():
    sent = []
    for seed in (1, 1, 2):
        with fake_server() as server:
            bench(options(server, adapters="sql,pirate", seed=seed, concurrency="1"))
            sent.append([(one.body["model"], *one.body["prompt"]) for one in server.requests])
    assert sent[0] == sent[1] != sent[2]


def test_warm_up_is_sent_first_with_other_prompts_and_not_counted(server, tmp_path):
    file = tmp_path / "a.json"
    assert bench(options(server, warmup=4, json=str(file))) == 0
    assert len(set(prompts_of(server))) == 11
    assert read_result(file)["points"][0]["summary"]["num_requests"] == 7


def test_the_warm_up_asks_for_every_model_of_the_run():
    names = [f"a{index:03}" for index in range(12)]
    listed = [{"id": "tiny", "parent": None}, *({"id": name, "parent": "tiny"} for name in names)]
    for warmup, expected in ((None, 12), (5, 5), (14, 12)):
        with fake_server(models=listed) as server:
            asked = options(server, adapters=",".join(names), popularity="round-robin")
            assert bench(dataclasses.replace(asked, requests=12, warmup=warmup)) == 0
            warm, run = server.requests[: warmup or 12], server.requests[warmup or 12 :]
            assert len(run) == 12
            assert len({one.body["model"] for one in warm}) == expected
            assert not set(prompts_of(server)[: len(warm)]) & set(prompts_of(server)[len(warm) :])


def test_a_trace_that_is_shorter_than_the_warm_up_is_run(server, tmp_path):
    trace = tmp_path / "t.csv"
    lines = [f"{0.01 * index},sql,7,3\n" for index in range(5)]
    trace.write_text("arrival_s,adapter,prompt_tokens,output_tokens\n" + "".join(lines))
    asked = options(
        server,
        adapters="sql",
        requests=5,
        warmup=None,
        popularity=f"trace:{trace}",
        arrivals=f"trace:{trace}",
        prompt_tokens=f"trace-prompt:{trace}",
        output_tokens=f"trace-output:{trace}",
    )
    assert bench(asked) == 0
    assert [one.body["model"] for one in server.requests] == ["sql"] * 13  # 8 to warm up
    assert {len(prompt) for prompt in prompts_of(server)} == {7}


def test_arrivals_make_an_open_loop_without_a_limit(server, tmp_path):
    file = tmp_path / "a.json"
    open_loop = options(server, arrivals="poisson:1000", concurrency=None, json=str(file))
    assert bench(open_loop) == 0
    (point,) = read_result(file)["points"]
    assert point["concurrency"] is None
    assert point["arrivals"] == "poisson:1000"
    assert point["is_complete"] is True


def test_progress_is_shown_on_a_terminal_only(server, monkeypatch, capsys):
    bench(options(server, warmup=2))
    assert capsys.readouterr().err == ""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bench(options(server, warmup=2, base_model="fails", allow_errors=True, adapters="sql"))
    assert "3 in flight, warm-up:" in screen.getvalue()
    assert "0/7" in screen.getvalue()


def test_the_result_says_what_was_asked_and_found_but_not_the_key(server, tmp_path):
    file = tmp_path / "a.json"
    assert bench(options(server, adapters_from="/v1/models", api_key="s3cret", json=str(file))) == 0
    assert server.requests[0].headers["authorization"] == "Bearer s3cret"
    found = read_result(file)
    assert found["options"]["adapters"] == ["sql", "pirate"]
    assert found["options"]["base_model"] == "tiny"
    assert found["options"]["prompt_tokens"] == "5"
    assert found["target"] == server.url
    assert "s3cret" not in file.read_text()
    assert "records" not in found["points"][0]


def test_records_csv_and_pictures_are_written_when_asked_for(server, tmp_path):
    names = {name: str(tmp_path / f"a.{name}") for name in ("json", "csv")}
    picture = tmp_path / "a.png"
    assert bench(options(server, records=True, plot=str(picture), **names)) == 0
    records = read_result(names["json"])["points"][0]["records"]
    assert [one["index"] for one in records] == list(range(7))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with open(names["csv"], newline="") as file:
        assert [one["row"] for one in csv.DictReader(file)] == ["all", "adapter"]


def test_goodput_is_counted_within_the_limits(server, tmp_path):
    rates = []
    for limit in ("latency:1000", "latency:1e-9"):
        bench(options(server, goodput=limit, json=str(tmp_path / "a.json")))
        rates.append(read_result(tmp_path / "a.json")["points"][0]["summary"])
    assert rates[0]["goodput_per_s"] == rates[0]["requests_per_s"] > 0
    assert rates[1]["goodput_per_s"] == 0


def test_a_failed_request_is_shown_and_makes_the_exit_code_1(server, capsys):
    failing = {"base_model": "tiny", "adapters": "sql,fails", "popularity": "round-robin"}
    assert bench(options(server, **failing)) == 1
    assert "3 x HTTP 404: no such model" in capsys.readouterr().out
    assert bench(options(server, **failing, allow_errors=True)) == 0
    assert "3 x HTTP 404: no such model" in capsys.readouterr().out


def test_if_every_request_failed_the_commonest_reason_is_said(server, capsys, tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(LoRASwarmError, match="every request failed, 7 with: HTTP 404: no such"):
        bench(options(server, base_model="fails", allow_errors=True, json=str(file)))
    assert "failed requests" in capsys.readouterr().out
    assert read_result(file)["points"][0]["summary"]["num_errors"] == 7


def test_an_adapter_that_is_not_listed_is_refused_before_anything_is_sent(server):
    with pytest.raises(UnknownAdapter, match="'nobody'; known: pirate, sql, tiny"):
        bench(options(server, adapters="sql,nobody"))
    assert not server.requests


def test_with_a_base_model_given_adapters_need_not_be_listed(server):
    assert bench(options(server, base_model="x", adapters="unlisted")) == 0
    assert {one.body["model"] for one in server.requests} == {"unlisted"}


@pytest.mark.parametrize(
    ("models", "others", "message"),
    [
        ([], {}, "lists 0 models without a parent"),
        ([{"id": "a"}, {"id": "b"}], {}, r"lists 2 models without a parent \(a, b\)"),
        ([{"id": "a"}], {"adapters_from": "/v1/models"}, "lists no adapters"),
    ],
)
def test_an_endpoint_that_does_not_tell_is_refused(models, others, message):
    with fake_server(models=models) as server, pytest.raises(ConfigError, match=message):
        bench(options(server, **others))


def test_an_interrupted_run_keeps_what_there_is(tmp_path, capsys):
    def interrupting(body, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
            return stream_answer([TIMEOUT_S])
        return answer(body, number)

    file = tmp_path / "a.json"
    with fake_server(interrupting) as server:
        asked = options(server, concurrency="1", repeats=3, json=str(file))
        assert bench(asked) == 130
    (only,) = read_result(file)["points"]
    assert only["is_complete"] is False
    assert only["summary"]["num_requests"] == 5
    assert only["summary"]["errors"] == {"interrupted": 1}
    shown = capsys.readouterr().out
    assert "1 x interrupted" in shown
    assert "1 (interrupted)" in shown
