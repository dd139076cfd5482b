"""What `loraswarm bench` writes: files are seen to beforehand, and none takes the others along."""

from __future__ import annotations

import os

import pytest

from bench_endpoint import fake_server, options
from loraswarm.bench.report import read_result
from loraswarm.commands import bench as command
from loraswarm.commands.bench import bench
from loraswarm.commands.bench_outputs import check_outputs, write_each
from loraswarm.errors import ConfigError, LoRASwarmError


@pytest.fixture
def server():
    with fake_server() as running:
        yield running


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    there, new = tmp_path / "there.json", tmp_path / "new.csv"
    there.write_text("kept")
    (tmp_path / "link.png").symlink_to(tmp_path / "new.png")
    plot = str(tmp_path / "link.png")
    check_outputs({"--json": str(there), "--csv": str(new), "--plot": plot, "--other": None})
    assert there.read_text() == "kept"
    assert not new.exists()
    assert sorted(os.listdir(tmp_path)) == ["link.png", "there.json"]


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_outputs({"--json": str(tmp_path / "pipe")})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "--json is '.*'; it must be a file"),
        ("none/a.json", "it must be a file in a directory that exists"),
        ("x" * 300, "which cannot be written: File name too long"),
        ("link", "which cannot be written: No such file"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, path, message):
    (tmp_path / "link").symlink_to(tmp_path / "none" / "a.json")
    with pytest.raises(ConfigError, match=message):
        check_outputs({"--json": str(tmp_path / path)})


def test_one_file_for_two_options_is_refused_before_anything_is_sent(server, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    files = {"json": str(tmp_path / "a.json"), "csv": str(tmp_path / "link")}
    with pytest.raises(ConfigError, match="--json and --csv are both"):
        bench(options(server, **files))
    assert not server.requests
    assert not (tmp_path / "a.json").exists()


def test_every_write_is_tried_and_all_that_failed_are_said():
    written = []

    def fail(path):
        raise OSError(28, "No space left on device")

    writes = [("--json", "a", fail), ("--csv", "b", written.append), ("--plot", "c", fail)]
    with pytest.raises(LoRASwarmError) as caught:
        write_each(writes)
    assert written == ["b"]
    assert str(caught.value) == (
        "not written: --json 'a': No space left on device; --plot 'c': No space left on device"
    )


def test_a_file_that_fails_at_the_end_loses_neither_the_table_nor_the_others(
    server, tmp_path, monkeypatch, capsys
):
    def fail(result, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_csv", fail)
    files = {name: str(tmp_path / f"a.{name}") for name in ("json", "csv")}
    with pytest.raises(LoRASwarmError, match=r"not written: --csv .*: No space left"):
        bench(options(server, **files))
    assert len(read_result(files["json"])["points"]) == 1
    assert "requests in flight" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(command, "write_json", fail)
    with pytest.raises(LoRASwarmError, match="not written: --json"):
        bench(options(server, **files))
    assert (tmp_path / "a.csv").stat().st_size > 0
