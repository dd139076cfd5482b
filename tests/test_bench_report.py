"""Results of the benchmark: written and read back unchanged, refused if spoilt, shown in full."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from bench_cases import point, record, result, steady_point
from loraswarm.bench.environment import cpu_name, environment, source_tree
from loraswarm.bench.figures import FIRST_TOKEN, RATES, shown
from loraswarm.bench.report import read_result, without_records, write_csv, write_json
from loraswarm.bench.table import MAX_ADAPTERS, table
from loraswarm.errors import ConfigError


def row_of(text, label):
    """The cells of a table's row."""
    lines = [line for line in text.splitlines() if line.startswith(label + "  ")]
    assert len(lines) == 1, text
    return lines[0].removeprefix(label).split()


def test_a_result_is_read_as_it_was_written(tmp_path):
    written = result(steady_point(), steady_point(concurrency=None), url="http://x", adapters=["a"])
    write_json(written, tmp_path / "a.json")
    found = read_result(tmp_path / "a.json")
    assert found == json.loads(json.dumps(written))
    assert found["format"] == "loraswarm-bench"
    assert found["format_version"] == 1
    assert [one["concurrency"] for one in found["points"]] == [3, None]
    assert len(found["points"][0]["records"]) == 7


def test_records_are_left_out_of_a_copy():
    whole = result(steady_point())
    short = without_records(whole)
    assert "records" not in short["points"][0]
    assert len(whole["points"][0]["records"]) == 7
    assert short["points"][0]["summary"] == whole["points"][0]["summary"]


def spoilt(path, value):
    """A result's JSON with one part replaced; `...` removes it."""
    whole = json.loads(json.dumps(result(steady_point())))
    place = whole
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(whole)


