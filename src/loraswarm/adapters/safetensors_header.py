"""The header of a safetensors file: which tensors lie where, read and written without torch.

Checks that the header describes this very file, so that no later read can fall outside it. Knows
nothing about adapters. Called by adapters/peft_directory and adapters/convert.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import BufferedReader
from typing import Any

from loraswarm.adapters.printable import quoted
from loraswarm.adapters.source import TensorSpec
from loraswarm.adapters.stored_tensor import (
    DTYPE_BYTES,
    MAX_DIMENSIONS,
    Span,
    TensorEntry,
    size_of,
)
from loraswarm.errors import AdapterError

WEIGHTS_FILE = "adapter_model.safetensors"
# About 50,000 tensors, with three brackets each. Brackets are what costs time and memory to decode.
MAX_HEADER_BYTES = 8 * 2**20
MAX_BRACKETS = 200_000
LENGTH_BYTES = 8
ALIGNMENT_BYTES = 8
MAX_NUMBER = 2**63


def read_header(file: BufferedReader) -> tuple[Span, dict[str, TensorEntry]]:
    """Where the header is, and every tensor by name.

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
    return Span(0, data_start), entries


def encode_header(specs: Mapping[str, TensorSpec]) -> tuple[list[str], bytes]:
    """The order in which tensors must follow, and everything that precedes them in the file.

    Wide dtypes come first, so that every tensor begins at a multiple of its element's size.
    """
    names = sorted(specs, key=lambda name: (-DTYPE_BYTES[specs[name].dtype], name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + size_of(*specs[name])
        entries[name] = {
            "dtype": specs[name].dtype,
            "shape": list(specs[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return names, len(text).to_bytes(LENGTH_BYTES, "little") + text


def _decode(text: bytes) -> dict[str, Any]:
    if text.count(b"[") + text.count(b"{") > MAX_BRACKETS:
        raise AdapterError(
            f"the header of {WEIGHTS_FILE} has more than {MAX_BRACKETS} lists and objects"
        )
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
    if len(numbers) - 2 > MAX_DIMENSIONS:
        raise _broken(name, f"has more than {MAX_DIMENSIONS} dimensions")
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
    return AdapterError(f"{WEIGHTS_FILE}: tensor {quoted(name)} {problem}")
