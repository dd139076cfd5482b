"""Lets threads beside the engine's wake it up while it waits for descriptors, and waits for them.

Knows nothing about why. Made by engine/setup.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
from collections.abc import Iterable


class Wakeup:
    """`fileno` is readable from `wake` (any thread) until `clear` (the engine's)."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def wake(self) -> None:
        """Never waits; does nothing after `close`."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._writer.send(b"x")

    def clear(self) -> None:
        """Forget earlier calls of `wake`."""
        with contextlib.suppress(BlockingIOError, OSError):
            while self._reader.recv(4096):
                pass

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


def wait_readable(filenos: Iterable[int], timeout_s: float | None) -> None:
    """Wait until one of the descriptors, whatever its number, is readable; None: for ever."""
    poller = select.poll()
    for number in filenos:
        poller.register(number, select.POLLIN)
    poller.poll(None if timeout_s is None else math.ceil(timeout_s * 1e3))
