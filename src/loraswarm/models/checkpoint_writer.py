"""Writes a checkpoint's files piece by piece: no tensor need be whole in memory.

Knows names, dtypes and shapes, not what they mean. Used by models/merge.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from loraswarm.adapters.safetensors_header import encode_header
from loraswarm.adapters.source import TensorSpec
from loraswarm.adapters.stored_tensor import size_of
from loraswarm.errors import ConfigError
from loraswarm.models.checkpoint import INDEX_FILE


def require_new(out: Path) -> None:
    """Raise ConfigError if `out` is there and not an empty directory, or cannot be looked at."""
    try:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; give a directory that is new or empty")
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty; give a directory that is new or empty")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block ends, or vanishes if it fails.

    If `out` is a link, its target is written.

    Raises    ConfigError if `out` is there and not empty, or cannot be written.
    """
    require_new(out)
    out = Path(os.path.realpath(out))
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(
    file: Path, specs: Mapping[str, TensorSpec], blocks: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write a safetensors file; `blocks(name)` gives a tensor as consecutive runs of its rows.

    Cost      memory: one block at a time.
    """
    names, header = encode_header(specs)
    with file.open("wb") as stream:
        stream.write(header)
        for name in names:
            num_bytes = 0
            for block in blocks(name):
                num_bytes += stream.write(block.contiguous().view(torch.uint8).numpy().data)
            assert num_bytes == size_of(*specs[name]), name


def write_index(path: Path, files: Mapping[str, Mapping[str, TensorSpec]]) -> None:
    """Write the index of a checkpoint whose `files` hold these tensors."""
    total = sum(size_of(*spec) for specs in files.values() for spec in specs.values())
    weight_map = {name: file for file, specs in files.items() for name in specs}
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(path / INDEX_FILE, index)


def write_json(file: Path, content: object) -> None:
    """Write a JSON file as transformers formats its own."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
