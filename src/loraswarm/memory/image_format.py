"""The format of one image file: a checked header, then bytes to be mapped.

Knows neither directories nor which file is for what (image_file does, the only caller).
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import msgspec
import numpy as np

from loraswarm import __version__
from loraswarm.adapters.adapter import AdapterInfo, ModuleInfo, OverlayInfo
from loraswarm.errors import LoRASwarmError
from loraswarm.memory.geometry import ALIGNMENT_BYTES
from loraswarm.memory.mapping import map_file

FORMAT_VERSION = f"1 of {__version__}"
_MAGIC = b"LoRASwarm image\n"
_PREFIX = struct.Struct("<QI")
_MAX_HEADER_BYTES = 1 << 26
_CHECK_BYTES = 1 << 20


class SpoiledFile(LoRASwarmError):
    """An image file is cut short, was changed, or is not the one that was looked for."""


class StoredInfo(msgspec.Struct, frozen=True):
    """AdapterInfo without its plan; paths and names as bytes, since they need not be Unicode."""

    name: bytes
    path: bytes
    digest: str
    method: str
    modules: tuple[ModuleInfo, ...]
    num_bytes: int
    overlays: tuple[OverlayInfo, ...]
    invocation_tokens: tuple[int, ...] | None
    file_format: str

    @classmethod
    def of(cls, info: AdapterInfo) -> StoredInfo:
        return cls(
            name=os.fsencode(info.name),
            path=os.fsencode(info.path),
            digest=info.digest,
            method=info.method,
            modules=info.modules,
            num_bytes=info.num_bytes,
            overlays=info.overlays,
            invocation_tokens=info.invocation_tokens,
            file_format=info.file_format,
        )

    def to_info(self) -> AdapterInfo:
        return AdapterInfo(
            name=os.fsdecode(self.name),
            path=Path(os.fsdecode(self.path)),
            digest=self.digest,
            method=self.method,
            modules=self.modules,
            num_bytes=self.num_bytes,
            overlays=self.overlays,
            invocation_tokens=self.invocation_tokens,
            file_format=self.file_format,
        )


class ImageHeader(msgspec.Struct, frozen=True):
    """What the body is: of which base, of what (a label), and its size and checksum.

    `info` is None for a shared matrix.
    """

    signature: str
    label: bytes
    info: StoredInfo | None
    num_bytes: int
    body_crc: int = 0
    version: str = FORMAT_VERSION


def write_image(path: Path, header: ImageHeader, body: np.ndarray) -> tuple[int, np.ndarray]:
    """Write a new file; returns its size and the body, mapped from it.

        | magic | size of header, its crc | header | padding to 64 | body |

    Raises    OSError; what was written so far is the caller's to remove.
    """
    encoded = msgspec.msgpack.encode(msgspec.structs.replace(header, body_crc=_crc(body)))
    start = _MAGIC + _PREFIX.pack(len(encoded), zlib.crc32(encoded)) + encoded
    start += bytes(-len(start) % ALIGNMENT_BYTES)
    with path.open("x+b") as file:
        file.write(start)
        file.write(body.data)
        file.flush()
        num_bytes = len(start) + body.nbytes
        return num_bytes, map_file(file.fileno(), num_bytes)[len(start) :]


def read_image(path: Path, signature: str, label: bytes) -> tuple[ImageHeader, np.ndarray]:
    """The header and the body, mapped, of the file at `path`, with every byte checked.

    Raises    OSError; SpoiledFile unless it is whole and has this signature and label.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(_MAGIC) + _PREFIX.size)
        if len(start) < len(_MAGIC) + _PREFIX.size or not start.startswith(_MAGIC):
            raise SpoiledFile("it is no image file")
        header_bytes, header_crc = _PREFIX.unpack_from(start, len(_MAGIC))
        if header_bytes > min(size, _MAX_HEADER_BYTES):
            raise SpoiledFile(f"a header of {header_bytes:,} bytes in a file of {size:,}")
        encoded = file.read(header_bytes)
        if zlib.crc32(encoded) != header_crc:
            raise SpoiledFile("its header was changed or cut short")
        header = _decoded(encoded, signature, label)
        begin = len(start) + header_bytes
        begin += -begin % ALIGNMENT_BYTES
        if size != begin + header.num_bytes:
            raise SpoiledFile(f"{size:,} bytes; its header says {begin + header.num_bytes:,}")
        body = map_file(file.fileno(), size)[begin:]
    if _crc(body) != header.body_crc:
        raise SpoiledFile("its bytes do not have the checksum they were written with")
    return header, body


def _decoded(encoded: bytes, signature: str, label: bytes) -> ImageHeader:
    try:
        version = msgspec.msgpack.decode(encoded, type=_Version).version
        if version != FORMAT_VERSION:
            raise SpoiledFile(f"format {version!r}; this is {FORMAT_VERSION!r}")
        header = msgspec.msgpack.decode(encoded, type=ImageHeader)
    except msgspec.MsgspecError as error:
        raise SpoiledFile(f"its header cannot be read: {error}") from error
    if header.signature != signature:
        raise SpoiledFile("it was made for another base, dtype or page size")
    if header.label != label:
        raise SpoiledFile("it is the image of something else")
    return header


class _Version(msgspec.Struct):
    version: str


def _crc(body: np.ndarray) -> int:
    """In pieces: other threads run beside each."""
    crc = 0
    for begin in range(0, body.nbytes, _CHECK_BYTES):
        crc = zlib.crc32(body[begin : begin + _CHECK_BYTES].data, crc)
    return crc
