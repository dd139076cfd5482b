"""The demo swarm: a tiny base model, eight adapters and their held-out examples, as package data.

Knows only where the files lie and how a held-out line reads; imports no torch.
The files are made by `python -m loraswarm.demo.train`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Example:
    """One user message and the one answer that counts as right."""

    prompt: str
    answer: str


def base_path() -> Path:
    """The base model's Hugging Face directory."""
    return _ROOT / "base"


def adapters_path() -> Path:
    """The folder with one PEFT directory per adapter."""
    return _ROOT / "adapters"


def adapter_names() -> list[str]:
    """Names of the shipped adapters, sorted."""
    return sorted(path.parent.name for path in adapters_path().glob("*/adapter_config.json"))


def heldout(name: str) -> list[Example]:
    """Examples of adapter `name` that no training run has seen.

    Raises   ValueError when the adapter has no held-out file; the message lists the known.
    """
    known = sorted(path.stem for path in (_ROOT / "heldout").glob("*.jsonl"))
    if name not in known:
        raise ValueError(f"no held-out examples for adapter {name!r}; known: {', '.join(known)}")
    lines = (_ROOT / "heldout" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Example(**json.loads(line)) for line in lines]
