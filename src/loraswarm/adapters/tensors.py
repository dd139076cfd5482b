"""Checked values of an adapter's tensors: finite, and within the base's dtype.

Knows nothing about config keys or modules. Handed to a method's `read`.
"""

from __future__ import annotations

import math
from io import BufferedReader

import torch
from torch import Tensor

from loraswarm.adapters.source import AdapterSource
from loraswarm.adapters.stored_tensor import StoredTensor, size_of
from loraswarm.errors import AdapterError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}


class TensorReader:
    """Reads tensors of one source for a base of `dtype`.

    Raises    AdapterError naming the tensor that is cut short, not finite or out of range.
    """

    def __init__(self, source: AdapterSource, dtype: torch.dtype) -> None:
        self._source = source
        self.dtype = dtype

    def has(self, name: str) -> bool:
        """Whether the file has the tensor."""
        return name in self._source.tensors

    def cast(self, name: str) -> Tensor:
        """The tensor in the base's dtype, contiguous."""
        stored = self._source.read(name)
        cast = stored.to(self.dtype)
        if not _is_finite(cast):
            raise self._value_error(name, stored)
        return cast

    def wide(self, name: str) -> Tensor:
        """The tensor in float32, contiguous."""
        stored = self._source.read(name)
        wide = stored.float()
        if not _is_finite(wide):
            raise self._value_error(name, stored, torch.float32)
        return wide

    def fit(self, name: str, derived: Tensor) -> Tensor:
        """A tensor derived from `name` (and others), in the base's dtype, contiguous."""
        cast = derived.to(self.dtype).contiguous()
        if not _is_finite(cast):
            raise self._value_error(name, derived)
        return cast

    def indices(self, name: str) -> Tensor:
        """An integer tensor as int64."""
        return self._source.read(name).to(torch.int64)

    def agree(self, first: str, second: str, *, is_transposed: bool = False) -> bool:
        """Whether two tensors, saved in the same dtype or in two, are the same in the base's.

        `is_transposed` where one is the other's transpose.
        """
        stored, other = self._source.read(first), self._source.read(second)
        coarser = max((stored.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        rounded, other = (tensor.to(coarser).to(self.dtype) for tensor in (stored, other))
        return rounded.equal(other.t() if is_transposed else other)

    def _value_error(
        self, name: str, stored: Tensor, dtype: torch.dtype | None = None
    ) -> AdapterError:
        label, dtype = self._source.label, dtype or self.dtype
        if not _is_finite(stored):
            return AdapterError(f"{label}: tensor {name!r} has NaN or infinite values")
        largest = stored.abs().max().item()
        dtype_name = str(dtype).removeprefix("torch.")
        advice = "" if dtype == torch.float32 else "; serve with a wider --dtype"
        return AdapterError(
            f"{label}: tensor {name!r} has values up to {largest:g}; {dtype_name} ends at"
            f" {torch.finfo(dtype).max:g}{advice}"
        )


def read_tensor(file: BufferedReader, stored: StoredTensor) -> Tensor | None:
    """Copy one tensor out of a file; None if the file ends before it does."""
    buffer = torch.empty(size_of(stored.dtype, stored.shape), dtype=torch.uint8)
    bytes_left = buffer.numpy().data
    for begin, num_bytes in stored.ranges():
        file.seek(begin)
        if file.readinto(bytes_left[:num_bytes]) != num_bytes:
            return None
        bytes_left = bytes_left[num_bytes:]
    return buffer.view(DTYPES[stored.dtype]).view(stored.shape)


def _is_finite(values: Tensor) -> bool:
    """One pass without a temporary: minimum and maximum carry NaN and infinity."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())
