"""Finding a model's files: directories, the hub (faked, and its real cache offline), end tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from loraswarm.errors import ConfigError
from loraswarm.models import hub
from loraswarm.models.source import eos_token_ids, read_config, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refuse_to_download(*args: object, **kwargs: object) -> str:
    raise AssertionError(f"asked the hub for {args}")


def hub_error(kind: type[HfHubHTTPError], message: str = "no") -> HfHubHTTPError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


def test_a_directory_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", refuse_to_download)
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")


def test_a_tilde_means_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"


@pytest.mark.parametrize("model", ["/no/such", "./no", "../no", "~/no", "a/b/c", "no/", "a\\b"])
def test_a_path_that_does_not_exist_never_asks_the_hub(model, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", refuse_to_download)
    with pytest.raises(ConfigError, match="no such directory"):
        resolve_model(model)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match="is a file; give the directory"):
        resolve_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("model", ["owner/name", "name"])
def test_a_hub_id_is_downloaded_without_files_we_do_not_read(model, tmp_path, monkeypatch):
    asked = {}

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked[repo_id] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_model(model) == tmp_path
    (patterns,) = asked.values()
    assert list(asked) == [model]

    def is_wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    assert all(
        is_wanted(name)
        for name in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer.model",
            "chat_template.jinja",
        )
    )
    assert not any(
        is_wanted(name)
        for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "model.gguf")
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(RepositoryNotFoundError), "no such public repository"),
        (hub_error(GatedRepoError), "gated.*HF_TOKEN"),
        (hub_error(HfHubHTTPError, "503 busy\nlong trace"), "HfHubHTTPError: 503 busy$"),
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
        (httpx.ConnectError("name or service not known"), "ConnectError: name or service"),
        (RuntimeError(""), "RuntimeError: no message"),
    ],
)
def test_a_hub_failure_is_one_line(error, message, monkeypatch):
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_model("owner/name")
    assert "'owner/name' is not a local directory" in str(caught.value)
    assert "\n" not in str(caught.value)


def resolve_offline(model: str, home: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys\n"
        "from loraswarm.errors import ConfigError\n"
        "from loraswarm.models.source import resolve_model\n"
        "try:\n    print(resolve_model(sys.argv[1]))\n"
        "except ConfigError as error:\n    sys.exit(str(error))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, model],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        capture_output=True,
        text=True,
    )


def test_offline_the_hub_cache_serves_what_it_holds_and_nothing_else(tmp_path):
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    held = resolve_offline("owner/name", tmp_path)
    assert held.returncode == 0, held.stderr
    assert Path(held.stdout.strip()) == snapshot
    absent = resolve_offline("owner/other", tmp_path)
    assert absent.returncode == 1
    assert "cannot be reached" in absent.stderr
    assert "Traceback" not in absent.stderr


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 2}, (5,)),
        ({"eos_token_id": [7, 3]}, {"eos_token_id": 2}, (7, 3)),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, (0,)),
        ({"temperature": 0.6}, {"eos_token_id": [2, 4]}, (2, 4)),
        (None, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(generation, config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ["</s>", -1, True, [2, None], 1.0])
def test_end_tokens_that_are_no_ids_are_refused(value, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=r"eos_token_id is .*generation_config\.json"):
        eos_token_ids(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "is not JSON"), ("[]", "holds a list, not a JSON object")],
)
def test_an_unreadable_config_is_refused_by_file(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value)
