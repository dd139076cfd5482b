"""Copies from host memory to a CUDA device through pinned buffers, on a stream of its own.

While one buffer is on its way to the device the next is filled. Knows no pages. Called by
PageBuffer, from one thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BUFFER_BYTES = 8 << 20
NUM_BUFFERS = 2


class Staging:
    """Pinned buffers and a stream for one device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
            for _ in range(NUM_BUFFERS)
        ]
        self._events = [
            torch.cuda.Event()  # type: ignore[no-untyped-call]
            for _ in range(NUM_BUFFERS)
        ]
        self._next = 0

    def copy(
        self, source: np.ndarray, target: Tensor, copies: Sequence[tuple[slice, slice]]
    ) -> None:
        """Copy slices of `source` to slices of `target`, both bytes; done when it returns.

        Work of other streams goes on meanwhile: nothing that is under way may use the target.
        """
        with torch.cuda.stream(self._stream):
            for taken, given in copies:
                self._copy_slice(source[taken], target[given])
        self._stream.synchronize()

    def _copy_slice(self, source: np.ndarray, target: Tensor) -> None:
        for begin in range(0, source.nbytes, BUFFER_BYTES):
            part = source[begin : begin + BUFFER_BYTES]
            buffer, event = self._buffers[self._next], self._events[self._next]
            event.synchronize()
            buffer.numpy()[: part.nbytes] = part
            target[begin : begin + part.nbytes].copy_(buffer[: part.nbytes], non_blocking=True)
            event.record(self._stream)
            self._next = (self._next + 1) % NUM_BUFFERS
