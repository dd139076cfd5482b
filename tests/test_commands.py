"""The command line: exit codes, one-line errors, answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapter_factory import CONFIG_FILE, WEIGHTS_FILE, save_random_adapter, write_adapter
from command_line import error_line, run_here, run_process
from engine_factory import save_swarm
from locked_files import lock
from loraswarm.adapters.describing import scan_now
from loraswarm.commands import adapters as adapters_command
from loraswarm.commands import generate as generate_command
from loraswarm.commands.adapters import CheckOptions, check
from loraswarm.commands.options import parse_bytes
from loraswarm.config import EngineConfig
from loraswarm.core.request import SamplingParams
from loraswarm.engine.setup import build_engine
from loraswarm.errors import AdapterError, ConfigError, LoRASwarmError
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 2, has_tokenizer=True)
    return path


class EngineHere:
    """In place of the engine's process: what an engine refuses, it refuses as well in this one."""

    @staticmethod
    async def start(config, report):
        build_engine(config, report).close()
        raise AssertionError("nothing was refused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["serve"], "Missing argument"),
        (["serve", "/nonexistent/model"], "no such directory"),
        (["serve", "MODEL", "--adapters", "/nonexistent"], "'/nonexistent' does not exist"),
        (["serve", "MODEL", "--adapters", "MODEL/config.json"], "is not a directory"),
        (["serve", "MODEL", "--pool-bytes", "lots"], "--pool-bytes is 'lots'"),
        (["serve", "MODEL", "--pool-bytes", "10"], "one page of this model takes"),
        (["serve", "MODEL", "--dtype", "int3"], "dtype is 'int3'"),
        (["serve", "MODEL", "--port", "99999"], "port is 99999"),
        (["serve", "MODEL", "--no-such-option"], "--no-such-option"),
        (["serve", "MODEL/.."], "has no config.json"),
        (["generate", "MODEL", "--prompt", "x", "--adapter", "nobody"], "'nobody'"),
        (
            ["generate", "MODEL", "--prompt", "x", "--adapter", "MODEL"],
            "neither adapter_config.json nor a .nemo file",
        ),
        (["generate", "MODEL", "--prompt", "x", "--pool-bytes", "9000T"], "cannot give"),
        (["serve", "MODEL", "--host", ".."], "cannot listen on .."),
        (["generate", "MODEL", "--prompt", "x", "--max-tokens", "-1"], "max_tokens is -1"),
        (["generate", "MODEL", "--prompt", "x", "--max-tokens", "9999"], "max_tokens is 9,999"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_1(
    swarm, monkeypatch, capfd, arguments, message
):
    monkeypatch.setattr("loraswarm.commands.serve.ChildEngineClient", EngineHere)
    filled = [text.replace("MODEL", str(swarm / "model")) for text in arguments]
    assert message in error_line(run_here(capfd, *filled))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["serve", "MODEL", "--pool-bytes", "10"], "one page of this model takes"),
    ],
)
def test_a_process_ends_with_one_line_on_stderr_and_exit_code_1(swarm, arguments, message):
    """The second is refused by the engine's process, once it has loaded the base."""
    filled = [text.replace("MODEL", str(swarm / "model")) for text in arguments]
    assert message in error_line(run_process(*filled))


def test_help_and_version_succeed():
    shown, without_arguments, version = (
        run_process(*arguments) for arguments in (["--help"], [], ["--version"])
    )
    assert shown.returncode == without_arguments.returncode == version.returncode == 0
    assert "serve" in shown.stdout
    assert "serve" in without_arguments.stdout
    assert re.fullmatch(r"loraswarm \d+\.\d+\.\d+\n", version.stdout)


def test_an_adapter_given_by_path_wins_over_one_of_the_same_name(swarm, tmp_path, capfd):
    other = tmp_path / "a001"
    shutil.copytree(swarm / "adapters" / "a000", other)
    common = ["generate", swarm / "model", "--prompt", "Hello world", "--max-tokens", "8"]
    common += ["--adapters", swarm / "adapters"]
    found, wanted, shadowed = (
        run_here(capfd, *common, "--adapter", adapter) for adapter in (other, "a000", "a001")
    )
    assert found.returncode == wanted.returncode == shadowed.returncode == 0, found.stderr
    assert found.stdout == wanted.stdout != shadowed.stdout


