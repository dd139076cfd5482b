"""The header of a safetensors file: which tensors lie where, read without torch or weights.

Checks that the header describes this very file, so that no later read can fall outside it. Knows
nothing about adapters. Called by adapters/peft.
"""

from __future__ import annotations

import json
import math
import os
from io import BufferedReader
from typing import Any, NamedTuple

from loraswarm.errors import AdapterError

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
MAX_NUMBER = 2**63
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}


class TensorEntry(NamedTuple):
    """One tensor: `num_bytes` bytes from byte `begin` of the file, row-major."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


def read_header(file: BufferedReader) -> tuple[bytes, dict[str, TensorEntry]]:
    """The header's own bytes, and every tensor by name.

    Layout    | length n, 8 bytes little-endian | n bytes of JSON | tensors without gaps |

    Cost      reads 8 + n bytes.
    Raises    AdapterError naming what is wrong: a file that is cut short, not safetensors, or whose
              tensors do not fill the rest of the file exactly.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    data_start = LENGTH_BYTES + length
    if len(prefix) < LENGTH_BYTES or length > MAX_HEADER_BYTES or data_start > file_bytes:
        raise AdapterError(
            f"{WEIGHTS_FILE} is cut short or not a safetensors file: it has {file_bytes} bytes and"
            f" declares a header of {length} bytes (at most {MAX_HEADER_BYTES})"
        )
    text = file.read(length)
    entries = {
        name: _entry(name, value, data_start)
        for name, value in _decode(text).items()
        if name != "__metadata__"
    }
    _check_layout(entries, data_start, file_bytes)
    return text, entries


def _decode(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise AdapterError(f"the header of {WEIGHTS_FILE} is not valid JSON") from None
    if not isinstance(header, dict):
        raise AdapterError(f"the header of {WEIGHTS_FILE} is not a JSON object")
    return header


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape = value["dtype"], value["shape"]
        begin, end = value["data_offsets"]
        numbers = [begin, end, *shape]
    except (KeyError, TypeError, ValueError):
        raise _broken(name, "lacks dtype, shape or data_offsets") from None
    if not all(type(number) is int and 0 <= number < MAX_NUMBER for number in numbers):
        raise _broken(name, "has a shape or data_offsets that are not whole numbers >= 0")
    item_bytes = DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    if item_bytes is None:
        raise _broken(name, f"has the unknown dtype {str(dtype)[:20]!r}")
    if end - begin != math.prod(shape) * item_bytes:
        raise _broken(name, f"has {end - begin} bytes, not those of {dtype} {str(shape)[:80]}")
    return TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(entries: dict[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != end:
            raise _broken(name, f"begins at byte {entry.begin}; the one before it ends at {end}")
        end += entry.num_bytes
    if end != file_bytes:
        state = "cut short or still being written" if end > file_bytes else "too long"
        raise AdapterError(
            f"{WEIGHTS_FILE} is {state}: it has {file_bytes} bytes, its header describes {end}"
        )


def _broken(name: str, problem: str) -> AdapterError:
    return AdapterError(f"{WEIGHTS_FILE}: tensor {name[:200]!r} {problem}")
