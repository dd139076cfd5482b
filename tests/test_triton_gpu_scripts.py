"""What measures and tests a device goes on where a part of it fails; no device is needed here."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "gpu"))

import check
import isolated
import run

from failing_work import (
    FOREVER_S,
    a_row_and_an_error,
    a_row_and_no_process,
    no_end,
    three_rows,
)


def test_rows_of_a_process_are_kept_however_it_ends():
    for work, limit_s, num_rows, expected in (
        (three_rows, FOREVER_S, 3, None),
        (a_row_and_an_error, FOREVER_S, 1, "ValueError: first line"),
        (a_row_and_no_process, FOREVER_S, 1, "its process ended with code 7"),
        (no_end, 0.5, 0, "it was not done after 0.5 s"),
    ):
        rows = []
        assert isolated.run_isolated(work, (), limit_s, rows.append) == expected
        assert rows == [{"row": index} for index in range(num_rows)]


def test_parts_that_fail_are_named_and_the_others_measured(monkeypatch, tmp_path):
    def run_isolated(work, arguments, limit_s, take):
        part, ceilings = arguments
        assert (ceilings is None) == (part == "ceilings")
        take({"part": part, "number": float("nan") if part == "linears" else 0.5})
        kept.append(json.loads(path.read_text())["rows"])
        return "broken" if part == "linears" else None

    kept, path = [], tmp_path / "gpu.json"
    monkeypatch.setattr(run, "run_isolated", run_isolated)
    monkeypatch.setattr(run, "_options", lambda: Namespace(parts=",".join(run.PARTS), json=path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="not measured to the end: linears"):
        run.main()
    rows = json.loads(path.read_text())["rows"]
    assert rows.pop("faults") == {"linears": "broken"}
    assert list(rows) == ["ceilings", *run.PARTS]
    for part, number in (("decode", 0.5), ("linears", None)):
        assert rows[part] == [{"part": part, "number": number}]
    assert [len(document) - 1 for document in kept] == [1, 2, 3, 4, 5]
    assert list(tmp_path.iterdir()) == [path]


def test_limits_of_all_parts_are_less_than_eight_minutes():
    assert set(run.LIMITS_S) == {"ceilings", *run.PARTS} == set(run.TITLES)
    assert sum(run.LIMITS_S.values()) < 8 * 60


def test_files_of_tests_are_run_each_for_itself(tmp_path, capsys):
    bodies = {
        "broken": "import os\ndef test_it():\n    os._exit(9)\n",
        "good": "def test_it():\n    pass\n",
        "wrong": "def test_it():\n    assert 1 == 2\n",
    }
    files = []
    for name, body in bodies.items():
        files.append(str(tmp_path / f"test_{name}.py"))
        Path(files[-1]).write_text(body)
    runs = check.run_files(files, tmp_path, processes=2, limit_s=FOREVER_S)
    assert {Path(run.file).stem: run.code for run in runs} == {
        "test_broken": 9,
        "test_good": 0,
        "test_wrong": 1,
    }
    said = capsys.readouterr().out
    assert len(said.splitlines()) == len(files)
    assert "1 passed" in said
    assert check.run_files(files, tmp_path, processes=2, limit_s=0.0) == []


def test_every_file_for_a_device_is_run_once():
    files = [Path(file).resolve() for file in check.all_files()]
    assert all(file.is_file() for file in files)
    assert len(set(files)) == len(files)
    tests = Path(__file__).parent
    assert {*tests.glob("test_triton_*.py"), tests / "test_engine.py"} <= set(files)


def test_what_a_machine_lacks_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.fault_here() == f"torch {torch.__version__} finds no CUDA device"
    monkeypatch.setattr(check, "NEEDED", ("torch", "no_such_package"))
    assert check.fault_here() == f"{sys.executable} has no no_such_package"
