"""The directory of a tar file, read without trusting it: where each member's bytes lie.

Nothing is ever written to disk under a member's name. Knows nothing about adapters. Called by
adapters/nemo_archive.
Source    POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header".
"""

from __future__ import annotations

import os
from io import BufferedReader
from typing import NamedTuple

from loraswarm.adapters.printable import quoted
from loraswarm.adapters.stored_tensor import Span
from loraswarm.errors import AdapterError

BLOCK_BYTES = 512
MAX_MEMBERS = 2048
MAX_EXTENDED_BYTES = 64 * 1024
_FILES = (b"0", b"\0")
_DIRECTORY = b"5"
_LONG_NAME = b"L"
_EXTENDED = b"x"
_EXTENDED_FOR_ALL = b"g"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"7": "a contiguous file",
    b"S": "a sparse file",
}


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


def read_tar(file: BufferedReader, label: str) -> dict[str, Span]:
    """Where in `file` the bytes of each regular file of the tar lie, by name, without `./`.

    Layout    | header, 512 bytes | member, padded to 512 | header | ... | 512 zeros |

    Cost      reads a header for each member.
    Raises    AdapterError naming `label` and the member: one that leads out of the archive, is
              named twice, is a link, a device or a sparse file, or is cut short; more members than
              MAX_MEMBERS.
    """
    reader = _TarReader(file, label)
    members: dict[str, Span] = {}
    for _ in range(MAX_MEMBERS):
        member = reader.next_member()
        if member is None:
            return members
        name, span = member
        if name in members:
            raise AdapterError(f"{label} has two members named {quoted(name)}")
        if span is not None:
            members[name] = span
    raise AdapterError(f"{label} has more than {MAX_MEMBERS} members")


class _TarReader:
    def __init__(self, file: BufferedReader, label: str) -> None:
        self._file = file
        self._label = label
        self._position = 0
        self._file_bytes = os.fstat(file.fileno()).st_size

    def next_member(self) -> tuple[str, Span | None] | None:
        """Name and place; no place for a directory; None at the end."""
        extended: dict[str, str] = {}
        # One member has at most a header for all, one of its own, and a long name.
        for _ in range(4):
            header = self._header()
            if header is None:
                if extended:
                    raise self._error("is cut short")
                return None
            if header.kind not in (_EXTENDED, _EXTENDED_FOR_ALL, _LONG_NAME):
                return self._member(header, extended)
            body = self._extension(header)
            if header.kind == _LONG_NAME:
                extended["path"] = self._decode(body.rstrip(b"\0"))
            else:
                found = self._records(body)
                if header.kind == _EXTENDED_FOR_ALL and found.keys() & {"path", "size"}:
                    raise self._error("gives all its members one name or size")
                extended |= found
        raise self._error("has a member with too many headers")

    def _member(self, header: _Header, extended: dict[str, str]) -> tuple[str, Span | None]:
        name = self._safe_name(extended.get("path", header.name))
        size_text = extended.get("size", "")
        if size_text and not (size_text.isascii() and size_text.isdigit() and len(size_text) < 20):
            raise self._error(f"has the member {quoted(name)} without a size")
        if header.kind == _DIRECTORY:
            return name + "/", None
        if header.kind not in _FILES:
            kind = _KINDS.get(header.kind, f"of the unknown type {header.kind!r}")
            raise self._error(f"has the member {quoted(name)}, {kind}; only plain files are read")
        return name, self._skip(int(size_text or header.size), name)

    def _header(self) -> _Header | None:
        block = self._read(BLOCK_BYTES)
        self._position += BLOCK_BYTES
        if not any(block):
            return None
        total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if self._number(block[148:156]) != total:
            raise self._error("is not a tar file, or damaged: a header's checksum is wrong")
        name = self._decode(block[:100].partition(b"\0")[0])
        if block[257:263] == b"ustar\0":
            prefix = self._decode(block[345:500].partition(b"\0")[0])
            name = f"{prefix}/{name}" if prefix else name
        return _Header(name, self._number(block[124:136]), block[156:157])

    def _number(self, field: bytes) -> int:
        """Octal digits, or for larger numbers the bytes themselves."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0") or b"0"
        if any(digit not in b"01234567" for digit in digits):
            raise self._error("is not a tar file, or damaged: a header has a malformed number")
        return int(digits, 8)

    def _extension(self, header: _Header) -> bytes:
        if header.size > MAX_EXTENDED_BYTES:
            raise self._error(
                f"has an extended header of {header.size} bytes; at most {MAX_EXTENDED_BYTES}"
            )
        span = self._skip(header.size, "extended header")
        self._file.seek(span.begin)
        return self._file.read(span.num_bytes)

    def _records(self, body: bytes) -> dict[str, str]:
        """Lines `<length of the line> <key>=<value>`."""
        found = {}
        while body.strip(b"\0"):
            digits = body.partition(b" ")[0]
            length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
            key, equals, value = body[len(digits) + 1 : length].partition(b"=")
            if not equals or value[-1:] != b"\n" or length > len(body):
                raise self._error("has a malformed extended header")
            if key.startswith(b"GNU.sparse"):
                raise self._error("has a sparse member; only plain files are read")
            if key in (b"path", b"size"):
                found[key.decode()] = self._decode(value[:-1])
            body = body[length:]
        return found

    def _safe_name(self, name: str) -> str:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or "\\" in name:
            raise self._error(f"has the member {quoted(name)}, which leads out of the archive")
        return "/".join(parts)

    def _skip(self, num_bytes: int, name: str) -> Span:
        span = Span(self._position, num_bytes)
        if self._position + num_bytes > self._file_bytes:
            raise self._error(f"is cut short: {quoted(name)} has {num_bytes} bytes")
        self._position += -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        return span

    def _read(self, num_bytes: int) -> bytes:
        self._file.seek(self._position)
        block = self._file.read(num_bytes)
        if len(block) != num_bytes:
            raise self._error("is cut short or not a tar file")
        return block

    def _decode(self, name: bytes) -> str:
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            raise self._error("has a member whose name is not UTF-8") from None

    def _error(self, problem: str) -> AdapterError:
        return AdapterError(f"{self._label} {problem}")
