"""The base's weights as a quantized decoder multiplies by them, for those who read adapters.

DoRA, for one, divides by the norm of the base's rows: those of the integers, not of the floats they
were made from. Reads the checkpoint anew; rows are independent, so that parts of a fused matrix
have the same bits here as there. Used by engine/loader_worker.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loraswarm.config import Quantize
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, BaseShape
from loraswarm.models.checkpoint import TensorFiles
from loraswarm.models.checkpoint_base import ConvertedBase
from loraswarm.models.loader import stored_weights
from loraswarm.models.quantization import Quantization, quantization_of
from loraswarm.models.quantized.loading import quantized_matrix
from loraswarm.models.quantized.stored import read_linear
from loraswarm.models.quantized.weight import QuantizedWeight
from loraswarm.models.source import read_config


class OpenBase(Protocol):
    """`BaseWeights` with files that stay open until `close`."""

    @property
    def shape(self) -> BaseShape: ...
    def weight(self, path: str) -> Tensor: ...
    def bias(self, path: str) -> Tensor | None: ...
    def close(self) -> None: ...


def open_base(
    path: Path, shape: BaseShape, dtype: torch.dtype, quantize: Quantize | None
) -> OpenBase:
    """`BaseWeights` of the checkpoint in directory `path`: the same bits that a decoder of this
    dtype and option has. Several threads may ask at once.

    Raises    ConfigError as `quantization_of` does.
    """
    quantization = quantization_of(read_config(path), quantize)
    if quantization is None:
        return ConvertedBase(path, shape, dtype)
    if quantization.is_stored:
        return StoredIntegersBase(path, shape, dtype, quantization)
    return QuantizedBase(ConvertedBase(path, shape, dtype), dtype, quantization)


class QuantizedBase:
    """`BaseWeights` of a checkpoint of floats that the engine quantizes."""

    def __init__(self, base: ConvertedBase, dtype: torch.dtype, quantization: Quantization) -> None:
        self._base = base
        self._dtype = dtype
        self._method = quantization.method

    @property
    def shape(self) -> BaseShape:
        return self._base.shape

    def weight(self, path: str) -> Tensor:
        """See `BaseWeights`; a copy."""
        rows_OI = self._base.weight(path)
        if path == EMBEDDING:
            return rows_OI
        method = "int8" if path == LM_HEAD else self._method
        return QuantizedWeight(quantized_matrix(path, rows_OI, method), self._dtype).rows

    def bias(self, path: str) -> Tensor | None:
        """See `BaseWeights`."""
        return self._base.bias(path)

    def close(self) -> None:
        """Close the checkpoint's files; they are opened again if a weight is asked for."""
        self._base.close()


class StoredIntegersBase:
    """`BaseWeights` of a GPTQ or AWQ checkpoint, whose tensors the decoder's loader has checked."""

    def __init__(
        self, path: Path, shape: BaseShape, dtype: torch.dtype, quantization: Quantization
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        self._quantization = quantization
        self._files = TensorFiles(stored_weights(path))
        self._lock = threading.Lock()
        self._biased = {
            shape.site_path(site) for site in range(shape.num_linears) if shape.has_bias(site)
        }

    @property
    def shape(self) -> BaseShape:
        return self._shape

    def weight(self, path: str) -> Tensor:
        """See `BaseWeights`; a copy."""
        if path == LM_HEAD and self._shape.ties_embeddings:
            path = EMBEDDING
        with self._lock:
            if path in (EMBEDDING, LM_HEAD):
                return self._files.tensor(f"{path}.weight").to(self._dtype)
            integers = read_linear(self._files, path, self._quantization)
        matrix = integers.matrix(self._quantization.bits)
        return QuantizedWeight(matrix, self._dtype, order_I=integers.order_I).rows

    def bias(self, path: str) -> Tensor | None:
        """See `BaseWeights`."""
        if path not in self._biased:
            return None
        with self._lock:
            return self._files.tensor(f"{path}.bias").to(self._dtype)

    def close(self) -> None:
        """Close the checkpoint's files; they are opened again if a weight is asked for."""
        with self._lock:
            self._files.close()
