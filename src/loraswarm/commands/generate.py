"""`loraswarm generate`: one answer, streamed to the terminal, from an engine in this process."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.describing import describe_entries, find_now
from loraswarm.adapters.local_store import adapter_paths
from loraswarm.adapters.source import NEMO_SUFFIX
from loraswarm.adapters.stores import printable
from loraswarm.commands.adapter_path import adapter_path
from loraswarm.config import EngineConfig
from loraswarm.core.request import SamplingParams
from loraswarm.errors import ConfigError, EngineError
from loraswarm.llm import LLM
from loraswarm.models.families import decoder_config
from loraswarm.models.source import CONFIG_FILES, read_config, resolve_model


def generate(
    config: EngineConfig, adapter: str | None, prompt: str, params: SamplingParams, is_chat: bool
) -> None:
    """Print the answer as it comes. `adapter` is a name in `config.adapters` or a directory.

    Raises    ConfigError, UnknownAdapter or AdapterError for the adapter before the base is loaded.
    """
    roots = config.adapters
    if adapter is not None and _is_path(adapter, config):
        path = _directory(adapter)
        roots, adapter = (str(path), *roots), printable(path.name)
        _require_served(adapter, roots, config)
    elif adapter not in (None, config.model_name):
        _require_served(adapter, roots, config)
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("model", "adapters")
    }
    llm = LLM(config.model, roots, report=_report, **options)
    tokenizer = llm.tokenizer
    text: str | list[int] = prompt
    if is_chat:
        chat = tokenizer.render_chat([{"role": "user", "content": prompt}])
        text = tokenizer.encode(chat, add_special_tokens=False)
    for delta in llm.stream(text, params, adapter):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
        if delta.error is not None:
            raise EngineError(delta.error.message)
    sys.stdout.write("\n")


def _is_path(adapter: str, config: EngineConfig) -> bool:
    """Whether it is meant as a path: there, or such that no root could hold it as a name."""
    if os.path.isdir(adapter) or os.sep in adapter:
        return True
    return not config.adapters and adapter != config.model_name


def _directory(adapter: str) -> Path:
    """The directory of one adapter. Raises ConfigError saying what `adapter` is instead."""
    if not adapter_path(adapter, "an adapter's directory, or --adapters and a name").is_dir():
        raise ConfigError(f"adapter {adapter!r} is a file; give the directory that holds it alone")
    path = Path(os.path.abspath(adapter))
    if adapter_paths(adapter) != [path]:
        raise ConfigError(
            f"--adapter {adapter!r} holds neither {CONFIG_FILE} nor a {NEMO_SUFFIX} file alone;"
            " give the directory of one adapter, or --adapters and a name"
        )
    return path


def _require_served(name: str, roots: tuple[str, ...], config: EngineConfig) -> None:
    """Raise what the engine would raise for the adapter once the base is loaded."""
    shape = decoder_config(read_config(resolve_model(config.model, CONFIG_FILES))).shape()
    catalog = find_now(roots, config.model_name, is_logged=False)
    describe_entries(catalog, [catalog.resolve(name)], shape)
    catalog.resolve(name)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
