"""Comparing results: ratios of medians to the first file's, matched by concurrency."""

from __future__ import annotations

import re

import pytest

from bench_cases import point, record, result, steady_point
from loraswarm.bench.compare import compare, compare_results
from loraswarm.bench.report import write_json
from loraswarm.errors import ConfigError


def cells(text, label):
    """The cells of each row with this label."""
    lines = [line for line in text.splitlines() if line.startswith(label + "  ")]
    return [line.removeprefix(label).split() for line in lines]


@pytest.fixture
def files(tmp_path):
    """TTFT at 3 in flight: 0.4, 0.2 (the median of three) and 0.8 s."""
    runs = {
        "a": [steady_point(0.4), steady_point(0.9, concurrency=8)],
        "b": [steady_point(0.1), steady_point(0.2), steady_point(0.7)],
        "c": [steady_point(0.8), steady_point(0.9, concurrency=8)],
    }
    paths = []
    for name, points in runs.items():
        paths.append(tmp_path / f"{name}.json")
        write_json(result(*points, target=f"server {name}"), paths[-1])
    return paths


def test_ratios_are_of_medians_and_to_the_first_file(files):
    text = compare(files)
    at_three, at_eight = cells(text, "TTFT, ms p50")
    assert at_three == ["400", "200", "0.50", "x", "800", "2.00", "x"]
    assert at_eight == ["900", "-", "-", "900", "1.00", "x"]
    assert cells(compare([files[2], files[0]]), "TTFT, ms p50")[0] == ["800", "400", "0.50", "x"]


def test_counts_stand_beside_the_ratios_and_have_none(files):
    assert cells(compare(files), "requests")[0] == ["7", "21", "7"]
    assert cells(compare(files), "failed requests")[0] == ["0", "0", "0"]


def test_every_file_is_named_with_its_target(files):
    text = compare(files)
    for number, name in enumerate("abc", 1):
        assert re.search(rf"^\[{number}\] \S*{name}\.json: server {name}, 20", text, re.MULTILINE)


def test_a_concurrency_that_one_file_alone_has_is_left_out_and_said(files):
    text = compare(files[:2])
    assert "3 in flight" in text
    assert len(cells(text, "TTFT, ms p50")) == 1
    assert "in flight, not compared: 8" in text
    assert "not compared" not in compare([files[0], files[2]])


def test_files_without_a_common_concurrency_are_refused(tmp_path, files):
    write_json(result(steady_point(concurrency=None)), tmp_path / "open.json")
    with pytest.raises(ConfigError, match="no file has a concurrency of the first") as caught:
        compare([tmp_path / "open.json", files[1]])
    assert "open loop" in str(caught.value)


def test_open_loops_are_compared_with_each_other():
    runs = result(steady_point(0.4, concurrency=None)), result(steady_point(0.2, concurrency=None))
    text = compare_results([("a", runs[0]), ("b", runs[1])])
    assert cells(text, "open loop") == [["[1]", "[2]", "[2]/[1]"]]
    assert cells(text, "TTFT, ms p50") == [["400", "200", "0.50", "x"]]


def test_open_loops_of_other_arrivals_or_limits_are_not_compared():
    def run(first_s, concurrency, arrivals):
        return steady_point(first_s, concurrency) | {"arrivals": arrivals}

    first = result(run(0.4, None, "poisson:4"), run(0.4, 3, "poisson:4"), run(0.4, 3, "closed"))
    other = result(run(0.2, None, "poisson:8"), run(0.2, 3, "poisson:4"), run(0.2, 8, "closed"))
    text = compare_results([("a", first), ("b", other)])
    assert cells(text, "open loop, poisson:4, at most 3") == [["[1]", "[2]", "[2]/[1]"]]
    assert cells(text, "TTFT, ms p50") == [["400", "200", "0.50", "x"]]
    assert text.endswith("not compared: 3, 8, poisson:4, poisson:8")


def test_interrupted_runs_are_not_compared():
    cut = steady_point(0.9) | {"is_complete": False}
    text = compare_results(
        [("a", result(steady_point(0.4), cut)), ("b", result(steady_point(0.2)))]
    )
    assert cells(text, "TTFT, ms p50") == [["400", "200", "0.50", "x"]]
    assert "not compared: 3 (interrupted)" in text
    with pytest.raises(ConfigError, match=r"3 in flight \(interrupted\)"):
        compare_results([("a", result(cut)), ("b", result(cut))])


def test_answers_of_doubtful_length_are_counted_beside_the_ratios():
    doubtful = steady_point()
    doubtful["summary"] |= {"num_uncounted": 7, "num_other_length": 0}
    text = compare_results([("a", result(steady_point())), ("b", result(doubtful))])
    assert cells(text, "answers not counted") == [["0", "7"]]
    assert cells(text, "of other length") == []


def test_options_that_differ_are_said_and_where_they_were_sent_is_not():
    names = [f"a{number}" for number in range(9)]
    first = result(steady_point(), url="http://a", output_tokens="64", adapters=names)
    second = result(steady_point(), url="http://b", output_tokens="8", adapters=[*names[:-1], "x"])
    text = compare_results([("a", first), ("b", second)])
    assert "options differ: output_tokens: '64' | '8'" in text
    assert "options differ: adapters" in text  # although only a part that is not shown differs
    assert "seed" not in text
    assert "url" not in text
    assert "differ" not in compare_results([("a", first), ("b", first)])


def test_machines_that_differ_are_said():
    first, second = result(steady_point()), result(steady_point())
    second["environment"] |= {"cpu": "another", "commit": None}
    text = compare_results([("a", first), ("b", second)])
    assert "environment differ: cpu: " in text
    assert "| 'another'" in text


def test_there_is_no_ratio_to_nothing():
    failed = result(point([record(0, error="gone")]))
    text = compare_results([("a", failed), ("b", result(steady_point()))])
    assert cells(text, "output tokens/s")[0][::2] == ["0", "-"]
    assert cells(text, "TTFT, ms p50")[0][0] == "-"
    assert cells(text, "failed requests") == [["1", "0"]]


def test_other_files_and_too_few_are_refused(tmp_path, files):
    (tmp_path / "other.json").write_text('{"format": "aiperf"}')
    with pytest.raises(ConfigError, match=r"other\.json.*format is 'aiperf'"):
        compare([files[0], tmp_path / "other.json"])
    with pytest.raises(ConfigError, match="1 file given"):
        compare(files[:1])
