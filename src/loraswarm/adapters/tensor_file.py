"""Tensors of one open file: what they look like, their bytes, and their values.

Shared by every format; a format's reader says where each tensor lies. Knows no configs. Base class
of the sources that adapters/source opens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from typing import TYPE_CHECKING

from loraswarm.adapters.source import TensorSpec
from loraswarm.adapters.stored_tensor import Span, StoredTensor
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 20


class TensorFile:
    """The part of `AdapterSource` that reads tensors. `label` is how messages call the file."""

    def __init__(
        self, label: str, file: BufferedReader, entries: Mapping[str, StoredTensor]
    ) -> None:
        self.label = label
        self._file = file
        self._entries = entries
        self.num_bytes = os.fstat(file.fileno()).st_size
        self.tensors: Mapping[str, TensorSpec] = {
            name: TensorSpec(entry.dtype, entry.shape) for name, entry in entries.items()
        }

    def chunks(self, name: str) -> Iterator[bytes]:
        """See `AdapterSource`."""
        for begin, num_bytes in self._entries[name].ranges():
            self._file.seek(begin)
            left = num_bytes
            while left > 0:
                part = self._file.read(min(left, CHUNK_BYTES))
                if not part:
                    raise self._cut_short(name)
                yield part
                left -= len(part)

    def content_digest(self, names: Iterable[str]) -> str:
        """See `AdapterSource`."""
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            spec = self.tensors[name]
            digest.update(f"{spec.dtype} {spec.shape} ".encode())
            for part in self.chunks(name):
                digest.update(part)
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """See `AdapterSource`."""
        # Imported here: describing adapters must not need torch.
        from loraswarm.adapters.tensors import read_tensor

        tensor = read_tensor(self._file, self._entries[name])
        if tensor is None:
            raise self._cut_short(name)
        return tensor

    def _read_again(self, span: Span) -> bytes:
        """For a digest: what is there now."""
        self._file.seek(span.begin)
        return self._file.read(span.num_bytes)

    def _cut_short(self, name: str) -> AdapterError:
        return AdapterError(f"{self.label} was cut short while tensor {name!r} was read")


def digest_of(parts: Iterable[bytes], file: BufferedReader) -> str:
    """A digest of `parts` and of the size and time of modification of `file`."""
    status = os.fstat(file.fileno())
    digest = hashlib.blake2b(digest_size=16)
    for part in (*parts, f"{status.st_size} {status.st_mtime_ns}".encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
