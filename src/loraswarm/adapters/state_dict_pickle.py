"""The file that torch.save makes of a state dict: which tensors lie where, with nothing run.

Stricter than torch.load(weights_only=True): a flat dict of row-major tensors, little-endian, in a
zip of members stored as they are. Knows nothing about adapters. Called by adapters/peft_directory
(adapter_model.bin) and adapters/nemo_archive (model_weights.ckpt).
"""

from __future__ import annotations

import math
import os
from io import BufferedReader

from loraswarm.adapters.inert_pickle import PickledTensor, read_state_dict_pickle
from loraswarm.adapters.printable import quoted
from loraswarm.adapters.stored_tensor import DTYPE_BYTES, MAX_DIMENSIONS, Span, TensorEntry
from loraswarm.adapters.zip_directory import read_zip
from loraswarm.errors import AdapterError

PICKLE_FILE = "adapter_model.bin"
MAX_PICKLE_BYTES = 16 * 2**20
_ZIP_MAGIC = b"PK\3\4"
_PICKLE_NAME = "data.pkl"


def read_adapter_model(file: BufferedReader) -> tuple[Span, dict[str, TensorEntry]]:
    """`read_state_dict` of the whole file adapter_model.bin."""
    return read_state_dict(file, Span(0, os.fstat(file.fileno()).st_size), PICKLE_FILE)


def read_state_dict(
    file: BufferedReader, span: Span, label: str
) -> tuple[Span, dict[str, TensorEntry]]:
    """Where the pickle is, and every tensor by name, of the torch file at `span` of `file`.

    Cost      reads the zip's directory and the pickle; no weights.
    Raises    AdapterError naming `label` and what is wrong.
    """
    file.seek(span.begin)
    if span.num_bytes < len(_ZIP_MAGIC) or file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
        raise AdapterError(
            f"{label} is not a zip file as torch.save writes it since torch 1.6; save it again, or"
            " as safetensors"
        )
    members = read_zip(file, span, label)
    prefix = _find_prefix(members, label)
    pickle = members[prefix + _PICKLE_NAME]
    order = members.get(prefix + "byteorder")
    if order is not None and _read_member(file, order, label) != b"little":
        raise AdapterError(f"{label} was not saved on a little-endian machine; save it on one")
    tensors = read_state_dict_pickle(_read_member(file, pickle, label), label)
    return pickle, {
        name: _entry(tensor, members.get(f"{prefix}data/{tensor.storage.key}"), (label, name))
        for name, tensor in tensors.items()
    }


def _find_prefix(members: dict[str, Span], label: str) -> str:
    """Torch puts everything into one folder, named after the file."""
    prefixes = [
        name.removesuffix(_PICKLE_NAME)
        for name in members
        if name.rpartition("/")[2] == _PICKLE_NAME and name.count("/") <= 1
    ]
    if len(prefixes) != 1:
        raise AdapterError(f"{label} is a zip without exactly one {_PICKLE_NAME}, not a torch file")
    return prefixes[0]


def _read_member(file: BufferedReader, member: Span, label: str) -> bytes:
    if member.num_bytes > MAX_PICKLE_BYTES:
        raise AdapterError(
            f"{label} has a pickle of {member.num_bytes} bytes; at most {MAX_PICKLE_BYTES}"
        )
    file.seek(member.begin)
    return file.read(member.num_bytes)


def _entry(tensor: PickledTensor, member: Span | None, place: tuple[str, str]) -> TensorEntry:
    storage, shape = tensor.storage, tensor.shape
    item_bytes = DTYPE_BYTES[storage.dtype]
    if member is None or member.num_bytes != storage.num_elements * item_bytes:
        held = "none" if member is None else f"{member.num_bytes} bytes"
        raise _broken(
            place,
            f"needs a storage of {storage.num_elements} {storage.dtype} elements; the file holds"
            f" {held}",
        )
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise _broken(place, f"has the impossible shape {str(shape)[:80]}")
    if len(tensor.strides) != len(shape) or not _is_contiguous(tensor):
        raise _broken(
            place,
            f"has shape {list(shape)} and strides {str(list(tensor.strides))[:80]}: not row-major;"
            " save it with .contiguous()",
        )
    count = math.prod(shape)
    if not 0 <= tensor.offset <= storage.num_elements - count:
        raise _broken(place, f"lies outside its storage of {storage.num_elements} elements")
    begin = member.begin + tensor.offset * item_bytes
    return TensorEntry(storage.dtype, shape, begin, count * item_bytes)


def _is_contiguous(tensor: PickledTensor) -> bool:
    """Row-major without gaps; the stride of a dimension of one element says nothing."""
    if 0 in tensor.shape:
        return True
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _broken(place: tuple[str, str], problem: str) -> AdapterError:
    label, name = place
    return AdapterError(f"{label}: tensor {quoted(name)} {problem}")
