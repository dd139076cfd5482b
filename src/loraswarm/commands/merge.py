"""`loraswarm merge`: a checkpoint with one adapter in its weights, which transformers loads."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from loraswarm.adapters.stores import printable
from loraswarm.commands.adapter_path import adapter_path
from loraswarm.config import DTYPES
from loraswarm.errors import ConfigError
from loraswarm.models.merge import merge as write_merged
from loraswarm.models.source import resolve_model


def merge(model: str, adapter: str, out: str, dtype: str) -> None:
    """Merge, and print one line about what was written."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    source = adapter_path(adapter)
    # A run that is told to stop removes what it has written.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = write_merged(resolve_model(model), source, Path(out), dtype, _report)
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(
        f"wrote {printable(out)}: {result.num_changed} of {result.num_tensors} tensors changed,"
        f" {result.num_bytes:,} bytes"
    )


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
