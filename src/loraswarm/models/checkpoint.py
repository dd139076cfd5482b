"""Which tensors a safetensors checkpoint holds and in which of its files, from headers alone.

Knows no decoder: names, shapes and dtypes only. Used by models/loader and models/quantized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraswarm.errors import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor is stored. `dtype` as safetensors spells it, e.g. BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in directory `path`, by name.

    One model.safetensors, or the shards that model.safetensors.index.json names.

    Raises    ConfigError naming the file: none there, a missing or broken shard, a tensor in two
              shards or absent from the shard the index names.
    """
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_file():
        return _header(single)
    if index.is_file():
        return _indexed(index)
    if any(path.glob("*.bin")):
        raise ConfigError(
            f"{path} holds .bin weights only; load it with transformers and save_pretrained it "
            "once, which writes safetensors"
        )
    raise ConfigError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}")


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """The safetensors reader of a file; the caller closes it by leaving the block.

    Raises    ConfigError naming the file, if it is truncated or no safetensors file.
    """
    try:
        reader = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors: {error}") from error
    with reader:
        yield reader


class TensorFiles:
    """Tensors of a checkpoint by name; a context manager.

    Files are opened when first asked for and closed with the block; tensors are views of them.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self._files = ExitStack()
        self._readers: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; they are opened again if a tensor is asked for."""
        self._readers.clear()
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def tensor(self, name: str) -> Tensor:
        """A view of the file's values. Raises ConfigError if the file cannot be read."""
        file = self._stored[name].file
        if file not in self._readers:
            self._readers[file] = self._files.enter_context(open_tensors(file))
        tensor: Tensor = self._readers[file].get_tensor(name)
        return tensor


def _indexed(index: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    weight_map = _weight_map(index)
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise ConfigError(f"{index.name} names {name}, which is not in {index.parent}")
        header = _header(shard)
        for twice in sorted(header.keys() & tensors.keys()):
            raise ConfigError(f"tensor {twice!r} is both in {tensors[twice].file.name} and {name}")
        tensors |= header
    for tensor, name in weight_map.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise ConfigError(f"{index.name} places tensor {tensor!r} in {name}; it is not there")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is not JSON with a 'weight_map'") from error
    if not isinstance(weight_map, dict) or not all(type(v) is str for v in weight_map.values()):
        raise ConfigError(f"'weight_map' in {index} does not map tensor names to file names")
    return weight_map


def _header(file: Path) -> dict[str, StoredTensor]:
    with open_tensors(file) as reader:
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
        return {
            name: StoredTensor(file, stored.get_dtype(), tuple(stored.get_shape()))
            for name, stored in slices.items()
        }
