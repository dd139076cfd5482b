"""Builds a decoder whose matrices are integers: made here from floats, or as a checkpoint has them.

One fused matrix at a time: its floats or stored integers are dropped when it is made. Everything
is checked by name and shape before the first tensor is read, as models/loader does. Called by
engine/setup.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from loraswarm.core.base_shape import LM_HEAD
from loraswarm.errors import ConfigError
from loraswarm.models.checkpoint import TensorFiles
from loraswarm.models.config import DecoderConfig
from loraswarm.models.decoder import Decoder
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.linear import LoraLinear
from loraswarm.models.layers.weight import can_pack
from loraswarm.models.loader import (
    check_names,
    check_tensor,
    check_tied,
    copy_tensor,
    copy_tensors,
    stored_weights,
)
from loraswarm.models.quantization import GROUP_MULTIPLE, Quantization
from loraswarm.models.quantized.crossover import Crossover
from loraswarm.models.quantized.int4 import kernel_group_size, quantize_int4
from loraswarm.models.quantized.int8 import quantize_int8
from loraswarm.models.quantized.stored import check_stored, fused, read_linear, tensor_shapes
from loraswarm.models.quantized.weight import IntegerMatrix, QuantizedWeight

HEAD_TENSOR = f"{LM_HEAD}.weight"
Report = Callable[[str], None]
Shapes = dict[str, tuple[int, ...]]
_logger = logging.getLogger(__name__)


def load_quantized_decoder(
    path: Path,
    config: DecoderConfig,
    backend: Backend,
    quantization: Quantization,
    report: Report = _logger.info,
) -> Decoder:
    """A decoder of the checkpoint in directory `path`, its matrices as integers.

    Cost      memory: what is kept, and one fused matrix in floats; time: reading the files once
              and, per kind of matrix, some products to find the faster way.
    Raises    ConfigError as `load_decoder` does; naming a linear that cannot be quantized.
    """
    decoder = Decoder(backend, config)
    filling = _Filling(decoder, path, backend.dtype, quantization)
    filling.check()
    filling.fill(report)
    if quantization.is_stored and can_pack(backend.dtype, backend.device):
        decoder.lm_head.pack_(backend.kernels)
        decoder.share_head()
    report(filling.summary())
    return decoder


def quantized_matrix(name: str, rows_OI: Tensor, method: str) -> IntegerMatrix:
    """The matrix `name` by the option `method`. Raises ConfigError naming it, if it cannot be."""
    if not bool(rows_OI.isfinite().all()):
        raise ConfigError(f"{name} has values that are not finite; they cannot be quantized")
    if method == "int8":
        return quantize_int8(rows_OI)
    if kernel_group_size(rows_OI.shape[1]) is None:
        raise ConfigError(
            f"{name} has {rows_OI.shape[1]} inputs; --quantize int4 needs a multiple of"
            f" {GROUP_MULTIPLE} (--quantize int8 takes any)"
        )
    return quantize_int4(rows_OI)


class _Filling:
    """One decoder being filled from one checkpoint."""

    def __init__(
        self, decoder: Decoder, path: Path, dtype: torch.dtype, quantization: Quantization
    ) -> None:
        self._decoder = decoder
        self._path = path
        self._dtype = dtype
        self._quantization = quantization
        self._stored = stored_weights(path)
        self._linears = [linear for layer in decoder.layers for linear in layer.linears()]
        self._targets = dict(decoder.weights())
        self._crossover = Crossover(dtype)

    def check(self) -> None:
        """Raise ConfigError for what `fill` could not use."""
        is_tied = self._decoder.config.ties_embeddings
        expected, integers = self._expected()
        self._drop_zero_biases(expected)
        names = set(expected) | set(integers)
        check_names(self._path, self._stored.keys(), names, is_tied)
        for name, target in expected.items():
            check_tensor(name, self._stored[name], target)
        check_stored(self._stored, integers)
        if is_tied and HEAD_TENSOR in self._stored:
            check_tied(self._stored)

    def fill(self, report: Report) -> None:
        """Read every tensor; floats first, then matrix by matrix."""
        matrices = {f"{path}.weight" for linear in self._linears for path, _ in linear.parts()}
        if not self._quantization.is_stored:
            matrices.add(HEAD_TENSOR)
        floats = {name: t for name, t in self._targets.items() if name not in matrices}
        self._targets = {}  # its views would keep every float matrix
        copy_tensors(self._stored, floats, report)
        with TensorFiles(self._stored) as files:
            for linear in tqdm(self._linears, desc="quantized matrices", disable=None):
                linear.weight = self._weight(files, linear)
            if not self._quantization.is_stored:
                self._decoder.replace_lm_head(self._head(files))

    def summary(self) -> str:
        """One line: what is kept, and up to how many rows torch's kernels multiply integers."""
        limits = " ".join(
            f"max_kernel_rows[{kind}]={rows}" for kind, rows in self._crossover.limits.items()
        )
        kept_bytes = sum(linear.weight.nbytes for linear in self._linears)
        without = f"kernel=none dtype={self._dtype}: every product dequantizes its matrix"
        return (
            f"quantized method={self._quantization.method} linear_bytes={kept_bytes}"
            f" {limits or without}"
        )

    def _expected(self) -> tuple[dict[str, Tensor], Shapes]:
        """What must be stored: floats with their targets, and integers with their shapes."""
        if not self._quantization.is_stored:
            return self._targets, {}
        floats, integers = dict(self._targets), Shapes()
        for linear in self._linears:
            for path, _ in linear.parts():
                size = floats.pop(f"{path}.weight").shape
                integers |= tensor_shapes(path, (size[0], size[1]), self._quantization)
        return floats, integers

    def _drop_zero_biases(self, expected: dict[str, Tensor]) -> None:
        """Take stored biases of zeros for none: older quantizers wrote one for every linear."""
        if not self._quantization.is_stored:
            return
        paths = [path for linear in self._linears for path, _ in linear.parts()]
        extra = [name for path in paths if (name := f"{path}.bias") not in expected]
        with TensorFiles(self._stored) as files:
            for name in extra:
                if name in self._stored and not bool(files.tensor(name).any()):
                    del self._stored[name]

    def _weight(self, files: TensorFiles, linear: LoraLinear) -> QuantizedWeight:
        """The linear's parts as one matrix."""
        paths = [path for path, _ in linear.parts()]
        if self._quantization.is_stored:
            parts = [read_linear(files, path, self._quantization) for path in paths]
            integers = fused(paths, parts)
            matrix = integers.matrix(self._quantization.bits)
            return self._made(matrix, integers.order_I)
        rows_OI = linear.weight.rows
        for path, rows in linear.parts():
            name = f"{path}.weight"
            copy_tensor(name, files.tensor(name), rows_OI[rows])
        return self._made(quantized_matrix(paths[0], rows_OI, self._quantization.method))

    def _head(self, files: TensorFiles) -> QuantizedWeight:
        """The lm_head, always of 8 bits."""
        rows_VD = self._decoder.embedding_VD
        if not self._decoder.config.ties_embeddings:
            rows_VD = self._decoder.lm_head.rows
            copy_tensor(HEAD_TENSOR, files.tensor(HEAD_TENSOR), rows_VD)
        return self._made(quantized_matrix(LM_HEAD, rows_VD, "int8"))

    def _made(self, matrix: IntegerMatrix, order_I: Tensor | None = None) -> QuantizedWeight:
        limit = self._crossover.max_rows(matrix)
        return QuantizedWeight(matrix, self._dtype, limit, order_I)
