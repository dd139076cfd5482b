"""Copies from host memory to a CUDA device through pinned buffers, on a stream of its own.

While one buffer is on its way to the device the next is filled. Knows no pages. Called by
PageBuffer, to copy from one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

BUFFER_BYTES = 8 << 20
NUM_BUFFERS = 2


class Staging:
    """Pinned buffers and a stream for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _copy_stream(device)
        self._buffers = [
            torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
            for _ in range(NUM_BUFFERS)
        ]
        self._events = [
            torch.cuda.Event()  # type: ignore[no-untyped-call]
            for _ in range(NUM_BUFFERS)
        ]
        self._next = 0

    def moment(self) -> torch.cuda.Event:
        """What the current stream of the calling thread has been given so far."""
        moment = torch.cuda.Event()  # type: ignore[no-untyped-call]
        moment.record(torch.cuda.current_stream(self._device))
        return moment

    def wait_for(self, moment: torch.cuda.Event) -> None:
        """Let what is copied from now on follow that work on the device."""
        self._stream.wait_event(moment)

    def copy(
        self, source: np.ndarray, target: Tensor, copies: Sequence[tuple[slice, slice]]
    ) -> None:
        """Copy slices of `source` to slices of `target`, both bytes; done when it returns.

        Work of other streams goes on meanwhile: what uses the target must have been waited for.
        """
        # The target may be an inference tensor, if the pool was made in that mode.
        with torch.cuda.stream(self._stream), torch.inference_mode():
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


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all copies to a device: torch has 32 and hands them out again after those, so that a
    new one for each engine would be some day's stream of a graph that is being captured."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
