"""A directory as PEFT saves it: adapter_config.json and adapter_model.safetensors.

Knows no method: names, shapes and bytes only. Opened through adapters/source.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.safetensors_header import WEIGHTS_FILE, TensorEntry, read_header
from loraswarm.adapters.source import TensorSpec, open_regular
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

MAX_CONFIG_BYTES = 16 * 2**20
HASHED_BYTES = 1 << 20
PICKLE_FILE = "adapter_model.bin"


class PeftDirectory:
    """An `AdapterSource` over one open safetensors file."""

    label = WEIGHTS_FILE
    file_format = "peft"

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path = path
        self._file = file
        self.config = _read_config(path)
        self._header, self._entries = read_header(file)
        self.tensors: Mapping[str, TensorSpec] = {
            name: TensorSpec(entry.dtype, entry.shape) for name, entry in self._entries.items()
        }
        self.num_bytes = os.fstat(file.fileno()).st_size

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[PeftDirectory]:
        """Raises AdapterError naming the file that is missing or malformed."""
        if not (path / CONFIG_FILE).exists():
            raise AdapterError(f"{CONFIG_FILE} is missing; an adapter is a directory saved by PEFT")
        if not (path / WEIGHTS_FILE).exists():
            advice = "save it with PEFT's save_pretrained"
            if (path / PICKLE_FILE).exists():
                advice = f"{PICKLE_FILE} is not read; save with safe_serialization=True"
            raise AdapterError(f"{WEIGHTS_FILE} is missing; {advice}")
        with open_regular(path / WEIGHTS_FILE) as file:
            yield cls(path, file)

    def digest(self) -> str:
        """See `AdapterSource`; config and header are read anew."""
        self._file.seek(0)
        header, _ = read_header(self._file)
        status = os.fstat(self._file.fileno())
        digest = hashlib.blake2b(digest_size=16)
        stamp = f"{status.st_size} {status.st_mtime_ns}".encode()
        for part in (_read_config(self._path), header, stamp):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def content_digest(self, names: Iterable[str]) -> str:
        """See `AdapterSource`."""
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            entry = self._entries[name]
            digest.update(f"{entry.dtype} {entry.shape} ".encode())
            self._file.seek(entry.begin)
            left = entry.num_bytes
            while left > 0:
                part = self._file.read(min(left, HASHED_BYTES))
                if not part:
                    raise _cut_short(name)
                digest.update(part)
                left -= len(part)
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """See `AdapterSource`."""
        # Imported here: describing adapters must not need torch.
        from loraswarm.adapters.tensors import read_tensor

        entry: TensorEntry = self._entries[name]
        tensor = read_tensor(self._file, entry)
        if tensor is None:
            raise _cut_short(name)
        return tensor


def _read_config(path: Path) -> bytes:
    with open_regular(path / CONFIG_FILE) as config_file:
        config = config_file.read(MAX_CONFIG_BYTES + 1)
    if len(config) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes")
    return config


def _cut_short(name: str) -> AdapterError:
    return AdapterError(f"{WEIGHTS_FILE} was cut short while tensor {name!r} was read")
