"""The gated feed-forward of one layer: down(silu(gate(x)) * up(x)).

Legend: T tokens, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import Tensor

from loraswarm.models.batch import Batch
from loraswarm.models.config import DecoderConfig
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.linear import LoraLinear

GATE_UP = range(4, 6)
DOWN = range(6, 7)


class MLP:
    """One layer's feed-forward."""

    def __init__(self, backend: Backend, config: DecoderConfig, layer: int) -> None:
        shape = config.shape()
        self.gate_up = LoraLinear(backend, shape, layer, GATE_UP, config.has_mlp_bias)
        self.down = LoraLinear(backend, shape, layer, DOWN, config.has_mlp_bias)
        self._kernels = backend.kernels

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """[T, D] of x's dtype, a new tensor."""
        gate_up_TF = self.gate_up.forward(x_TD, batch)
        return self.down.forward(self._kernels.silu_multiply(gate_up_TF), batch)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and tensors."""
        return chain(self.gate_up.weights(), self.down.weights())
