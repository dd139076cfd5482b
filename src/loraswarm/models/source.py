"""Where a model's files are: a local directory, or a snapshot of a hub repository.

Knows file names, not what is in them, apart from the two small facts asked of JSON files here.
Called by engine/setup before anything is loaded; imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraswarm.errors import ConfigError

CONFIG_FILES = ("config.json",)
# "model*" leaves out second copies of the weights, such as consolidated.safetensors.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)


def resolve_model(model: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """The directory that holds the model's files, downloaded first if it is a hub id.

    Of a hub repository at least `files` (patterns) are there then. A directory of that name wins
    over a hub id. Files already in the hub cache are not downloaded again; HF_HUB_OFFLINE=1 uses
    the cache alone.

    Raises    ConfigError: no such directory, or one line on why the hub did not deliver.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"model {model!r} is a file; give the directory that holds config.json")
    if not _is_hub_id(model):
        raise ConfigError(f"model {model!r}: no such directory")
    from loraswarm.models import hub  # its client takes 0.3 s to import, which most starts need not

    return hub.download(model, files)


def read_config(path: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises    ConfigError naming the file, if it is absent or not a JSON object.
    """
    config = _read_json(path / "config.json")
    if config is None:
        raise ConfigError(f"{path} has no config.json; is it a model directory?")
    return config


def eos_token_ids(path: Path) -> tuple[int, ...]:
    """Tokens that end a generation, as the model's authors set them; () if they set none.

    generation_config.json decides; only where it is absent or silent, config.json does.

    Raises    ConfigError naming file and value, if it is neither a token id nor a list of them.
    """
    for name in ("generation_config.json", "config.json"):
        value = (_read_json(path / name) or {}).get("eos_token_id")
        if value is None:
            continue
        token_ids = value if isinstance(value, list) else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in token_ids):
            raise ConfigError(
                f"eos_token_id is {value!r} in {path / name}; it must be a token id or a list"
            )
        return tuple(token_ids)
    return ()


def _is_hub_id(model: str) -> bool:
    """`name` or `owner/name`; anything else that is not there was meant as a path."""
    parts = model.split("/")
    return len(parts) <= 2 and all(parts) and model[0] not in ".~" and "\\" not in model


def _read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in `file`; None if there is no such file."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content
