"""`loraswarm simulate merging`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
import sys

import pytest

from loraswarm.__main__ import main
from loraswarm.commands.simulate import HEADING, SimulateOptions
from loraswarm.simulate.compare import POLICIES


def run(capsys, monkeypatch, *arguments):
    """Exit code, output and errors of a command line."""
    monkeypatch.setattr(sys, "argv", ["loraswarm", "simulate", "merging", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_a_table_a_file_and_a_picture(capsys, monkeypatch, tmp_path):
    file, picture = tmp_path / "found.json", tmp_path / "found.png"
    code, out, err = run(
        capsys, monkeypatch, "--trace", "one", "--trace", "flapping", "--requests", "20",
        "--seed", "3", "--json", str(file), "--plot", str(picture),
    )  # fmt: skip
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == HEADING[0]
    assert [tuple(line.split()[:2]) for line in lines[1:]] == [
        (trace, policy) for trace in ("one", "flapping") for policy in POLICIES
    ]
    document = json.loads(file.read_text())
    assert len(document["runs"]) == 2 * len(POLICIES)
    assert document["options"]["seed"] == 3
    assert document["runs"][0]["num_requests"] == 20
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "trace=flapping policy=oracle" in err


def test_traces_and_cost_models_come_from_files(capsys, monkeypatch, tmp_path):
    trace = tmp_path / "mine.csv"
    rows = [f"{place * 0.1},{'x' if place % 3 else ''},7,5" for place in range(7)]
    trace.write_text("\n".join(["arrival_s,adapter,prompt_tokens,output_tokens", *rows]))
    code, out, _ = run(
        capsys, monkeypatch, "--trace", str(trace), "--policies", "never,cost"
    )  # fmt: skip
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["mine.csv", "never"],
        ["mine.csv", "cost"],
    ]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--trace", "nothing"], "trace is 'nothing'"),
        (["--trace", "missing.csv"], "missing.csv"),
        (["--policies", "never,best"], "--policies has 'best'"),
        (["--policies", ""], "--policies has ''"),
        (["--requests", "1"], "--requests is 1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--plot", "found.svg"], "--plot is 'found.svg'"),
        (["--json", "no/such/place"], "--json"),
        (["--cost-model", "missing.json"], "missing.json"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_simulated(capsys, monkeypatch, arguments, part):
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("loraswarm: error: ")
    assert len(err.splitlines()) == 1
    assert part in err


def test_all_policies_are_the_default():
    assert SimulateOptions().policy_names() == POLICIES
