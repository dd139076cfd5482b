"""Root-mean-square normalisation, rounded where transformers rounds.

A batch's overlays may hold another weight for some of its tokens, by the norm's path.
Legend: T tokens, H query heads, K kv heads, N = H + K, E head size, D the normalised width.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from loraswarm.kernels import HeadNorms
from loraswarm.kernels.overlay import Overlay, Overlays, row_blocks
from loraswarm.models.layers.backend import Backend


def scale_(x: Tensor, weight_D: Tensor, overlays: tuple[Overlay, ...], pool: Tensor) -> None:
    """Multiply the columns of every token by the weight, or by its overlay's row; in place.

    Shapes    x [T, D] or [T, N, D]; weight [D]; an overlay's rows [1, D].
    """
    if not overlays:
        x.mul_(weight_D)
        return
    weights = weight_D.repeat(x.shape[0], *[1] * (x.dim() - 1))
    for overlay in overlays:
        weights[overlay.begin : overlay.end] = row_blocks(pool, overlay.rows)[0]
    x.mul_(weights)


class RMSNorm:
    """The residual stream with what the last block adds, scaled to a mean square of 1, then by a
    learned factor for each column: a rounding after each, as in transformers."""

    def __init__(self, backend: Backend, path: str, size: int, eps: float) -> None:
        self.weight_D = backend.allocate(size)
        self._eps = eps
        self._path = path
        self._kernels = backend.kernels

    def forward(
        self,
        x_TD: Tensor,
        delta_TD: Tensor | None,
        overlays: Overlays,
        pool: Tensor,
        rows_Z: Tensor | None = None,
    ) -> Tensor:
        """Add delta to x, in place, and return what is normalised: [T, D] of x's dtype.

        With `rows_Z` of these rows alone: [Z, D]. Ranges of `overlays` count rows of the result.
        """
        kernels, own = self._kernels, overlays.get(self._path, ())
        if not own:
            return kernels.add_rms_norm_(x_TD, delta_TD, self.weight_D, self._eps, rows_Z)
        normed_TD = kernels.add_rms_norm_(x_TD, delta_TD, None, self._eps, rows_Z)
        kernels.finish()
        scale_(normed_TD, self.weight_D, own, pool)
        return normed_TD

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
        self._kernels = backend.kernels
        self._num_heads = num_heads
        self._eps = eps
        self._q_path, self._k_path = f"{path}.q_norm", f"{path}.k_norm"
        self._factors = HeadNorms(self.q_weight_E, self.k_weight_E, eps)

    def factors(self, overlays: Overlays) -> HeadNorms | None:
        """What the kernels take; None where an overlay replaces a factor: then `forward` is due."""
        if overlays.get(self._q_path) or overlays.get(self._k_path):
            return None
        return self._factors

    def forward(self, qk_TNE: Tensor, overlays: Overlays, pool: Tensor) -> Tensor:
        """[T, N, E] of qk's dtype, a new tensor. Nothing may be recorded and not yet done."""
        rows_RE = qk_TNE.reshape(-1, qk_TNE.shape[2])
        normed_RE = self._kernels.add_rms_norm_(rows_RE, None, None, self._eps)
        self._kernels.finish()
        qk_TNE = normed_RE.view(qk_TNE.shape)
        q_THE, k_TKE = qk_TNE[:, : self._num_heads], qk_TNE[:, self._num_heads :]
        scale_(q_THE, self.q_weight_E, overlays.get(self._q_path, ()), pool)
        scale_(k_TKE, self.k_weight_E, overlays.get(self._k_path, ()), pool)
        return qk_TNE

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and tensors."""
        yield f"{self._q_path}.weight", self.q_weight_E
        yield f"{self._k_path}.weight", self.k_weight_E
