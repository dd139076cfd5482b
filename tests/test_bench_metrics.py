"""Metrics on timelines small enough for paper: every number below was worked out by hand."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest

from loraswarm.bench.goodput import Goodput, parse_goodput
from loraswarm.bench.metrics import BASE_ROW, Statistics, metrics_of, summarize
from loraswarm.bench.records import RequestRecord
from loraswarm.errors import ConfigError


def record(index: int, start_s: float, *response_s: float, **changes: object) -> RequestRecord:
    made = RequestRecord(
        index=index,
        adapter="a",
        num_prompt=10,
        max_tokens=8,
        start_s=start_s,
        response_s=response_s,
        num_output=len(response_s),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


# Three requests that overlap, and one that failed before and after everything else:
#   0: starts 1.0, responses 1.5 2.0 2.5       ttft 0.5, latency 1.5, itl 1.0/2 = 0.5
#   1: starts 1.5, responses 2.5 3.5, 5 tokens ttft 1.0, latency 2.0, itl 1.0/4 = 0.25
#   2: starts 2.0, response  5.0, 1 token      ttft 3.0, latency 3.0, no itl
#   duration 5.0 - 1.0 = 4.0; 3 + 5 + 1 = 9 tokens -> 2.25/s; 3 requests -> 0.75/s
TIMELINE = [
    record(0, 1.0, 1.5, 2.0, 2.5),
    record(1, 1.5, 2.5, 3.5, num_output=5, adapter=None, cached_tokens=4),
    record(2, 2.0, 5.0),
    record(3, 0.0, 0.1, 9.0, error="HTTP 500: no", adapter="b", num_output=7),
]


def test_metrics_of_a_request_are_those_of_the_definitions():
    metrics = metrics_of(TIMELINE[1])
    assert metrics is not None
    assert metrics.time_to_first_token_s == 1.0
    assert metrics.request_latency_s == 2.0
    assert metrics.inter_token_latency_s == 0.25
    assert metrics.output_tokens_per_s_per_user == 4.0
    assert metrics.num_output == 5


def test_answers_without_a_count_and_of_another_length_are_counted():
    records = [
        record(0, 1.0, 1.5, 2.0, max_tokens=2),
        record(1, 1.0, 1.5, max_tokens=2),
        record(2, 1.0, 1.5, max_tokens=2, is_counted=False, adapter="b"),
        record(3, 1.0, 1.5, max_tokens=2, error="gone", is_counted=False),
    ]
    summary = summarize(records)
    assert (summary.num_uncounted, summary.num_other_length) == (1, 1)
    assert summary.per_adapter["a"].num_uncounted == 0
    assert summary.per_adapter["b"].num_other_length == 0


def test_an_answer_of_one_token_has_no_inter_token_latency():
    metrics = metrics_of(TIMELINE[2])
    assert metrics is not None
    assert metrics.inter_token_latency_s is None
    assert metrics.output_tokens_per_s_per_user is None


def test_tokens_that_come_together_have_no_rate_per_user():
    metrics = metrics_of(record(0, 1.0, 2.0, num_output=3))
    assert metrics is not None
    assert metrics.inter_token_latency_s == 0.0
    assert metrics.output_tokens_per_s_per_user is None


def test_a_failed_request_has_no_metrics():
    assert metrics_of(TIMELINE[3]) is None


def test_a_run_is_summed_up_over_its_own_duration():
    summary = summarize(TIMELINE)
    assert summary.duration_s == 4.0
    assert summary.num_requests == 4
    assert summary.num_errors == 1
    assert summary.errors == {"HTTP 500: no": 1}
    assert summary.total_output_tokens == 9
    assert summary.total_prompt_tokens == 30
    assert summary.total_cached_tokens == 4
    assert summary.output_tokens_per_s == 2.25
    assert summary.requests_per_s == 0.75
    assert summary.goodput_per_s is None
    ttft, latency = summary.time_to_first_token_s, summary.request_latency_s
    assert ttft is not None
    assert (ttft.mean, ttft.min, ttft.max, ttft.p50, ttft.count) == (1.5, 0.5, 3.0, 1.0, 3)
    assert latency is not None
    assert latency.mean == pytest.approx(6.5 / 3)
    itl, users = summary.inter_token_latency_s, summary.output_tokens_per_s_per_user
    assert itl is not None
    assert (itl.mean, itl.count) == (0.375, 2)
    assert users is not None
    assert (users.mean, users.count) == (3.0, 2)


def test_each_adapter_has_a_row_whose_rates_add_up():
    summary = summarize(TIMELINE)
    rows = summary.per_adapter
    assert list(rows) == [BASE_ROW, "a", "b"]
    assert {name: row.num_requests for name, row in rows.items()} == {BASE_ROW: 1, "a": 2, "b": 1}
    assert {name: row.duration_s for name, row in rows.items()} == dict.fromkeys(rows, 4.0)
    assert rows["a"].output_tokens_per_s == 1.0
    assert rows[BASE_ROW].output_tokens_per_s == 1.25
    assert sum(row.output_tokens_per_s for row in rows.values()) == summary.output_tokens_per_s
    assert rows["b"].num_errors == 1
    assert rows["b"].time_to_first_token_s is None
    assert rows["a"].total_cached_tokens is None


def test_an_adapter_named_as_the_row_of_the_base_keeps_a_row_of_its_own():
    summary = summarize([record(0, 0.0, 1.0, adapter=None), record(1, 0.0, 1.0, adapter=BASE_ROW)])
    assert sorted(row.num_requests for row in summary.per_adapter.values()) == [1, 1]
    assert BASE_ROW in summary.per_adapter


def test_a_run_in_which_all_failed_has_errors_and_no_rates():
    summary = summarize([TIMELINE[3], replace(TIMELINE[3], error="cut")])
    assert summary.errors == {"HTTP 500: no": 1, "cut": 1}
    assert summary.duration_s == summary.output_tokens_per_s == summary.requests_per_s == 0.0
    assert summary.total_output_tokens == 0
    assert summary.request_latency_s is None


def test_an_empty_run_can_be_summed_up():
    assert summarize([]).num_requests == 0


def test_a_summary_is_plain_data():
    row = asdict(summarize(TIMELINE))["per_adapter"]["a"]
    assert row["time_to_first_token_s"]["count"] == 2


def test_statistics_are_of_the_population_and_interpolate():
    # 0 1 2 3: mean 1.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25; p90 lies at 0.9 * 3 = 2.7
    found = Statistics.of([3.0, 1.0, None, 0.0, 2.0])
    assert found is not None
    assert (found.mean, found.count) == (1.5, 4)
    assert found.std == pytest.approx(math.sqrt(1.25))
    assert (found.p50, found.min, found.max) == (1.5, 0.0, 3.0)
    assert (found.p90, found.p95, found.p99) == pytest.approx((2.7, 2.85, 2.97))
    assert Statistics.of([None]) is None


@pytest.mark.parametrize(
    ("limits", "num_good"),
    [
        ("ttft:1.0", 2),  # a limit may be reached
        ("ttft:0.99", 1),
        ("latency:2.5 ttft:0.7", 1),
        ("itl:0.5", 2),  # the answer of one token has no itl: not good
        ("latency:0.1", 0),
        ("latency:99", 3),  # the failed request is never good
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(limits, num_good):
    summary = summarize(TIMELINE, parse_goodput(limits))
    assert summary.goodput_per_s == num_good / 4.0


def test_goodput_is_read_from_text():
    assert parse_goodput("ttft:0.5  latency:5") == Goodput(
        time_to_first_token_s=0.5, request_latency_s=5.0
    )
    assert parse_goodput("itl:1e-2").inter_token_latency_s == 0.01


@pytest.mark.parametrize(
    "text", ["", " ", "ttft", "ttft:", "ttft:x", "ttft:0", "ttft:nan", "tpot:1", "itl:1 itl:2"]
)
def test_goodput_that_cannot_be_read_is_refused(text):
    with pytest.raises(ConfigError, match=r"goodput .*ttft:0\.5"):
        parse_goodput(text)
