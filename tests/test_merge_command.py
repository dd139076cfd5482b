"""`loraswarm merge` as a command: what it says, where it writes, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapter_factory import WEIGHTS_FILE, save_random_adapter
from loraswarm.commands.merge import merge
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import ConfigError
from loraswarm.models.families import decoder_config
from loraswarm.models.source import read_config
from model_factory import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", "qwen3", head_dim=8)


@pytest.fixture(scope="module")
def shape(model) -> BaseShape:
    return decoder_config(read_config(model)).shape()


def changed_tensors(model: Path, merged: Path) -> set[str]:
    before, after = (load_file(path / "model.safetensors") for path in (model, merged))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_merge_says_what_it_wrote(tmp_path, model, shape):
    adapter = save_random_adapter(tmp_path / "adapter", shape, targets=["q_proj"])
    out = tmp_path / "deep" / "merged"
    done = subprocess.run(
        [sys.executable, "-m", "loraswarm", "merge", str(model), str(adapter), "-o", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert changed_tensors(model, out) == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }
    assert f"2 of {len(load_file(model / 'model.safetensors'))} tensors changed" in done.stdout
    assert "merged file=model.safetensors" in done.stderr


def test_the_result_may_lie_in_the_directory_of_the_model(tmp_path, shape):
    model = save_tiny_model(tmp_path / "model", "qwen3", head_dim=8)
    adapter = save_random_adapter(tmp_path / "adapter", shape, targets=["q_proj"])
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    merge(str(model), str(adapter), str(model / "merged"), "auto")
    assert len(changed_tensors(model, model / "merged")) == 2
    assert {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()} == files
    merge(str(model), str(adapter), str(model / "again"), "auto")
    assert changed_tensors(model / "again", model / "merged") == set()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_to_an_empty_or_missing_directory_is_followed(tmp_path, model, shape, is_there):
    adapter = save_random_adapter(tmp_path / "adapter", shape, targets=["q_proj"])
    if is_there:
        (tmp_path / "store").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "store")
    merge(str(model), str(adapter), str(tmp_path / "out"), "auto")
    assert (tmp_path / "out").is_symlink()
    assert len(changed_tensors(model, tmp_path / "store")) == 2


def test_a_name_that_no_terminal_can_show_is_written_and_said(tmp_path, capsys, model, shape):
    adapter = save_random_adapter(tmp_path / "adapter", shape, targets=["q_proj"])
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    merge(str(model), str(adapter), out, "auto")
    printed = capsys.readouterr().out
    printed.encode("utf-8")
    assert printed.startswith("wrote ")
    os.rename(out, tmp_path / "out")
    assert len(changed_tensors(model, tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("owner/name", r"'owner/name' does not exist.*hf download"),
        ("PLACE/nowhere", r"nowhere' does not exist"),
        (f"PLACE/adapter/{WEIGHTS_FILE}", r"is a file; give the directory"),
        (f"PLACE/adapter/{WEIGHTS_FILE}/x", r"does not exist"),
        ("PLACE/pipe.nemo", r"is no directory and no regular file"),
        ("a\0b", r"does not exist"),
    ],
)
def test_an_adapter_that_is_no_directory_here_is_refused_by_its_path(
    tmp_path, model, shape, adapter, message
):
    save_random_adapter(tmp_path / "adapter", shape)
    os.mkfifo(tmp_path / "pipe.nemo")
    with pytest.raises(ConfigError, match=message):
        merge(str(model), adapter.replace("PLACE", str(tmp_path)), str(tmp_path / "out"), "auto")
    assert not (tmp_path / "out").exists()