def test_generate_prints_the_answer_of_the_adapter_by_path_or_by_name(swarm, capfd):
    adapter = swarm / "adapters" / "a001"
    common = ["generate", swarm / "model", "--prompt", "Hello world", "--max-tokens", "8"]
    by_path = run_process(*common, "--adapter", adapter)
    by_name = run_here(capfd, *common, "--adapter", "a001", "--adapters", adapter.parent)
    base = run_here(capfd, *common)
    assert by_path.returncode == by_name.returncode == base.returncode == 0, by_path.stderr
    assert by_path.stdout == by_name.stdout
    assert by_path.stdout != base.stdout
    assert by_path.stdout.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1000", 1000), ("4GiB", 4 << 30), ("512MB", 512 * 10**6), ("1.5K", 1536), (None, None)],
)
def test_sizes_are_read_with_their_units(text, expected):
    assert parse_bytes("--x", text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-3", "4 gigs", "1e9"])
def test_sizes_without_meaning_are_refused(text):
    with pytest.raises(ConfigError, match="--x"):
        parse_bytes("--x", text)


def save_dora(path: Path, model: Path) -> None:
    """An adapter that needs the weights of the base that it names."""
    save_random_adapter(path, decoder_config(read_config(model)).shape(), targets=["q_proj"])
    config = json.loads((path / CONFIG_FILE).read_text())
    tensors = load_file(path / WEIGHTS_FILE)
    for name in [name for name in tensors if "lora_B" in name]:
        magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[magnitude] = torch.ones(len(tensors[name]))
    write_adapter(path, config | {"use_dora": True, "base_model_name_or_path": str(model)}, tensors)


def refused_by_generate(monkeypatch, model: Path, adapter: str, *roots: Path) -> str:
    """Why `generate` refuses an adapter; it must do so before anything is loaded."""

    def load(*arguments, **options):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(generate_command, "LLM", load)
    config = EngineConfig(model=str(model), adapters=tuple(map(str, roots)))
    with pytest.raises(LoRASwarmError) as caught:
        generate_command.generate(config, adapter, "x", SamplingParams(), False)
    return str(caught.value)


def test_check_finds_and_names_what_the_server_does(swarm, tmp_path, capsys):
    good = swarm / "adapters" / "a000"
    for name in (b"good", b"mine.nemo", b"a\nb", b"\xff\xfe", b" led", b".hidden"):
        shutil.copytree(os.fsencode(good), os.path.join(os.fsencode(tmp_path), name))
    (tmp_path / "loose.nemo").write_bytes(b"x")
    (tmp_path / "adapter_model.safetensors.bak").write_bytes(b"x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    code = check([str(tmp_path)], CheckOptions(model=str(swarm / "model")), True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert code == 1
    shape = decoder_config(read_config(swarm / "model")).shape()
    catalog = scan_now([str(tmp_path)], shape)
    served = {summary.name: summary.refusal for summary in catalog.summaries()}
    assert {name: row["reason"] for name, row in rows.items()} == served
    assert {name for name, row in rows.items() if row["verdict"] == "ok"} == {"good", "mine.nemo"}
    assert "beside other adapters" in rows["loose.nemo"]["reason"]


def test_a_nemo_file_is_checked_where_it_is_named_itself(tmp_path, capsys):
    (tmp_path / "adapter_model.safetensors.bak").write_bytes(b"x")
    (tmp_path / "broken.nemo").write_bytes(b"x")
    for path in (tmp_path / "broken.nemo", tmp_path):
        assert check([str(path)], CheckOptions(), True) == 1
        (row,) = json.loads(capsys.readouterr().out)
        assert row["name"] == ("broken" if path.is_file() else path.name)
        assert "beside" not in row["reason"]


@pytest.mark.parametrize("step", ["describe", "adapter_bytes", "read_adapter"])
@pytest.mark.parametrize("error", [KeyError("surprise"), AdapterError("its block 7 is too large")])
def test_whatever_checking_an_adapter_raises_refuses_that_adapter_alone(
    swarm, capsys, monkeypatch, caplog, step, error
):
    original = getattr(adapters_command, step)
    num_calls = 0

    def failing(*arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise error
        return original(*arguments)

    monkeypatch.setattr(adapters_command, step, failing)
    options = CheckOptions(model=str(swarm / "model"))
    assert check([str(swarm / "adapters")], options, True) == 1
    bad, good = json.loads(capsys.readouterr().out)
    assert (bad["verdict"], good["verdict"]) == ("refused", "ok")
    if isinstance(error, AdapterError):
        assert bad["reason"] == "its block 7 is too large"
        assert caplog.records == []
    else:
        assert bad["reason"] == "adapter 'a000' could not be read: KeyError (see the log)"
        assert "KeyError: 'surprise'" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        ["adapters", "check", "LOCKED"],
        ["adapters", "check", "LOCKED/a.nemo"],
        ["adapters", "check", "ADAPTER", "--model", "LOCKED/model"],
        ["adapters", "convert", "LOCKED/sql", "-o", "OUT"],
        ["adapters", "convert", "ADAPTER", "-o", "LOCKED/out"],
        ["generate", "MODEL", "--prompt", "x", "--adapter", "LOCKED/sql"],
        ["generate", "MODEL", "--prompt", "x", "--adapter", "sql", "--adapters", "LOCKED"],
        ["generate", "LOCKED/model", "--prompt", "x"],
        ["merge", "MODEL", "LOCKED/sql", "-o", "OUT"],
        ["merge", "LOCKED/model", "ADAPTER", "-o", "OUT"],
        ["merge", "MODEL", "ADAPTER", "-o", "LOCKED/out"],
    ],
)
def test_a_directory_that_may_not_be_entered_is_one_line(
    swarm, tmp_path, monkeypatch, capfd, arguments
):
    (tmp_path / "locked").mkdir()
    places = {
        "LOCKED": tmp_path / "locked",
        "MODEL": swarm / "model",
        "ADAPTER": swarm / "adapters" / "a000",
        "OUT": tmp_path / "out",
    }
    pattern = "|".join(places)
    filled = [re.sub(pattern, lambda match: str(places[match[0]]), text) for text in arguments]
    lock(monkeypatch, tmp_path / "locked")
    done = run_here(capfd, *filled)
    line = error_line(done)
    assert (done.stdout, done.stderr) == ("", line + "\n")
    assert "Permission denied" in line
    assert str(tmp_path / "locked") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_named_base_that_may_not_be_read_is_no_fault_of_the_adapter(
    swarm, tmp_path, monkeypatch, capsys, file
):
    model = shutil.copytree(swarm / "model", tmp_path / "model")
    path = tmp_path / "sql"
    save_dora(path, model)
    monkeypatch.setattr(os.path, "isfile", lambda place: True)
    lock(monkeypatch, model / file)
    assert check([str(path)], CheckOptions(), True) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["verdict"] == "needs_model"
    assert re.search(f"the base that it names: .*{file}.*Permission denied", row["reason"])


def test_an_error_of_the_system_is_one_line_even_if_no_command_foresaw_it(monkeypatch, capfd):
    for error, message in (
        (PermissionError(13, "Permission denied", "/a\nb"), r"cannot access '/a\nb': Permission"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr("loraswarm.commands.adapters.convert", fail)
        done = run_here(capfd, "adapters", "convert", "a", "-o", "b")
        assert message in error_line(done)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)


def test_a_reader_that_goes_away_is_no_traceback(swarm):
    process = subprocess.Popen(
        [sys.executable, "-m", "loraswarm", "adapters", "check", str(swarm / "adapters")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    messages = process.stderr.read()
    assert process.wait(timeout=60) == 1
    process.stderr.close()
    assert messages == ""


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("PLACE/nowhere", "nowhere' does not exist"),
        (
            "nobody",
            "'nobody' does not exist; give an adapter's directory, or --adapters and a name",
        ),
        ("PLACE/README.md", "README.md' is a file; give the directory"),
        ("PLACE/loose.nemo", "loose.nemo' is a file; give the directory that holds it"),
        ("PLACE", "holds neither adapter_config.json nor a .nemo file alone"),
        ("PLACE/a\nb", "'a\\nb' cannot be a model id"),
        ("PLACE/kasa", "kasa_config"),
        ("PLACE/model", "has the name of the base model"),
    ],
)
def test_generate_refuses_an_adapter_before_the_base_is_loaded(
    swarm, tmp_path, monkeypatch, adapter, message
):
    for name in ("a\nb", "kasa", "model"):
        shutil.copytree(swarm / "adapters" / "a000", tmp_path / name)
    config_file = tmp_path / "kasa" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"kasa_config": {"beta": 1e-4}}))
    for name in ("README.md", "loose.nemo", "second.nemo"):
        (tmp_path / name).write_bytes(b"x")
    place = adapter.replace("PLACE", str(tmp_path))
    assert message in refused_by_generate(monkeypatch, swarm / "model", place)


def test_generate_knows_the_names_before_the_base_is_loaded(swarm, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    roots = (swarm / "adapters", tmp_path)
    reason = refused_by_generate(monkeypatch, swarm / "model", "nobody", *roots)
    assert reason == "no model or adapter is named 'nobody'; known: a000, a001"
    reason = refused_by_generate(monkeypatch, swarm / "model", "empty", *roots)
    assert "adapter_config.json is missing" in reason
    reason = refused_by_generate(monkeypatch, swarm / "model", "a000", tmp_path / "nowhere")
    assert "nowhere' does not exist" in reason
    with pytest.raises(AssertionError, match="the base was loaded"):
        refused_by_generate(monkeypatch, swarm / "model", "a000", *roots)
