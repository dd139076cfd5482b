"""Integers and zero points of one linear as AWQ checkpoints of version "gemm" pack them.

Knows the layout alone, no files or layers; called by models/quantized/stored.
Legend: I in features, O out features, G groups of inputs.

    qweight [I, O / 8]   int32 (i, c): outputs 8 c + 0, 2, 4, 6, 1, 3, 5, 7 of input i, lowest bits
                         first
    qzeros  [G, O / 8]   in the same order, as they are
    scales  [G, O]       w[o, i] = scale[g, o] * (int[o, i] - zero[g, o]),  g = i // group size
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.models.gptq import unpack_words

OUTPUT_OF_PLACE = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4


def unpack_weight(qweight: Tensor) -> Tensor:
    """[O, I] uint8."""
    return _unpack(qweight).T.contiguous()


def unpack_zeros(qzeros: Tensor) -> Tensor:
    """[G, O] int32, the zero points that are subtracted."""
    return _unpack(qzeros).int()


def _unpack(words: Tensor) -> Tensor:
    """[R, O] uint8 of [R, O / 8]."""
    place_of_output = torch.argsort(torch.tensor(OUTPUT_OF_PLACE))
    return unpack_words(words, BITS)[..., place_of_output].flatten(1)
