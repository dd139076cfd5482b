"""`loraswarm generate`: one answer, streamed to the terminal, from an engine in this process."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.source import NEMO_SUFFIX
from loraswarm.config import EngineConfig
from loraswarm.core.request import SamplingParams
from loraswarm.errors import ConfigError, EngineError
from loraswarm.llm import LLM


def generate(
    config: EngineConfig, adapter: str | None, prompt: str, params: SamplingParams, is_chat: bool
) -> None:
    """Print the answer as it comes. `adapter` is a name in `config.adapters` or a directory."""
    if adapter is not None and Path(adapter).is_dir():
        path = Path(adapter).resolve()
        if not (path / CONFIG_FILE).exists() and not any(path.glob(f"*{NEMO_SUFFIX}")):
            raise ConfigError(f"--adapter {adapter!r} holds neither {CONFIG_FILE} nor a .nemo file")
        roots, adapter = (str(path), *config.adapters), path.name
    else:
        roots = config.adapters
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


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
