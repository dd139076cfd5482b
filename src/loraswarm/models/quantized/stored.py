"""The linears of a GPTQ or AWQ checkpoint: which tensors hold them, and what these mean, exactly.

Knows checkpoints and no decoder. Used by models/quantized/loading and models/quantized/base.
Legend: I in features, O out features, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraswarm.errors import ConfigError
from loraswarm.models import awq, gptq
from loraswarm.models.checkpoint import StoredTensor, TensorFiles
from loraswarm.models.quantization import GROUP_MULTIPLE, WHOLE_WIDTH, Quantization
from loraswarm.models.quantized.int4 import MIDDLE, Int4Matrix
from loraswarm.models.quantized.int8 import Int8Matrix
from loraswarm.models.quantized.weight import IntegerMatrix

WORD_BITS = 32
INT8_MIDDLE = 128
SCALE_DTYPES = ("F16", "BF16", "F32")
GROUP_INDEX = "g_idx"


@dataclass(frozen=True, slots=True)
class Integers:
    """w[o, order_I[i]] = scale[g, o] * (ints[o, i] - zero[g, o]), g = i // (I / G).

    Shapes    ints [O, I] uint8, scale [G, O] float32, zero [G, O] int32; order [I] int64, None: i.
    """

    ints_OI: Tensor
    scale_GO: Tensor
    zero_GO: Tensor
    order_I: Tensor | None

    def matrix(self, bits: int) -> IntegerMatrix:
        """The same values, exactly, as one of our matrices; without the order."""
        if bits == 4:
            # 4 or 5 bits by the 24 of a scale at most, each product exact for 16-bit scales.
            return Int4Matrix(self.ints_OI, self.scale_GO, (MIDDLE - self.zero_GO) * self.scale_GO)
        ints_OI = (self.ints_OI.to(torch.int16) - INT8_MIDDLE).to(torch.int8)
        if bool((self.zero_GO == INT8_MIDDLE).all()):
            return Int8Matrix(ints_OI, self.scale_GO.T)
        offset_GO = (INT8_MIDDLE - self.zero_GO) * self.scale_GO
        return Int8Matrix(ints_OI, self.scale_GO.T, offset_GO.T)


def tensor_shapes(
    path: str, size: tuple[int, int], quantization: Quantization
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that hold the linear at `path` of `size` (O, I).

    Raises    ConfigError naming the linear, if its sizes do not divide into words and groups.
    """
    out_size, in_size = size
    num_groups = in_size // _group_size(path, in_size, quantization)
    per_word = WORD_BITS // quantization.bits
    if out_size % per_word or in_size % per_word:
        raise ConfigError(f"{path} is [{out_size}, {in_size}]; {per_word} must divide both")
    shapes: dict[str, tuple[int, ...]] = {
        f"{path}.qzeros": (num_groups, out_size // per_word),
        f"{path}.scales": (num_groups, out_size),
    }
    if quantization.method == "awq":
        return shapes | {f"{path}.qweight": (in_size, out_size // per_word)}
    return shapes | {
        f"{path}.qweight": (in_size // per_word, out_size),
        f"{path}.{GROUP_INDEX}": (in_size,),
    }


def check_stored(stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError naming a tensor of another shape or dtype; all must be there."""
    for name, shape in shapes.items():
        found = stored[name]
        allowed = SCALE_DTYPES if name.endswith(".scales") else ("I32",)
        if found.dtype not in allowed:
            raise ConfigError(
                f"tensor {name!r} is {found.dtype}; it must be {' or '.join(allowed)}"
            )
        if found.shape != shape:
            raise ConfigError(
                f"tensor {name!r} has shape {list(found.shape)}; config.json calls for"
                f" {list(shape)}"
            )


def read_linear(files: TensorFiles, path: str, quantization: Quantization) -> Integers:
    """The linear at `path`, whose tensors have been checked.

    Raises    ConfigError naming the linear and what in it has no exact meaning.
    """
    qweight, qzeros = files.tensor(f"{path}.qweight"), files.tensor(f"{path}.qzeros")
    scale_GO = files.tensor(f"{path}.scales").float()
    if not bool(scale_GO.isfinite().all()):
        raise ConfigError(f"tensor '{path}.scales' has values that are not finite")
    if quantization.method == "awq":
        return Integers(awq.unpack_weight(qweight), scale_GO, awq.unpack_zeros(qzeros), None)
    try:
        zero_GO = gptq.unpack_zeros(qzeros, quantization)
        order_I = gptq.column_order(files.tensor(f"{path}.{GROUP_INDEX}"), scale_GO.shape[0])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    ints_OI = gptq.unpack_weight(qweight, quantization.bits)
    if order_I is not None:
        ints_OI = ints_OI[:, order_I]
    return Integers(ints_OI, scale_GO, zero_GO, order_I)


def fused(paths: Sequence[str], parts: Sequence[Integers]) -> Integers:
    """Linears that read the same input as one, in this order.

    Raises    ConfigError naming two linears whose columns are in different orders: one copy of
              the input could not serve both.
    """
    first = parts[0].order_I
    for path, part in zip(paths, parts, strict=True):
        is_same = first is part.order_I
        if first is not None and part.order_I is not None:
            is_same = torch.equal(first, part.order_I)
        if not is_same:
            raise ConfigError(
                f"g_idx of {path} orders columns otherwise than that of {paths[0]}, which reads"
                " the same input; quantize without desc_act, or with static_groups"
            )
    return Integers(
        torch.cat([part.ints_OI for part in parts]),
        torch.cat([part.scale_GO for part in parts], dim=1),
        torch.cat([part.zero_GO for part in parts], dim=1),
        first,
    )


def _group_size(path: str, in_size: int, quantization: Quantization) -> int:
    size = quantization.group_size if quantization.group_size != WHOLE_WIDTH else in_size
    if in_size % size or size % GROUP_MULTIPLE:
        raise ConfigError(
            f"{path} has {in_size} inputs; they must divide into groups of {size}, and these into"
            f" groups of {GROUP_MULTIPLE}"
        )
    return size