SUMMARY = ("points", 0, "summary")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[1]", "the document is [1], not an object"),
        ("{}", "format is None, not 'loraswarm-bench'"),
        ("[" * 100_000, "recursion"),
        (spoilt(("format",), "genai-perf"), "format is 'genai-perf'"),
        (spoilt(("format_version",), 2), "format_version is 2; this reads 1"),
        (spoilt(("target",), None), "target is None"),
        (spoilt(("options",), []), "options is []"),
        (spoilt(("points",), []), "points is empty"),
        (spoilt(("points", 0, "concurrency"), ...), "points[0].concurrency"),
        (spoilt(("points", 0, "concurrency"), 0), "points[0].concurrency"),
        (spoilt(("points", 0, "concurrency"), True), "points[0].concurrency is True"),
        (spoilt(("points", 0, "arrivals"), 4), "points[0].arrivals is 4"),
        (spoilt(("points", 0, "is_complete"), 1), "points[0].is_complete is 1"),
        (
            spoilt(("points", 0), {"concurrency": None, "arrivals": "closed"}),
            "points[0].concurrency is None, but arrivals is 'closed'",
        ),
        (spoilt((*SUMMARY, "num_uncounted"), "x"), "num_uncounted is 'x'"),
        (spoilt((*SUMMARY, "requests_per_s"), ...), "summary.requests_per_s is missing"),
        (spoilt((*SUMMARY, "requests_per_s"), "7"), "summary.requests_per_s is '7'"),
        (spoilt((*SUMMARY, "requests_per_s"), float("nan")), "NaN"),
        (spoilt((*SUMMARY, "requests_per_s"), 10**30), "out of range"),
        (spoilt((*SUMMARY, "num_errors"), -1), "num_errors is -1"),
        (spoilt((*SUMMARY, "num_errors"), 0.5), "num_errors is 0.5, not a count"),
        (spoilt((*SUMMARY, "errors"), {"x": "y"}), "errors['x'] is 'y'"),
        (spoilt((*SUMMARY, "request_latency_s", "p99"), ...), "request_latency_s.p99"),
        (spoilt((*SUMMARY, "per_adapter", "sql"), {}), "per_adapter['sql'].num_requests"),
        (spoilt(("points", 0, "records", 2, "start_s"), None), "records[2].start_s"),
        (spoilt(("points", 0, "records", 2, "response_s"), []), "records[2] has no error"),
        (spoilt(("points", 0, "records", 2, "response_s"), [None]), "response_s[0]"),
        (spoilt(("points", 0, "records", 2, "error"), 7), "records[2].error is 7"),
    ],
)
def test_what_is_no_result_is_refused_with_the_part_that_is_wrong(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_result(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_result(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is no text"):
        read_result(tmp_path / "b.json")


def test_a_csv_file_has_a_line_for_each_run_and_adapter_with_machine_and_options(tmp_path):
    write_csv(result(steady_point(), seed=9, adapters=["sql", "pirate"]), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(one["row"], one["adapter"]) for one in rows] == [
        ("all", ""),
        ("adapter", "(base)"),
        ("adapter", "pirate"),
        ("adapter", "sql"),
    ]
    assert [one["num_requests"] for one in rows] == ["7", "2", "2", "3"]
    # Seven requests of 5 tokens within 6.9 s; the first token after 0.5 s.
    assert float(rows[0]["output_tokens_per_s"]) == pytest.approx(35 / 6.9)
    assert float(rows[0]["time_to_first_token_s.p50"]) == pytest.approx(0.5)
    assert rows[0]["goodput_per_s"] == ""
    for one in rows:
        assert one["options.seed"] == "9"
        assert json.loads(one["options.adapters"]) == ["sql", "pirate"]
        assert one["environment.python"] == environment()["python"]


def test_a_table_shows_medians_over_repeats_and_a_column_for_each_concurrency():
    repeats = [steady_point(first_s) for first_s in (0.2, 0.9, 0.3)]
    text = table(result(*repeats, steady_point(0.5, concurrency=133)))
    assert row_of(text, "requests in flight") == ["3", "133"]
    assert row_of(text, "runs (medians below)") == ["3", "1"]
    assert row_of(text, "requests") == ["21", "7"]
    assert row_of(text, "TTFT, ms p50") == ["300", "500"]
    assert row_of(text, "ITL, ms p50") == ["100", "100"]
    assert row_of(text, "output tokens/s") == [shown(35 / 6.7), shown(35 / 6.9)]
    assert "good requests/s" not in text
    assert "runs" not in table(result(steady_point()))


def test_a_table_shows_each_adapter_at_the_last_concurrency():
    text = table(result(steady_point(0.9, concurrency=1), steady_point(0.2, concurrency=3)))
    assert "3 in flight, by adapter" in text
    assert row_of(text, "sql")[:2] == ["3", "0"]
    assert "200" in row_of(text, "(base)")
    assert "900" not in row_of(text, "(base)")


def test_an_interrupted_run_stands_by_itself_and_is_in_no_median():
    cut = steady_point(0.9) | {"is_complete": False}
    text = table(result(steady_point(0.2), steady_point(0.3), steady_point(0.7), cut))
    assert row_of(text, "requests in flight") == ["3", "3", "(interrupted)"]
    assert row_of(text, "TTFT, ms p50") == ["300", "900"]
    assert "INTERRUPTED" in text
    assert "3 in flight, by adapter" in text
    assert row_of(table(result(cut)), "TTFT, ms p50") == ["900"]
    assert "INTERRUPTED" not in table(result(steady_point()))


def test_an_open_loop_is_shown_with_its_arrivals_and_limit():
    bounded = steady_point(0.9) | {"arrivals": "poisson:4"}
    text = table(result(steady_point(0.2), bounded))
    assert row_of(text, "requests in flight") == ["3", "poisson:4,", "at", "most", "3"]
    assert row_of(text, "TTFT, ms p50") == ["200", "900"]
    assert "open loop, poisson:4, at most 3, by adapter" in text


def test_answers_whose_tokens_are_in_doubt_are_in_the_table():
    records = [replace(record(index), is_counted=index != 1) for index in range(4)]
    records[2] = replace(records[2], num_output=3)
    text = table(result(point(records), point(records)))
    assert "NOT COUNTED: 2 answers" in text
    assert "OTHER LENGTH: 2 answers" in text
    assert "NOT COUNTED" not in table(result(steady_point()))
    assert "OTHER LENGTH" not in table(result(steady_point()))


def test_a_table_of_more_adapters_than_fit_says_how_many_are_missing():
    run = steady_point()
    rows = run["summary"]["per_adapter"]
    rows |= {f"a{number:03}": rows["sql"] for number in range(MAX_ADAPTERS)}
    text = table(result(run))
    assert "... and 3 more with fewer requests" in text
    assert "a019" in text
    assert "pirate" not in text  # two requests, the others three


def test_a_failure_in_one_of_three_runs_is_in_the_table():
    records = [record(0), record(1, error="HTTP 500: no"), record(2), record(3, error="gone")]
    failing = point([*records, record(4, error="gone")])
    text = table(result(steady_point(), failing, steady_point()))
    assert row_of(text, "failed requests") == ["3"]
    assert "FAILED: 3 requests" in text
    assert text.index("2 x gone") < text.index("1 x HTTP 500: no")
    assert "FAILED" not in table(result(steady_point()))


def test_a_run_in_which_everything_failed_has_no_latencies():
    text = table(result(point([record(0, error="gone")])))
    assert row_of(text, "failed requests") == ["1"]
    assert row_of(text, "output tokens/s") == ["0"]
    assert "TTFT" not in text


def test_what_servers_say_cannot_reach_the_terminal():
    text = table(result(point([record(0, error="\x1b[2J\x07")]), target="http://\x1b[31m"))
    assert "\x1b" not in text
    assert r"1 x \x1b[2J\x07" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.12345, "0.123"),
        (1.2345, "1.23"),
        (12.345, "12.3"),
        (1e4, "10,000"),
    ],
)
def test_numbers_are_shown_with_digits_that_mean_something(value, text):
    assert shown(value) == text


def test_a_median_is_of_the_runs_that_have_the_number():
    whole, failed = steady_point()["summary"], point([record(0, error="gone")])["summary"]
    assert FIRST_TOKEN[0].median_of([failed, whole]) == pytest.approx(500)
    assert FIRST_TOKEN[0].median_of([failed]) is None
    assert RATES[0].median_of([]) is None


def test_the_environment_is_known_without_torch():
    code = (
        "import sys; from loraswarm.bench.environment import environment; found = environment();"
        "assert not {'torch', 'numpy'} & sys.modules.keys(); assert found['torch'][0].isdigit();"
        "assert found['memory_bytes'] > 1e8 and found['num_usable_cpus'] >= 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_cpu_is_named_as_the_system_names_it(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: other\n")
    assert cpu_name(file) == "Some CPU @ 3 GHz"
    assert cpu_name(tmp_path / "none") != "Some CPU @ 3 GHz"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_tree_that_tracks_the_package(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def git(*arguments):
        name = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *name, *arguments], check=True, capture_output=True)

    unknown = {"commit": None, "has_local_changes": None}
    assert source_tree(package) == unknown  # no repository
    git("init")
    git("commit", "--allow-empty", "-m", "of another project")
    assert source_tree(package) == unknown  # one that does not have the package
    git("add", "package")
    git("commit", "-m", "package")
    clean = source_tree(package)
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"])
    assert clean["has_local_changes"] is False
    (package / "__init__.py").write_text("changed = True")
    assert source_tree(package) == {**clean, "has_local_changes": True}
