"""Trace files: what is read from CSV and JSON lines, and what is refused by line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from loraswarm.bench.traces import read_adapters, read_arrivals_s, read_tokens
from loraswarm.errors import ConfigError

CSV = """\
arrival_s, adapter, prompt_tokens, output_tokens
1.5, sql, 133, 7
1.5, , 1, 3
4, "a,b", 9, 1
"""
JSONL = """\
{"arrival_s": 1.5, "adapter": "sql", "prompt_tokens": 133, "output_tokens": 7}
{"arrival_s": 1.5, "adapter": null, "prompt_tokens": 1, "output_tokens": 3}

{"output_tokens": 1, "arrival_s": 4, "adapter": "a,b", "prompt_tokens": 9}
"""


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "text"), [("t.csv", CSV), ("t.jsonl", JSONL)])
def test_both_formats_give_the_same_columns(tmp_path, name, text):
    path = write(tmp_path, name, text)
    assert read_arrivals_s(path).values == (0.0, 0.0, 2.5)
    assert read_adapters(path).values == ("sql", None, "a,b")
    assert read_tokens(path, "prompt_tokens").values == (133, 1, 9)
    assert read_tokens(path, "output_tokens").values == (7, 3, 1)


def test_a_trace_may_have_one_column_only_and_lacks_the_others(tmp_path):
    path = write(tmp_path, "t.jsonl", '{"adapter": "sql"}\n')
    assert read_adapters(path).values == ("sql",)
    with pytest.raises(ConfigError, match="has no 'arrival_s'; it has adapter"):
        read_arrivals_s(path)


RECORDED = """\
{"num_requests": 3, "num_adapters": 2}
[["sql", 16, 488], ["a,b", 8, 73]]
[1.5, 0, 19, 133, 7]
[1.5, 0, 20, 1, 3]
[4, 1, 19, 9, 1]
"""


def test_what_the_trace_generator_writes_is_read(tmp_path):
    path = write(tmp_path, "t.jsonl", RECORDED)
    assert read_arrivals_s(path).values == (0.0, 0.0, 2.5)
    assert read_adapters(path).values == ("sql", "sql", "a,b")
    assert read_tokens(path, "prompt_tokens").values == (133, 1, 9)
    assert read_tokens(path, "output_tokens").values == (7, 3, 1)


def test_the_recorded_trace_of_the_benchmarks_is_read():
    path = Path(__file__).parent.parent / "benchmarks" / "traces" / "zipf-drift.jsonl.gz"
    adapters = read_adapters(path).values
    assert len(adapters) == 9000
    assert adapters[:2] == ("a0019", "a1925")


@pytest.mark.parametrize(("name", "text"), [("t.csv.gz", CSV), ("t.jsonl.gz", JSONL)])
def test_gzipped_traces_are_read(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    assert read_adapters(path).values == ("sql", None, "a,b")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_adapters(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_adapters(path)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("t.csv", "TIMESTAMP\n2023-11-16 18:15\n", "line 2: 'TIMESTAMP' is not known; columns are"),
        ("t.gz", "adapter\nsql\n", "must be a file of"),
        ("t.jsonl", '{"num_adapters": 1}\n[]\n', "line 2: not a list of adapters"),
        ("t.jsonl", '{"num_adapters": 1}\n[["a"], []]\n', "line 2: not a list of adapters"),
        ("t.jsonl", '{"num_adapters": 1}\n[["a"]]\n[1, 0]\n', "line 3: not an array of"),
        ("t.jsonl", '{"num_adapters": 1}\n[["a"]]\n[1, 1, 0, 1, 1]\n', "line 3: 1 is no index"),
        ("t.jsonl", '{"num_adapters": 1}\n[["a"]]\n[1, 0, 0, 0, 1]\n', "line 3: prompt_tokens is"),
        ("t.jsonl", '{"adapter": "a"}\n[["a"]]\n', "line 2: not a JSON object"),
        ("t.txt", "adapter\nsql\n", r"must be a file of \.csv or \.jsonl"),
        ("t.csv", "", "has no requests"),
        ("t.csv", "adapter\n", "has no requests"),
        ("t.jsonl", "\n\n", "has no requests"),
        ("t.csv", "adapter,session\nsql,3\n", "line 2: 'session' is not known"),
        ("t.csv", "adapter,adapter\nsql,sql\n", "line 2: a column comes twice"),
        ("t.csv", "adapter\nsql\nsql,3\n", "line 3: 2 fields, the header has 1"),
        ("t.csv", "arrival_s\n1\nsoon\n", "line 3: arrival_s is 'soon', not a number"),
        ("t.csv", "arrival_s\n1\nnan\n", "line 3: arrival_s is nan"),
        ("t.csv", "arrival_s\n1\ninf\n", "line 3: arrival_s is inf"),
        ("t.csv", "arrival_s\n2\n1\n", "line 3: arrival_s is 1.0, before the 2.0 above it"),
        ("t.csv", "prompt_tokens\n3.5\n", "line 2: prompt_tokens is '3.5', not a number"),
        ("t.csv", "prompt_tokens\n0\n", "line 2: prompt_tokens is 0"),
        ("t.csv", 'adapter\n"sql\n', "cannot be read"),
        ("t.jsonl", "{}\n", "has no requests"),
        ("t.jsonl", "{\n", "line 1: not JSON"),
        ("t.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
        ("t.jsonl", '[["adapter", "sql"]]\n', "line 1: not a JSON object"),
        ("t.jsonl", '{"adapter": "a", "adapter": "b"}\n', "line 1: a column comes twice"),
        ("t.jsonl", '{"adapter": ""}\n', "line 1: adapter is ''"),
        ("t.jsonl", '{"adapter": 3}\n', "line 1: adapter is 3"),
        ("t.jsonl", '{"arrival_s": true}\n', "line 1: arrival_s is True"),
        ("t.jsonl", '{"arrival_s": NaN}\n', "line 1: arrival_s is nan"),
        ("t.jsonl", '{"arrival_s": 1%s}\n' % ("0" * 400), "line 1: arrival_s is 1"),
        ("t.jsonl", '{"output_tokens": true}\n', "line 1: output_tokens is True"),
        ("t.jsonl", '{"output_tokens": 3.0}\n', "line 1: output_tokens is 3.0"),
        (
            "t.jsonl",
            '{"adapter": "a"}\n{"arrival_s": 1}\n',
            "line 2: has arrival_s, others adapter",
        ),
        ("t.jsonl", '{"arrival_s": 1}\n{}\n', "line 2: has none, others arrival_s"),
    ],
)
def test_a_bad_trace_is_refused_by_name_and_line(tmp_path, name, text, problem):
    path = write(tmp_path, name, text)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_adapters(path)
    assert str(caught.value).startswith(f"trace {path}")


def test_a_trace_that_is_missing_or_not_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_adapters(tmp_path / "none.csv")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"adapter": "\xff"}\n')
    with pytest.raises(ConfigError, match="cannot be read"):
        read_adapters(tmp_path / "bytes.jsonl")
