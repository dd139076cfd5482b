"""Rotary position embedding: the table of all positions, and the rotation of q and k.

The table is made in float32 and kept in the model's dtype, which is where transformers casts it.
Legend: T tokens, N heads, E head size, L positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loraswarm.models.config import DecoderConfig, Llama3Scaling
from loraswarm.models.layers.backend import Backend


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosine and signed sine of the tokens of one batch, each [T, 1, E].

    The sine of the first half of a head is negated, so that rotating is a swap of halves and two
    products: x * cos + swap(x) * sin.
    """

    cos: Tensor
    sin: Tensor

    def apply_(self, x_TNE: Tensor) -> None:
        """Rotate every head, in place. Rounds after each product and after the sum."""
        low_TNF, high_TNF = x_TNE.chunk(2, dim=-1)
        swapped_TNE = torch.cat((high_TNF, low_TNF), dim=-1).mul_(self.sin)
        x_TNE.mul_(self.cos).add_(swapped_TNE)


class RopeTable:
    """Cosines and sines of `max_position` positions: [L, E], cosines in the first half."""

    def __init__(self, backend: Backend, config: DecoderConfig) -> None:
        frequencies_F = rope_frequencies(config)
        positions_L = torch.arange(config.max_position, dtype=torch.float32)
        angles_LF = torch.outer(positions_L, frequencies_F)
        table_LE = torch.cat((angles_LF.cos(), angles_LF.sin()), dim=-1)
        self.table_LE = table_LE.to(device=backend.device, dtype=backend.dtype)

    def rotation(self, positions_T: Tensor) -> Rotation:
        """What one batch needs, gathered once for all its layers."""
        cos_T1F, sin_T1F = self.table_LE[positions_T].unsqueeze(1).chunk(2, dim=-1)
        return Rotation(
            torch.cat((cos_T1F, cos_T1F), dim=-1), torch.cat((-sin_T1F, sin_T1F), dim=-1)
        )


def rope_frequencies(config: DecoderConfig) -> Tensor:
    """Radians per position of each pair of columns: [E / 2] float32."""
    exponents_F = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies_F = 1.0 / (config.rope_theta**exponents_F)
    if config.rope_scaling is None:
        return frequencies_F
    return _scale_llama3(frequencies_F, config.rope_scaling)


def _scale_llama3(frequencies_F: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide slow frequencies by the factor, keep fast ones, blend those between.

    Semantics, for a frequency f that turns n times within the original length:
        share = (n - low) / (high - low), clamped to 0..1;  (1 - share) * f / factor + share * f
    """
    wavelengths_F = 2 * math.pi / frequencies_F
    turns_F = scaling.original_max_position / wavelengths_F
    span = scaling.high_freq_factor - scaling.low_freq_factor
    share_F = ((turns_F - scaling.low_freq_factor) / span).clamp_(0.0, 1.0)
    return (1 - share_F) * frequencies_F / scaling.factor + share_F * frequencies_F
