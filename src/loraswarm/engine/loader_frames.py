"""Jobs and results over a socket between the engine's process and its loader's, images as files.

A frame is a pickle, which is safe here: the other end is a process that we started from this code,
and what is in an adapter's files travels as plain bytes. Arrays go into memory files, whose
descriptors are passed, and are mapped at the other end. Knows no jobs. Used by engine/loader_child
and engine/loader_process.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from loraswarm.memory.mapping import map_file

_HEADER = struct.Struct("<QI")
_MAX_DESCRIPTORS = 128  # in one message; Linux takes 253
_WRITE_BYTES = 1 << 20
Adopt = Callable[[np.ndarray], np.ndarray]


class MemoryFiles:
    """Copies of arrays in memory that another process can map: files without a name.

    A context manager, which closes them; who has mapped one keeps the bytes.
    """

    def __init__(self) -> None:
        self.descriptors: list[int] = []
        self._numbers: dict[int, int] = {}
        self._arrays: list[np.ndarray] = []  # an id is one only while its array lives

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()

    def add(self, array: np.ndarray) -> int:
        """The number of the array's file; copied at the first time. Raises OSError."""
        assert array.dtype == np.uint8
        assert array.ndim == 1
        number = self._numbers.get(id(array))
        if number is None:
            number = self._numbers[id(array)] = len(self.descriptors)
            self._arrays.append(array)
            self.descriptors.append(_open_unnamed())
            _write(self.descriptors[number], array)
        return number


class Frame:
    """An object ready to be sent; arrays in it become `files`, which stay open until it is sent."""

    def __init__(self, item: object, files: MemoryFiles | None = None) -> None:
        """Raises what pickling raises; OSError if there is no memory or descriptor for an array."""
        buffer = io.BytesIO()
        _Pickler(buffer, files).dump(item)
        self._pickled = buffer.getbuffer()
        self._files = files

    def send(self, connection: socket.socket) -> None:
        """Send it; one thread at a time.

            | size of pickle, number of descriptors | a byte for every 128 descriptors | pickle |

        Raises    OSError, when the other end has closed; the connection is of no more use then.
        """
        descriptors = self._files.descriptors if self._files else []
        connection.sendall(_HEADER.pack(len(self._pickled), len(descriptors)))
        for first in range(0, len(descriptors), _MAX_DESCRIPTORS):
            socket.send_fds(connection, [b"\0"], descriptors[first : first + _MAX_DESCRIPTORS])
        connection.sendall(self._pickled)


def receive(connection: socket.socket, adopt: Adopt = lambda array: array) -> Any:
    """Wait for one frame. Arrays are mapped, read only, and hold no descriptor; each is handed to
    `adopt`, whose result takes its place.

    Raises    EOFError when the other end has closed; OSError.
    """
    num_bytes, num_descriptors = _HEADER.unpack(_receive_exactly(connection, _HEADER.size))
    descriptors: list[int] = []
    try:
        while len(descriptors) < num_descriptors:
            left = min(_MAX_DESCRIPTORS, num_descriptors - len(descriptors))
            flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
            mark, received, *_ = socket.recv_fds(connection, 1, left, flags)
            descriptors += received
            if not mark or len(received) != left:
                raise EOFError
        pickled = _receive_exactly(connection, num_bytes)
        return _Unpickler(io.BytesIO(pickled), descriptors, adopt).load()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, files: MemoryFiles | None) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._files = files

    def persistent_id(self, item: object) -> tuple[int, int] | None:
        if not isinstance(item, np.ndarray) or item.nbytes == 0:
            return None
        assert self._files is not None, "no place for an array"
        return self._files.add(item), item.nbytes


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, descriptors: Sequence[int], adopt: Adopt) -> None:
        super().__init__(buffer)
        self._descriptors = descriptors
        self._adopt = adopt

    def persistent_load(self, reference: tuple[int, int]) -> np.ndarray:
        number, num_bytes = reference
        return self._adopt(map_file(self._descriptors[number], num_bytes))


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytearray:
    received = bytearray(num_bytes)
    left = memoryview(received)
    while left:
        count = connection.recv_into(left)
        if count == 0:
            raise EOFError
        left = left[count:]
    return received


def _write(descriptor: int, array: np.ndarray) -> None:
    """Writing takes less time than copying to a mapping, which stops at each new page."""
    os.ftruncate(descriptor, array.nbytes)
    begin = 0
    while begin < array.nbytes:
        begin += os.pwrite(descriptor, array.data[begin : begin + _WRITE_BYTES], begin)


def _open_unnamed() -> int:
    """A new file in memory; on disk, in the place for temporary files, where there is no such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("loraswarm-image")
    descriptor, path = tempfile.mkstemp(prefix="loraswarm-image-")
    os.unlink(path)
    return descriptor
