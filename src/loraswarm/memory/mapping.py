"""Maps files and memory files read only, as arrays that hold no file descriptor.

Knows nothing of what the bytes mean. Called by image_file and by the engine's loader. The mmap
module of Python below 3.13 keeps a duplicate of the descriptor for as long as the mapping lives,
which thousands of adapters cannot afford.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np

_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class _Mapping:
    """What numpy keeps as the owner of the bytes: they are unmapped when it goes."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, True),
        }
        unmap = weakref.finalize(self, _libc.munmap, address, num_bytes)
        # At exit the system unmaps; other threads may still be reading.
        unmap.atexit = False


def map_file(descriptor: int, num_bytes: int) -> np.ndarray:
    """The first `num_bytes` of an open file: uint8, read only, shared with whoever writes to it.

    The descriptor may be closed at once, and the file unlinked. Unmapped when the last array over
    it goes. A file that is truncated while it is mapped ends the process, so truncate none.
    Raises    OSError; ValueError if the file is shorter than that.
    """
    if os.fstat(descriptor).st_size < num_bytes:
        raise ValueError(f"the file is shorter than {num_bytes:,} bytes")
    if num_bytes == 0:
        return np.empty(0, dtype=np.uint8)
    address = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return np.asarray(_Mapping(address, num_bytes))
