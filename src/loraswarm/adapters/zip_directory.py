"""The directory of a zip file whose members are stored as they are, read without trusting it.

Finds where each member's bytes lie; reads and unpacks none. The zip may be a part of a larger file.
Called by adapters/state_dict_pickle.
Source    PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from io import BufferedReader

from loraswarm.adapters.printable import quoted
from loraswarm.adapters.stored_tensor import Span
from loraswarm.errors import AdapterError

MAX_DIRECTORY_BYTES = 8 * 2**20
MAX_MEMBERS = 50_000
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ZIP64_EXTRA = 1
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 1


class _Reader:
    """A part of a file. Offsets count from its begin; nothing outside is ever read."""

    def __init__(self, file: BufferedReader, span: Span, label: str) -> None:
        self._file = file
        self._span = span
        self._label = label

    @property
    def num_bytes(self) -> int:
        return self._span.num_bytes

    def read(self, begin: int, num_bytes: int) -> bytes:
        if not 0 <= begin <= self.num_bytes - num_bytes:
            raise self.error("is cut short or not a zip file")
        self._file.seek(self._span.begin + begin)
        data = self._file.read(num_bytes)
        if len(data) != num_bytes:
            raise self.error("is cut short")
        return data

    def span(self, begin: int, num_bytes: int) -> Span:
        return Span(self._span.begin + begin, num_bytes)

    def error(self, problem: str) -> AdapterError:
        return AdapterError(f"{self._label} {problem}")


def read_zip(file: BufferedReader, span: Span, label: str) -> dict[str, Span]:
    """Where in `file` the bytes of each member of the zip at `span` lie, by name.

    Layout    | name, bytes | name, bytes | ... | directory | (its 64-bit end) | its end |

    Checksums are not verified: torch neither verifies them nor always writes true ones, and a
    reader of single tensors would have to read whole storages.

    Cost      reads the directory and a few bytes before each member.
    Raises    AdapterError naming `label` and the member: compressed, encrypted, named twice, or
              outside the file.
    """
    reader = _Reader(file, span, label)
    num_members, begin, num_bytes = _find_directory(reader)
    directory = reader.read(begin, num_bytes)
    members: dict[str, Span] = {}
    position = 0
    for _ in range(num_members):
        position, name, offset, size = _entry(reader, directory, position)
        if name in members:
            raise reader.error(f"has two members named {quoted(name)}")
        members[name] = _locate(reader, name, offset, size, begin)
    if position != num_bytes:
        raise reader.error("has a malformed zip directory")
    return members


def _find_directory(reader: _Reader) -> tuple[int, int, int]:
    """Number of members, first byte and bytes of the directory, which ends where its end begins."""
    position = reader.num_bytes - _END.size
    magic, disk, start_disk, here, num_members, num_bytes, begin, comment = _END.unpack(
        reader.read(position, _END.size)
    )
    if magic != b"PK\5\6" or comment:
        raise reader.error("is cut short or not a zip file")
    end = position
    if num_members == _FULL_16 or num_bytes == _FULL_32 or begin == _FULL_32:
        end, num_members, num_bytes, begin = _find_directory64(reader, position)
    elif disk or start_disk or here != num_members:
        raise reader.error("is one part of a zip in several files")
    elif begin + num_bytes != position:
        # Torch writes the 64-bit end always, also where nothing needs it.
        end, *found = _find_directory64(reader, position)
        if found != [num_members, num_bytes, begin]:
            raise reader.error("has two zip directories that differ")
    if num_members > MAX_MEMBERS or num_bytes > MAX_DIRECTORY_BYTES:
        raise reader.error(
            f"has {num_members} members in {num_bytes} bytes of zip directory; limits:"
            f" {MAX_MEMBERS} and {MAX_DIRECTORY_BYTES}"
        )
    if begin + num_bytes != end:
        raise reader.error("has a zip directory that is not at its end")
    return num_members, begin, num_bytes


def _find_directory64(reader: _Reader, end: int) -> tuple[int, int, int, int]:
    """Where the 64-bit end begins, then as `_find_directory` in the order number, bytes, begin."""
    locator = reader.read(end - _END64_LOCATOR.size, _END64_LOCATOR.size)
    magic, disk, position, num_disks = _END64_LOCATOR.unpack(locator)
    if magic != b"PK\6\7" or disk or num_disks > 1:
        raise reader.error("has a malformed zip directory")
    fields = _END64.unpack(reader.read(position, _END64.size))
    magic, record_bytes, _, _, disk, start_disk, here, num_members, num_bytes, begin = fields
    follows = position + 12 + record_bytes == end - _END64_LOCATOR.size
    if magic != b"PK\6\6" or not follows or disk or start_disk or here != num_members:
        raise reader.error("has a malformed zip directory")
    return position, num_members, num_bytes, begin


def _entry(reader: _Reader, directory: bytes, position: int) -> tuple[int, str, int, int]:
    """The end of the directory's entry at `position`, its name, offset and size."""
    end = position + _ENTRY.size
    if end > len(directory):
        raise reader.error("has a malformed zip directory")
    fields = _ENTRY.unpack_from(directory, position)
    magic, flags, method, packed, size = fields[0], fields[3], fields[4], fields[8], fields[9]
    name_bytes, extra_bytes, comment_bytes, offset = (*fields[10:13], fields[16])
    if magic != b"PK\1\2":
        raise reader.error("has a malformed zip directory")
    try:
        name = directory[end : end + name_bytes].decode("utf-8")
    except UnicodeDecodeError:
        raise reader.error("has a member whose name is not UTF-8") from None
    extra = directory[end + name_bytes : end + name_bytes + extra_bytes]
    end += name_bytes + extra_bytes + comment_bytes
    if flags & _ENCRYPTED:
        raise reader.error(f"has the encrypted member {quoted(name)}")
    if method != 0:
        raise reader.error(
            f"has the compressed member {quoted(name)}; torch.save stores members as they are"
        )
    size, packed, offset = _widen(reader, extra, [size, packed, offset])
    if packed != size:
        raise reader.error(f"has the member {quoted(name)} of contradictory sizes")
    return end, name, offset, size


def _widen(reader: _Reader, extra: bytes, values: list[int]) -> list[int]:
    """Replace values that do not fit 32 bits by those of the 64-bit extra field, in its order."""
    if _FULL_32 not in values:
        return values
    position = 0
    while position + 4 <= len(extra):
        kind, num_bytes = struct.unpack_from("<2H", extra, position)
        wide = extra[position + 4 : position + 4 + num_bytes]
        position += 4 + num_bytes
        if kind != _ZIP64_EXTRA:
            continue
        numbers = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
        widened = [next(numbers, -1) if value == _FULL_32 else value for value in values]
        if -1 not in widened:
            return widened
    raise reader.error("has a malformed zip directory")


def _locate(reader: _Reader, name: str, offset: int, size: int, directory_begin: int) -> Span:
    encoded = name.encode()
    local = reader.read(offset, _LOCAL.size + len(encoded))
    fields = _LOCAL.unpack_from(local)
    magic, name_bytes, extra_bytes = fields[0], fields[9], fields[10]
    begin = offset + _LOCAL.size + name_bytes + extra_bytes
    if magic != b"PK\3\4" or begin + size > directory_begin:
        raise reader.error(f"has the member {quoted(name)} outside the file")
    if name_bytes != len(encoded) or local[_LOCAL.size :] != encoded:
        raise reader.error(f"has the member {quoted(name)} under two names")
    return reader.span(begin, size)
