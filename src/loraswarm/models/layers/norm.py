"""Root-mean-square normalisation, rounded where transformers rounds.

Legend: T tokens, N heads, D the normalised width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraswarm.models.layers.backend import Backend


def normalize(x: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to a mean square of 1; a new tensor.

    Semantics    x / sqrt(mean(x ** 2) + eps), in float32, rounded once to x's dtype.
    """
    return F.rms_norm(x, x.shape[-1:], None, eps)


class RMSNorm:
    """`normalize`, then a learned factor for each column: a second rounding, as in transformers."""

    def __init__(self, backend: Backend, path: str, size: int, eps: float) -> None:
        self.weight_D = backend.allocate(size)
        self._eps = eps
        self._path = path

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] of x's dtype, a new tensor."""
        return normalize(x_TD, self._eps).mul_(self.weight_D)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint name and tensor."""
        yield f"{self._path}.weight", self.weight_D


class QKNorm:
    """Qwen 3's norms of each head of q and of k, with a factor for q and one for k.

    Shapes    qk [T, N, E]: the query heads, then the kv heads.
    """

    def __init__(self, backend: Backend, path: str, num_heads: int, size: int, eps: float) -> None:
        self.q_weight_E = backend.allocate(size)
        self.k_weight_E = backend.allocate(size)
        self._num_heads = num_heads
        self._eps = eps
        self._path = path

    def forward(self, qk_TNE: Tensor) -> Tensor:
        """[T, N, E] of qk's dtype, a new tensor."""
        qk_TNE = normalize(qk_TNE, self._eps)
        qk_TNE[:, : self._num_heads].mul_(self.q_weight_E)
        qk_TNE[:, self._num_heads :].mul_(self.k_weight_E)
        return qk_TNE

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and tensors."""
        yield f"{self._path}.q_norm.weight", self.q_weight_E
        yield f"{self._path}.k_norm.weight", self.k_weight_E
