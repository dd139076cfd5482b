"""`loraswarm simulate cluster`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
import sys

import pytest

from loraswarm.__main__ import main
from loraswarm.commands.simulate_cluster import HEADING, MAX_ADAPTERS, MAX_REPLICAS
from loraswarm.simulate.cluster.policies import NAMES


def run(capsys, monkeypatch, *arguments):
    """Exit code, output and errors of a command line."""
    monkeypatch.setattr(sys, "argv", ["loraswarm", "simulate", "cluster", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


SMALL = ("--replicas", "3", "--adapters", "9", "--requests", "40")


def test_a_table_a_file_and_a_picture(capsys, monkeypatch, tmp_path):
    file, picture = tmp_path / "found.json", tmp_path / "found.png"
    code, out, err = run(
        capsys, monkeypatch, *SMALL, "--trace", "code", "--trace", "slora", "--seed", "3",
        "--json", str(file), "--plot", str(picture),
    )  # fmt: skip
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == " ".join(HEADING).split()
    assert [tuple(line.split()[:2]) for line in lines[1:]] == [
        (trace, policy) for trace in ("code", "slora") for policy in NAMES
    ]
    document = json.loads(file.read_text())
    assert document["options"]["replicas"] == 3
    assert [one["num_requests"] for one in document["runs"]] == [40] * 2 * len(NAMES)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "trace=slora policy=ours" in err


def test_the_rate_follows_the_utilization(capsys, monkeypatch):
    seconds = []
    for share in ("0.2", "0.9"):
        code, out, _ = run(
            capsys, monkeypatch, *SMALL, "--policies", "round-robin", "--utilization", share
        )
        assert code == 0
        seconds.append(float(out.splitlines()[1].split()[4]))
    assert seconds[0] < seconds[1]


def test_traces_come_from_files_as_they_are(capsys, monkeypatch, tmp_path):
    trace, file = tmp_path / "mine.csv", tmp_path / "found.json"
    rows = [f"{place * 100.0},{'x' if place % 3 else ''},7,5" for place in range(7)]
    trace.write_text("\n".join(["arrival_s,adapter,prompt_tokens,output_tokens", *rows]))
    arguments = ("--trace", str(trace), "--policies", "ours,dlora", "--json", str(file))
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["mine.csv", "ours"],
        ["mine.csv", "dlora"],
    ]
    assert json.loads(file.read_text())["runs"][0]["duration_s"] > 600.0
    run(capsys, monkeypatch, *arguments, "--utilization", "0.5")
    assert json.loads(file.read_text())["runs"][0]["duration_s"] < 60.0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--trace", "nothing"], "trace is 'nothing'"),
        (["--trace", "missing.csv"], "missing.csv"),
        (["--policies", "ours,best"], "--policies has 'best'"),
        (["--policies", "ours,ours"], "names one twice"),
        (["--replicas", "0"], "--replicas is 0"),
        (["--replicas", str(MAX_REPLICAS + 1)], "1,000"),
        (["--adapters", str(MAX_ADAPTERS + 1)], "100,000"),
        (["--requests", "1"], "--requests is 1"),
        (["--seats", "0"], "--seats is 0"),
        (["--step-tokens", "31"], "--step-tokens is 31; it must be from 32"),
        (["--seed", "-1"], "--seed is -1"),
        (["--utilization", "0"], "--utilization is 0.0"),
        (["--utilization", "nan"], "--utilization is nan"),
        (["--pool", "much"], "--pool is 'much'"),
        (["--pool", "1K"], "--pool is '1K'"),
        (["--pool", "30MB"], "--pool"),
        (["--host-cache", "1K"], "--host-cache"),
        (["--link", "0"], "--link is '0'"),
        (["--plot", "found.svg"], "--plot is 'found.svg'"),
        (["--json", "no/such/place"], "--json"),
        (["--cost-model", "missing.json"], "missing.json"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_simulated(capsys, monkeypatch, arguments, part):
    code, out, err = run(capsys, monkeypatch, *SMALL, *arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("loraswarm: error: ")
    assert len(err.splitlines()) == 1
    assert part in err


def test_without_its_solver_dlora_is_refused_and_others_run(capsys, monkeypatch):
    monkeypatch.setattr("loraswarm.simulate.cluster.policies.find_spec", lambda name: None)
    code, out, err = run(capsys, monkeypatch, *SMALL)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "loraswarm[cluster]" in err
    code, out, _ = run(capsys, monkeypatch, *SMALL, "--policies", "ours,dlora-dispatch")
    assert (code, len(out.splitlines())) == (0, 3)
