"""Self-attention of one layer: fused q, k, v; optional norms; rope; paged K and V; output linear.

Does not know pages or sequences: it hands the batch's to the kernels.
Legend: T tokens, D hidden, H query heads, K kv heads, N = H + K, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import Tensor

from loraswarm.models.batch import Batch
from loraswarm.models.config import DecoderConfig
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.linear import LoraLinear
from loraswarm.models.layers.norm import QKNorm
from loraswarm.models.layers.rope import Rotation

QKV = range(3)
OUTPUT = range(3, 4)


class Attention:
    """One layer's attention."""

    def __init__(self, backend: Backend, config: DecoderConfig, layer: int) -> None:
        shape = config.shape()
        self.qkv = LoraLinear(backend, shape, layer, QKV, config.has_qkv_bias)
        self.o = LoraLinear(backend, shape, layer, OUTPUT, config.has_o_bias)
        self.qk_norm: QKNorm | None = None
        if config.has_qk_norm:
            path = f"model.layers.{layer}.self_attn"
            self.qk_norm = QKNorm(
                backend, path, config.num_heads, config.head_size, config.rms_norm_eps
            )
        self._layer = layer
        self._num_heads = config.num_heads
        self._num_qk_heads = config.num_heads + config.num_kv_heads
        self._head_size = config.head_size
        self._scale = config.head_size**-0.5
        self._window = config.windows[layer]
        self._kernels = backend.kernels

    def forward(self, x_TD: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """[T, D] of x's dtype, a new tensor; K and V of the batch's tokens are now in its pages."""
        qkv_TNE = self.qkv.forward(x_TD, batch).view(x_TD.shape[0], -1, self._head_size)
        kernels, pages, norms = self._kernels, batch.pages, None
        if self.qk_norm is not None:
            norms = self.qk_norm.factors(batch.overlays)
            if norms is None:
                kernels.finish()
                qk_TNE = qkv_TNE[:, : self._num_qk_heads]
                qk_TNE.copy_(self.qk_norm.forward(qk_TNE, batch.overlays, batch.pool))
        cos, sin = rotation.cos, rotation.sin
        kernels.rotate_and_write_kv_(
            qkv_TNE, self._num_heads, cos, sin, pages, self._layer, batch.slots, norms
        )
        q_THE = qkv_TNE[:, : self._num_heads]
        out_THE = kernels.paged_attention(
            q_THE, pages, self._layer, batch.attention, self._scale, self._window
        )
        return self.o.forward(out_THE.flatten(1), batch)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and tensors."""
        norm = self.qk_norm.weights() if self.qk_norm is not None else ()
        return chain(self.qkv.weights(), self.o.weights(), norm)
