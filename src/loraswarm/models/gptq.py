"""Integers, scales and zero points of one linear as GPTQ checkpoints pack them.

Knows the layout alone, no files or layers; called by models/quantized/stored.
Legend: I in features, O out features, G groups of inputs, F integers in one int32.

    qweight [I / F, O]   int32 (r, o): inputs F r, F r + 1, ... of output o, lowest bits first
    qzeros  [G, O / F]   int32 (g, c): outputs F c, F c + 1, ... of group g, lowest bits first
    scales  [G, O]       w[o, i] = scale[g, o] * (int[o, i] - zero[g, o]),  g = g_idx[i]
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraswarm.errors import ConfigError
from loraswarm.models.quantization import Quantization

WORD_BITS = 32


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The integers of each int32, lowest bits first: [..., F] uint8 of [...]."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    return (words[..., None] >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)


def unpack_weight(qweight: Tensor, bits: int) -> Tensor:
    """[O, I] uint8."""
    ints_ROF = unpack_words(qweight, bits)
    return ints_ROF.permute(1, 0, 2).reshape(qweight.shape[1], -1)


def unpack_zeros(qzeros: Tensor, quantization: Quantization) -> Tensor:
    """[G, O] int32, the zero points that are subtracted.

    The first format stores them less one. Its readers take the largest stored value for one more,
    or for 0; which was meant cannot be known. Symmetric checkpoints have one zero point, the
    middle; some hold it as it is although they name the first format.

    Raises    ConfigError saying what is stored, if it has no one meaning.
    """
    bits = quantization.bits
    stored_GO = unpack_words(qzeros, bits).flatten(1).int()
    middle, largest = 1 << (bits - 1), (1 << bits) - 1
    if quantization.is_symmetric:
        if bool((stored_GO == middle).all()) or bool((stored_GO == middle - 1).all()):
            return torch.full_like(stored_GO, middle)
        raise ConfigError(
            f"qzeros are not all {middle - 1} or all {middle}, as sym true in config.json calls for"
        )
    if not quantization.zeros_are_less_one:
        return stored_GO
    if bool((stored_GO == largest).any()):
        raise ConfigError(
            f"qzeros hold {largest}, which readers of format 'gptq' take for {largest + 1} or for"
            " 0; quantize anew in format 'gptq_v2'"
        )
    return stored_GO + 1


def column_order(g_idx: Tensor, num_groups: int) -> Tensor | None:
    """The input of each column once columns are sorted by group, [I] int64; None: as they are.

    Raises    ConfigError if groups are not all of one size.
    """
    sizes_G = torch.bincount(g_idx.long().clamp(min=0), minlength=num_groups)
    is_even = len(sizes_G) == num_groups and bool((sizes_G == len(g_idx) // num_groups).all())
    if not is_even or int(g_idx.min()) < 0:
        raise ConfigError("g_idx does not give every group the same number of inputs")
    if bool((g_idx.diff() >= 0).all()):
        return None
    return torch.argsort(g_idx, stable=True)
