"""Where tensors lie in a file, whatever its format: row-major bytes, in one piece or in several.

Knows dtypes and byte ranges, no names, no formats, no torch. Made by the readers of formats, read
by adapters/tensor_file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
MAX_DIMENSIONS = 8


class Span(NamedTuple):
    """`num_bytes` bytes of a file, from byte `begin` on."""

    begin: int
    num_bytes: int


class StoredTensor(Protocol):
    """A tensor of `dtype`, as safetensors spells it; its bytes are those of `ranges`, in order."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def ranges(self) -> Iterator[Span]: ...


class TensorEntry(NamedTuple):
    """One tensor in one piece: `num_bytes` bytes from byte `begin` of the file, row-major."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    def ranges(self) -> Iterator[Span]:
        """See `StoredTensor`."""
        yield Span(self.begin, self.num_bytes)


class RowBlocks(NamedTuple):
    """A matrix put together from the same rows of several stored ones, below each other.

    `blocks` are (first row, number of rows).
    """

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[TensorEntry, ...]
    blocks: tuple[tuple[int, int], ...]

    def ranges(self) -> Iterator[Span]:
        """See `StoredTensor`."""
        row_bytes = self.shape[1] * DTYPE_BYTES[self.dtype]
        for shard in self.shards:
            for first, count in self.blocks:
                yield Span(shard.begin + first * row_bytes, count * row_bytes)


class SideBySide(NamedTuple):
    """A matrix whose columns are those of several stored ones, one after the other."""

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[TensorEntry, ...]

    def ranges(self) -> Iterator[Span]:
        """See `StoredTensor`."""
        for row in range(self.shape[0]):
            for shard in self.shards:
                row_bytes = shard.shape[1] * DTYPE_BYTES[self.dtype]
                yield Span(shard.begin + row * row_bytes, row_bytes)


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPE_BYTES[dtype]
