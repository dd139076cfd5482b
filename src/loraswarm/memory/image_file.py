"""Images in files of one directory, so that the next start need not read and pack adapters again.

A file is used only if it is whole and of the same format, base and adapter files. Knows nothing
of stores or of who is served. Called by the loader, from several threads.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
from pathlib import Path

import numpy as np

from loraswarm.adapters.adapter import SharedMatrix
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import ConfigError
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.image import AdapterImage
from loraswarm.memory.image_format import (
    FORMAT_VERSION,
    ImageHeader,
    SpoiledFile,
    StoredInfo,
    read_image,
    write_image,
)

_logger = logging.getLogger(__name__)
_SUFFIX = ".image"
_PARTIAL_SUFFIX = ".partial"


def image_signature(shape: BaseShape, geometry: PageGeometry, dtype: str, base: str) -> str:
    """Identifies everything but an adapter's files that decides the bytes of its image.

    `base` identifies the base's weights: DoRA's gains, for one, are computed from them.
    """
    parts = (FORMAT_VERSION, shape, geometry, dtype, base)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class ImageFiles:
    """Files of `directory`, of at most `capacity_bytes` together; the oldest-used leave first.

        <location, stamp>.image     header | own
        <shared matrix>.image       header | shared matrix             once for all its users

    The directory is for one base; files of another are removed when they are met.
    """

    def __init__(self, directory: Path, signature: str, capacity_bytes: int) -> None:
        """Raises ConfigError if the directory cannot be made or read."""
        self._directory = directory
        self._signature = signature
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sizes = _sizes_by_age(directory)
        except OSError as error:
            raise ConfigError(f"host cache directory {str(directory)!r}: {error}") from error
        with self._lock:
            self._remove_oldest()

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, headers included."""
        with self._lock:
            return sum(self._sizes.values())

    def find(self, location: str, stamp: str) -> AdapterImage | None:
        """The image written for these adapter files, mapped and checked; None if there is none.

        A file that cannot be used is logged and removed. The info is that which was written.
        """
        label = _own_label(location, stamp)
        found = self._read(label)
        if found is None:
            return None
        header, own = found
        if header.info is None:
            self._discard(_file_name(label), "it has no description of its adapter")
            return None
        info = header.info.to_info()
        shared = {}
        for matrix in info.shared_matrices():
            other = self._read(_shared_label(matrix))
            if other is None:
                return None
            shared[matrix] = other[1]
        return AdapterImage(info, own, shared)

    def write(self, location: str, stamp: str, image: AdapterImage) -> AdapterImage:
        """Write an image, and its shared matrices that have no file yet; returns the mapped one.

        One that is larger than all the room is not written, but logged and returned as it is.
        Raises    OSError, for instance when the disk is full: no partial file is left.
        """
        label = _own_label(location, stamp)
        num_bytes = image.num_bytes + sum(values.nbytes for values in image.shared.values())
        if num_bytes > self._capacity_bytes:
            _logger.warning(
                "image larger than the host cache directory name=%r num_bytes=%d capacity_bytes=%d",
                image.info.name,
                num_bytes,
                self._capacity_bytes,
            )
            return image
        shared = {}
        for matrix, values in image.shared.items():
            shared[matrix] = self._write_shared(matrix, values)
        own = self._write(label, StoredInfo.of(image.info), image.own)
        return AdapterImage(image.info, own, shared)

    def remove(self, location: str, stamp: str) -> None:
        """Remove the image of these adapter files, if there is one; mapped ones stay readable."""
        self._unlink(_file_name(_own_label(location, stamp)))

    def _write_shared(self, matrix: SharedMatrix, values: np.ndarray) -> np.ndarray:
        label = _shared_label(matrix)
        if _file_name(label) in self._sizes and (found := self._read(label)) is not None:
            return found[1]
        return self._write(label, None, values)

    def _write(self, label: bytes, info: StoredInfo | None, values: np.ndarray) -> np.ndarray:
        name = _file_name(label)
        header = ImageHeader(self._signature, label, info, values.nbytes)
        partial = self._directory / (secrets.token_hex(16) + _PARTIAL_SUFFIX)
        try:
            num_bytes, mapped = write_image(partial, header, values)
            partial.rename(self._directory / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        with self._lock:
            self._sizes.pop(name, None)
            self._sizes[name] = num_bytes
            self._remove_oldest()
        return mapped

    def _read(self, label: bytes) -> tuple[ImageHeader, np.ndarray] | None:
        """The file of this label, most recently used from now on."""
        name = _file_name(label)
        path = self._directory / name
        try:
            header, values = read_image(path, self._signature, label)
            os.utime(path)
            size = path.stat().st_size
        except FileNotFoundError:
            with self._lock:
                self._sizes.pop(name, None)
            return None
        except (OSError, SpoiledFile) as error:
            self._discard(name, str(error))
            return None
        with self._lock:
            self._sizes.pop(name, None)
            self._sizes[name] = size
        return header, values

    def _discard(self, name: str, reason: str) -> None:
        _logger.warning("image file not used, removed file=%r reason=%r", name, reason)
        self._unlink(name)

    def _unlink(self, name: str) -> None:
        with self._lock:
            self._sizes.pop(name, None)
            self._unlink_file(name)

    def _unlink_file(self, name: str) -> None:
        try:
            (self._directory / name).unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("image file cannot be removed file=%r error=%s", name, error)

    def _remove_oldest(self) -> None:
        """Keep the bound. Needs the lock; the newest file is the last to go."""
        num_bytes = sum(self._sizes.values())
        while num_bytes > self._capacity_bytes and len(self._sizes) > 1:
            name = next(iter(self._sizes))
            num_bytes -= self._sizes.pop(name)
            self._unlink_file(name)


def _sizes_by_age(directory: Path) -> dict[str, int]:
    """Sizes of image files, the oldest-used first; removes what an unfinished write left."""
    found = []
    for path in directory.iterdir():
        if path.suffix == _PARTIAL_SUFFIX:
            path.unlink(missing_ok=True)
        elif path.suffix == _SUFFIX:
            status = path.stat()
            found.append((status.st_mtime_ns, path.name, status.st_size))
    return {name: size for _, name, size in sorted(found)}


def _own_label(location: str, stamp: str) -> bytes:
    return b"\0".join([b"adapter", os.fsencode(location), os.fsencode(stamp)])


def _shared_label(matrix: SharedMatrix) -> bytes:
    return f"shared\0{matrix.digest}\0{matrix.num_rows}\0{matrix.width}".encode()


def _file_name(label: bytes) -> str:
    return hashlib.blake2b(label, digest_size=20).hexdigest() + _SUFFIX
