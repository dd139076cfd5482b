"""Jobs and results over a socket between the engine's process and its loader's, images as files.

A frame is a pickle, which is safe here: the other end is a process that we started from this code,
and what is in an adapter's files travels as plain bytes. Arrays stay where they are: a descriptor
of their memory is passed, and the other process maps it. Knows no jobs. Used by engine/loader_child
and engine/loader_process.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import socket
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from loraswarm.memory.mapping import map_file

_HEADER = struct.Struct("<QI")
_MAX_DESCRIPTORS = 128  # in one message; Linux takes 253
Adopt = Callable[[np.ndarray], np.ndarray]


class MemoryFiles:
    """Memory that other processes can map: each allocation is a file without a name.

    It is closed when the last array over it goes here; who has mapped it keeps the bytes.
    """

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def allocate(self, num_bytes: int) -> np.ndarray:
        """Cleared memory of that many bytes, at least one: uint8."""
        descriptor = _open_unnamed()
        try:
            os.ftruncate(descriptor, num_bytes)
            array = np.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=np.uint8)
        except BaseException:
            os.close(descriptor)
            raise
        address = array.ctypes.data
        with self._lock:
            self._descriptors[address] = descriptor
        weakref.finalize(array, self._close, address)
        return array

    def descriptor_of(self, array: np.ndarray) -> int | None:
        """The file of an array, if it is the whole of an allocation."""
        with self._lock:
            return self._descriptors.get(array.ctypes.data)

    def _close(self, address: int) -> None:
        with self._lock:
            os.close(self._descriptors.pop(address))


class Frame:
    """An object ready to be sent. Arrays in it need `files`; those elsewhere are copied there."""

    def __init__(self, item: object, files: MemoryFiles | None = None) -> None:
        """Raises what pickling raises; OSError if there is no memory or descriptor for an array."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, files)
        pickler.dump(item)
        self._pickled = buffer.getbuffer()
        self._arrays = pickler.arrays

    def send(self, connection: socket.socket) -> None:
        """Send it; one thread at a time.

            | size of pickle, number of descriptors | a byte for every 128 descriptors | pickle |

        Raises    OSError, when the other end has closed; the connection is of no more use then.
        """
        descriptors = [descriptor for descriptor, _ in self._arrays]
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
    """Keeps `arrays` alive until they are sent."""

    def __init__(self, buffer: io.BytesIO, files: MemoryFiles | None) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._files = files
        self.arrays: list[tuple[int, np.ndarray]] = []

    def persistent_id(self, item: object) -> tuple[int, int] | None:
        if not isinstance(item, np.ndarray) or item.nbytes == 0:
            return None
        assert self._files is not None, "no place for an array"
        assert item.dtype == np.uint8
        assert item.ndim == 1
        descriptor = self._files.descriptor_of(item)
        if descriptor is None:
            copy = self._files.allocate(item.nbytes)
            copy[:] = item
            item, descriptor = copy, self._files.descriptor_of(copy)
            assert descriptor is not None
        self.arrays.append((descriptor, item))
        return len(self.arrays) - 1, item.nbytes


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


def _open_unnamed() -> int:
    """A new file in memory; on disk, in the place for temporary files, where there is no such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("loraswarm-image")
    descriptor, path = tempfile.mkstemp(prefix="loraswarm-image-")
    os.unlink(path)
    return descriptor
