"""Brings results from a device to the host without waiting where they are asked for.

Knows not what they are. Called by engine/sampler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Fetch:
    """Tensors on their way to the host; only `wait` waits, and for no work begun after them."""

    def __init__(self, *tensors: Tensor) -> None:
        """They may be written again at once, in the order of the current stream; on the CPU they
        are read when `wait` is called."""
        self._host = tensors
        self._event: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type == "cuda":
            self._host = tuple([_pinned_copy(tensor) for tensor in tensors])
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> list[list[Any]]:
        """The elements of each tensor."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._host]


def _pinned_copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
