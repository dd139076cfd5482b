"""The command line: exit codes, one-line errors, answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from engine_factory import save_swarm
from loraswarm.commands.options import parse_bytes
from loraswarm.errors import ConfigError


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("swarm")
    save_swarm(path, 2, has_tokenizer=True)
    return path


def loraswarm(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "loraswarm", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"COLUMNS": "100"},
        check=False,
    )


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
def test_a_mistake_is_one_line_on_stderr_and_exit_code_1(swarm, arguments, message):
    filled = [text.replace("MODEL", str(swarm / "model")) for text in arguments]
    done = loraswarm(*filled)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("loraswarm: error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_help_and_version_succeed():
    assert "serve" in loraswarm("--help").stdout
    assert "serve" in loraswarm().stdout
    assert re.fullmatch(r"loraswarm \d+\.\d+\.\d+\n", loraswarm("--version").stdout)


def test_an_adapter_given_by_path_wins_over_one_of_the_same_name(swarm, tmp_path):
    other = tmp_path / "a001"
    shutil.copytree(swarm / "adapters" / "a000", other)
    common = ["generate", str(swarm / "model"), "--prompt", "Hello world", "--max-tokens", "8"]
    roots = ["--adapters", str(swarm / "adapters")]
    found = loraswarm(*common, *roots, "--adapter", str(other))
    wanted = loraswarm(*common, *roots, "--adapter", "a000")
    assert found.returncode == wanted.returncode == 0, found.stderr
    assert found.stdout == wanted.stdout != loraswarm(*common, *roots, "--adapter", "a001").stdout


def test_generate_prints_the_answer_of_the_adapter_by_path_or_by_name(swarm):
    adapter = swarm / "adapters" / "a001"
    model = str(swarm / "model")
    common = ["generate", model, "--prompt", "Hello world", "--max-tokens", "8"]
    by_path = loraswarm(*common, "--adapter", str(adapter))
    by_name = loraswarm(*common, "--adapter", "a001", "--adapters", str(adapter.parent))
    base = loraswarm(*common)
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
