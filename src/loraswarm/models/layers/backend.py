"""Where a model's tensors live and what computes on them: given to every layer when it is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraswarm.kernels import Kernels


@dataclass(frozen=True, slots=True)
class Backend:
    """Kernels, and the dtype and device of every weight."""

    kernels: Kernels
    dtype: torch.dtype
    device: torch.device

    def allocate(self, *sizes: int) -> Tensor:
        """An uninitialised tensor; the loader fills it."""
        return torch.empty(*sizes, dtype=self.dtype, device=self.device)
