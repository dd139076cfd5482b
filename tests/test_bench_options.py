"""`loraswarm bench`: options on the command line, refusals in one line, what is imported."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench_cases import result, steady_point
from bench_endpoint import fake_server, options
from command_line import error_line, run_here, run_process
from loraswarm.bench.report import read_result, write_json
from loraswarm.commands import bench as command
from loraswarm.commands.bench import bench, compare
from loraswarm.commands.bench_app import calibrate
from loraswarm.commands.bench_options import BenchOptions
from loraswarm.errors import ConfigError


@pytest.fixture
def server():
    with fake_server() as running:
        yield running


URL = {"url": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({}, "give either --url of an endpoint or --offline MODEL"),
        ({**URL, "offline": "m"}, "give either --url"),
        ({**URL, "dtype": "float32"}, "--dtype needs --offline"),
        ({**URL, "adapters_dir": ["d"]}, "--adapters-dir needs --offline"),
        ({"offline": "m", "api_key": "k"}, "--api-key needs --url"),
        ({"offline": "m", "adapters_from": "/v1/models"}, "--adapters-from needs --url"),
        ({**URL, "adapters": "a", "adapters_from": "/v1/models"}, "either --adapters or"),
        ({**URL, "adapters_from": "/models"}, "--adapters-from is '/models'"),
        ({**URL, "adapters": "a,,b"}, "--adapters is 'a,,b'"),
        ({**URL, "concurrency": "1,x"}, "--concurrency is '1,x'"),
        ({**URL, "concurrency": "0"}, "--concurrency is '0'"),
        ({**URL, "concurrency": "8,8"}, "--concurrency is '8,8'"),
        ({**URL, "repeats": 0}, "--repeats is 0"),
        ({**URL, "warmup": -1}, "--warmup is -1"),
        ({**URL, "timeout": float("nan")}, "--timeout is nan"),
        ({**URL, "timeout": float("inf")}, "--timeout is inf"),
        ({**URL, "api_key": "s3cret\nX-Other: 1"}, "--api-key has a line break"),
        ({"url": "http://[::1"}, "'http://[::1' is no URL"),
        ({"url": "http://me:s3cret@[::1"}, "--url holds a password"),
        ({**URL, "extra_body": "{"}, "--extra-body is '{'; no JSON"),
        ({**URL, "extra_body": "[1]"}, "--extra-body is '[1]'; it must be an object"),
        ({**URL, "extra_body": '{"x": NaN}'}, "it has NaN"),
        ({**URL, "extra_body": '{"stream": false}'}, "--extra-body has 'stream'"),
        ({"offline": "m", "extra_body": "{}"}, "--extra-body needs --url"),
        ({"offline": "m", "new_connections": True}, "--new-connections needs --url"),
        ({**URL, "records": True}, "--records needs --json"),
        ({**URL, "goodput": "speed:9"}, "speed:9"),
        ({**URL, "prompt_tokens": "many"}, "--prompt-tokens is 'many'"),
        ({**URL, "output_tokens": "0"}, "--output-tokens is '0'"),
        ({**URL, "plot": "a.jpg"}, "must end with .png or .html"),
        ({**URL, "json": "/nonexistent/a.json"}, "--json is '/nonexistent/a.json'"),
        ({**URL, "csv": "/tmp"}, "--csv is '/tmp'"),
        ({"url": "http://me:s3cret@127.0.0.1:1"}, "--url holds a password"),
        ({"url": "127.0.0.1:1"}, "is no URL"),
        (URL, "127.0.0.1:1/v1/models cannot be asked"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(others, message):
    with pytest.raises(ConfigError) as caught:
        bench(BenchOptions(**others))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"popularity": "zipf:1.1"}, "--popularity is given, but there are no adapters"),
        ({"base_share": 0.5}, "--base-share is given, but there are no adapters"),
    ],
)
def test_a_workload_that_cannot_be_is_refused_before_anything_is_sent(server, others, message):
    with pytest.raises(ConfigError, match=message):
        bench(options(server, **others))
    assert not server.requests


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"adapters": "sql", "popularity": "loud"}, "--popularity is 'loud'"),
        ({"base_share": 1.5}, "--base-share is 1.5"),
        ({"shared_prefix": -1.0}, "--shared-prefix is -1"),
        ({"arrivals": "now"}, "--arrivals is 'now'"),
        ({"requests": 0}, "--requests is 0"),
        ({"vocab_size": 1}, "--vocab-size is 1"),
        ({"prefixes": 0}, "--prefixes is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"goodput": "speed:9"}, "speed:9"),
        ({"prompt_tokens": "trace-prompt:{}"}, "has 1 requests, 96 are asked for"),
        ({"arrivals": "trace:{}"}, "has 1 requests, 96 are asked for"),
        ({"popularity": "trace:{}"}, "has 1 requests, 96 are asked for"),
        ({"requests": 1, "adapters": "sql", "popularity": "trace:{}"}, "asks for 'a'"),
    ],
)
def test_a_workload_is_refused_by_its_option_before_an_engine_is_made(
    tmp_path, monkeypatch, others, message
):
    def refuse(*_: object) -> None:
        raise AssertionError("an engine was made")

    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,adapter,prompt_tokens\n0,a,7\n")
    texts = {k: v.format(trace) if isinstance(v, str) else v for k, v in others.items()}
    monkeypatch.setattr(command, "start_engine", refuse)
    with pytest.raises(ConfigError, match=message):
        bench(BenchOptions(offline="model", **texts))


def test_every_option_is_on_the_command_line_and_means_the_field(server, tmp_path):
    file = tmp_path / "a.json"
    asked = run_process(
        *("bench", "--url", server.url, "--adapters", "sql,pirate", "--popularity", "round-robin"),
        *("--base-share", "0.2", "--prompt-tokens", "9", "--output-tokens", "2", "--prefixes", "2"),
        *("--shared-prefix", "0.5", "--requests", "10", "--concurrency", "2", "--warmup", "1"),
        *("--repeats", "1", "--seed", "3", "--vocab-size", "99", "--goodput", "ttft:9"),
        *("--api-key", "k", "--timeout", "50", "--arrivals", "closed", "--base-model", "tiny"),
        *("--json", str(file), "--records", "--allow-errors", "--new-connections"),
        *("--extra-body", '{"top_k": 1}'),
    )
    assert asked.returncode == 0, asked.stderr
    found = read_result(file)["options"]
    expected = {"popularity": "round-robin", "base_share": 0.2, "prompt_tokens": "9", "prefixes": 2}
    expected |= {"shared_prefix": 0.5, "requests": 10, "concurrency": "2", "warmup": 1, "seed": 3}
    expected |= {"goodput": "ttft:9", "timeout": 50.0, "records": True, "vocab_size": 99}
    assert expected.items() <= found.items()
    assert "requests in flight" in asked.stdout
    models = [one.body["model"] for one in server.requests[1:]]
    assert models.count("tiny") == 2
    assert all(one.body["top_k"] == 1 for one in server.requests)
    assert server.num_connections == 11


def test_mistakes_are_one_line_and_exit_code_1(server, capfd):
    for arguments, message in [
        (["bench"], "give either --url"),
        (["bench", "--url", server.url, "--adapters", "nobody"], "no model or adapter is named"),
        (["bench", "--url", server.url, "--base-model", "fails", "--warmup", "0"], "every request"),
        (["bench", "--requests", "7", "compare", "a.json", "b.json"], "no meaning for compare"),
        (["bench", "compare", "a.json"], "1 file given"),
        (["bench", "calibrate", "m", "-o", "c.json", "--rounds", "0"], "--rounds is 0"),
        (["bench", "calibrate", "m", "-o", "/tmp"], "--output is '/tmp'"),
    ]:
        done = run_here(capfd, *arguments)
        assert message in error_line(done)


def test_files_are_compared_and_drawn(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, first_s in zip(paths, (0.4, 0.2), strict=True):
        write_json(result(steady_point(first_s)), path)
    compare(paths, None)
    assert "0.50 x" in capsys.readouterr().out
    compare(paths, str(tmp_path / "a.html"))
    assert (tmp_path / "a.html").read_text().count("<svg ") == 4
    with pytest.raises(ConfigError, match="--plot"):
        compare(paths, "/nonexistent/a.png")


def test_help_brings_nothing_heavy():
    code = (
        "import sys, loraswarm.__main__;"
        "heavy = {'torch', 'numpy', 'aiohttp', 'matplotlib', 'tqdm'} & sys.modules.keys();"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    shown = run_process("bench", "--help").stdout
    for name in ("--shared-prefix", "--adapters-dir", "--records", "compare"):
        assert name in shown


def documented(heading):
    """Default, meaning and example of each option in the table below a heading of the page."""
    page = Path(__file__).parent.parent.joinpath("docs", "bench.md").read_text()
    part = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in part.splitlines() if line.startswith("| `")]
    assert all(len(row) == 4 for row in rows)
    return {row[0].partition(",")[0]: row[1:] for row in rows}


def is_told(found, name, default):
    """Whether a table has an option with its default and an example."""
    told, _, example = found.pop(f"`--{name.replace('_', '-')}`")
    if isinstance(default, bool):
        is_default = told == "off" and not default
    else:
        is_default = told != "" if default is None else told == f"`{default}`"
    return is_default and example.startswith(("`--", "`-o"))


def test_every_option_is_documented_with_its_default_and_an_example():
    found = documented("Options")
    for field in dataclasses.fields(BenchOptions):
        assert is_told(found, field.name, field.default), field.name
    assert not found


def test_every_option_of_calibrate_is_documented_with_its_default_and_an_example():
    found = documented("Calibrate")
    for parameter in inspect.signature(calibrate).parameters.values():
        if parameter.name == "model":
            continue
        is_required = parameter.default is inspect.Parameter.empty
        assert is_told(found, parameter.name, None if is_required else parameter.default)
    assert not found


def test_a_run_imports_no_torch(server):
    code = (
        "import sys; from loraswarm.commands.bench import bench;"
        "from loraswarm.commands.bench_options import BenchOptions;"
        f"code = bench(BenchOptions(url={server.url!r}, requests=3, output_tokens='3', warmup=0));"
        "sys.exit(str(heavy) if (heavy := {'torch', 'numba'} & sys.modules.keys()) else code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_an_engine_in_this_process_is_measured(tmp_path, capfd):
    from engine_factory import save_swarm  # brings torch, which no other test here needs

    save_swarm(tmp_path, 2, has_tokenizer=True)
    file = tmp_path / "a.json"
    common = ["bench", "--offline", str(tmp_path / "model"), "--adapters-dir"]
    common += [str(tmp_path / "adapters"), "--num-threads", "1", "--vocab-size", "50"]
    common += ["--prompt-tokens", "7", "--output-tokens", "3", "--requests", "6", "--warmup", "1"]
    common += ["--dtype", "float32", "--pool-bytes", "8MiB", "--max-model-len", "64"]
    done = run_here(capfd, *common, "--popularity", "round-robin", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = read_result(file)
    assert found["target"] == "offline model"
    assert found["options"]["adapters"] == ["a000", "a001"]
    summary = found["points"][0]["summary"]
    assert summary["total_output_tokens"] == 18
    assert {name: row["num_requests"] for name, row in summary["per_adapter"].items()} == {
        "a000": 3,
        "a001": 3,
    }
    refused = error_line(run_here(capfd, *common, "--adapters", "a000,nobody"))
    assert "no model or adapter is named 'nobody'; known: a000, a001" in refused
