"""Whatever a file says, a refusal is one printable line of bounded length that still names it."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adapter_factory import (
    CONFIG_FILE,
    SMALL_SHAPE,
    WEIGHTS_FILE,
    save_random_adapter,
    write_adapter,
)
from loraswarm.adapters.convert import convert_to_peft
from loraswarm.adapters.printable import MAX_MESSAGE_CHARACTERS, one_line, quoted, shortened
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.core.base_shape import TARGETS
from loraswarm.errors import AdapterError
from nemo_factory import Layout, nemo_config, write_tar

EVIL = "a\nERROR root: all is lost\x1b[2J\r\x00\x85\u2028\u202e\udc80"
LONG = "\x1b" * 2000
HOSTILE = {"a forged line": EVIL, "long": LONG}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."


def refusal(path: Path, name: str = "a") -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter_info(path, name, SMALL_SHAPE)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) <= MAX_MESSAGE_CHARACTERS
    assert text.startswith("adapter ")
    return text


CONFIGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "key": lambda text: {text: 1},
    "value": lambda text: {"bias": text},
    "list": lambda text: {"trainable_token_indices": [text] * 99},
    "nested lists": lambda text: {"alora_invocation_tokens": [[[[text] * 3] * 3] * 3] * 3},
    "nested key": lambda text: {"use_bdlora": {text: 1}},
    "trained tokens": lambda text: {"trainable_token_indices": {text: [1]}},
    "no trained tokens": lambda text: {"trainable_token_indices": {text: []}},
    "bad character range": lambda text: {"target_modules": f"[z-{text}]"},
    "group name": lambda text: {"target_modules": f"(?P<{text}>x)"},
    "pattern": lambda text: {"rank_pattern": {text: 0}},
    "expression in a pattern": lambda text: {"rank_pattern": {f"[z-{text}]": 1}},
    "saved module": lambda text: {"modules_to_save": [f"({text}"]},
    "layers": lambda text: {"layers_to_transform": text},
    "initialisation": lambda text: {"init_lora_weights": text},
    "type": lambda text: {"peft_type": text},
    "AdaLoRA pattern": lambda text: {"peft_type": "ADALORA", "rank_pattern": {text: text}},
    "IA3": lambda text: {"peft_type": "IA3", "feedforward_modules": f"[z-{text}]"},
    "MiSS": lambda text: {"peft_type": "MISS", "init_weights": text},
    "VeRA": lambda text: {"peft_type": "VERA", "save_projection": text},
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("text", HOSTILE)
def test_a_config_cannot_forge_lines(case, text, tmp_path):
    save_random_adapter(
        tmp_path, SMALL_SHAPE, rank=2, config_overrides=CONFIGS[case](HOSTILE[text])
    )
    assert "adapter_config.json" in refusal(tmp_path)


@pytest.mark.parametrize("file_name", [WEIGHTS_FILE, "adapter_model.bin"])
@pytest.mark.parametrize("text", ["a\nERROR root: all is lost\x1b[2J", "\x1b" * 100_000])
def test_a_tensors_name_cannot_forge_lines(file_name, text, tmp_path):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=2)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    for changed in ({text: torch.zeros(2)}, {f"{PREFIX}{text}": torch.zeros(2).to(torch.int8)}):
        if file_name == WEIGHTS_FILE:
            write_adapter(tmp_path, config, tensors | changed)
        else:
            (tmp_path / WEIGHTS_FILE).unlink(missing_ok=True)
            torch.save(tensors | changed, tmp_path / file_name)
        assert file_name in refusal(tmp_path)


def test_a_pickles_members_cannot_forge_lines(tmp_path):
    save_random_adapter(tmp_path, SMALL_SHAPE, rank=2)
    (tmp_path / WEIGHTS_FILE).unlink()
    with zipfile.ZipFile(tmp_path / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(EVIL.removesuffix("\udc80"), b"x" * 100)
    assert "adapter_model.bin" in refusal(tmp_path)


NEMO_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "key": lambda config: config["peft"]["lora_tuning"].update({"a\nb\x1b[2J": 1}),
    "long key": lambda config: config["peft"]["lora_tuning"].update({LONG[:1000]: 1}),
    "value": lambda config: config["peft"]["lora_tuning"].update(variant="a\nb\x1b[2J"),
    "number as a key": lambda config: config["peft"]["lora_tuning"].update({1.5: 1}),
    "scheme": lambda config: config["peft"].update(peft_scheme="a\nb\x1b" + "x" * 9000),
    "targets": lambda config: config["peft"]["lora_tuning"].update(target_modules=["\x1b[2J\n"]),
}


def save_nemo(path: Path, text: bytes, file_name: str = "a.nemo") -> None:
    path.mkdir(exist_ok=True)
    write_tar(path / file_name, {"model_config.yaml": text, "model_weights.ckpt": b""})


@pytest.mark.parametrize("case", NEMO_CHANGES)
def test_a_nemo_config_cannot_forge_lines(case, tmp_path):
    config = nemo_config(SMALL_SHAPE, set(TARGETS), 2, Layout())
    NEMO_CHANGES[case](config)
    save_nemo(tmp_path, yaml.safe_dump(config).encode())
    assert "model_config.yaml: peft." in refusal(tmp_path)


@pytest.mark.parametrize("key", ["adapter_dim", "alpha", "layer_selection", "new"])
@pytest.mark.parametrize("number", ["0x" + "f" * 9000, "0b" + "1" * 9000, "? 0x" + "f" * 9000])
def test_numbers_too_long_to_write_out_are_refused(key, number, tmp_path):
    """Python refuses to print more than 4,300 digits."""
    line = f"{number}\n    : 1" if number[0] == "?" else f"{key}: {number}"
    text = f"peft:\n  peft_scheme: lora\n  lora_tuning:\n    {line}\n"
    save_nemo(tmp_path, text.encode())
    assert "model_config.yaml: peft.lora_tuning." in refusal(tmp_path)


def test_names_of_files_and_members_cannot_forge_lines(tmp_path):
    evil = "a\nERROR root: lost\x1b[2J"
    save_nemo(tmp_path, b"[]", f"{evil}.nemo")
    assert "cannot be read" in refusal(tmp_path) or "mapping" in refusal(tmp_path)
    save_nemo(tmp_path, b"[]", f"b{evil}.nemo")
    assert "2 .nemo files" in refusal(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with tarfile.open(other / "a.nemo", "w", format=tarfile.GNU_FORMAT) as archive:
        for name in (f"{evil}/../x", LONG[:1000]):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert "leads out of the archive" in refusal(other)


@pytest.mark.parametrize("name", ["a\nERROR root: lost\x1b[2J", "x" * 5000, "\x1b" * 255])
def test_an_adapters_name_cannot_forge_lines(name, tmp_path):
    save_random_adapter(tmp_path / "a", SMALL_SHAPE, config_overrides={"new_key": 1})
    assert refusal(tmp_path / "a", name).endswith("set it to null if not")
    directory = tmp_path / name[:255]
    directory.mkdir()
    with pytest.raises(AdapterError) as caught:
        convert_to_peft(directory, tmp_path / "out")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= MAX_MESSAGE_CHARACTERS


def test_text_that_can_be_shown_is_shown_as_it_is():
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert one_line(name) == name
    assert quoted(name) == repr(name)
    assert quoted("größe 大") == "'größe 大'"
    assert shortened({"a": [1, None]}) == "{'a': [1, None]}"
    assert one_line("a\nb\x1b") == r"a\nb\x1b"
    assert one_line("x" * 300, 10) == "x" * 7 + "..."
    assert shortened(10**5000) == "a number of thousands of digits"
