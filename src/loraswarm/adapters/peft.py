"""A PEFT directory to an adapter: first its description from headers, later its weights.

Owns the rule that a described file is the file that is read. Knows config keys and tensor names
only through peft_config and peft_plan. Called by the catalog and by whoever loads weights.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import Adapter, AdapterInfo
from loraswarm.adapters.peft_config import CONFIG_FILE, parse_config
from loraswarm.adapters.peft_plan import check_tensors, plan_adapter
from loraswarm.adapters.safetensors_header import WEIGHTS_FILE, TensorEntry, read_header
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    import torch

MAX_CONFIG_BYTES = 16 * 2**20
_PICKLE_FILE = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class _Description:
    """What is known of a directory without reading weights."""

    config: bytes
    tensors: dict[str, TensorEntry]
    digest: str
    num_bytes: int


def read_adapter_info(path: Path, name: str, shape: BaseShape) -> AdapterInfo:
    """Describe the adapter in directory `path`, from its config and the header of its weights.

    The digest covers the config, the header, the size of the weights file and its modification time
    in nanoseconds, not the weights: hashing them would make a scan as slow as a full read.

    Cost      two small reads; no torch; under a millisecond for 336 tensors of a known recipe.
    Raises    AdapterError naming the adapter and the key, tensor or file that is wrong.
    """
    with _errors_name(name), _open_weights(path) as file:
        description = _describe(path, file)
        config = parse_config(description.config)
        plan = plan_adapter(config, shape)
        check_tensors(plan, config, shape, description.tensors)
        return AdapterInfo(
            name=name,
            path=path,
            digest=description.digest,
            method=config.method,
            modules=plan.modules,
            num_bytes=description.num_bytes,
        )


def read_adapter(info: AdapterInfo, dtype: torch.dtype) -> Adapter:
    """Read the weights of a described adapter into host memory of our own, in `dtype`.

    The file may be replaced or overwritten at any time: weights are copied, never mapped, and are
    those that `info` describes, or none.

    Shapes    per module A [rank, in] and B transposed [rank, out], contiguous.
    Raises    AdapterError naming the adapter and the tensor, for NaN, infinity or a value that
              `dtype` cannot hold, and for files that have changed since they were described.
    """
    # Imported here: describing adapters must not need torch.
    from loraswarm.adapters.peft_weights import read_modules

    with _errors_name(info.name), _open_weights(info.path) as file:
        description = _describe(info.path, file)
        _require_unchanged(info, description.digest)
        modules = read_modules(file, info.modules, description.tensors, dtype)
        _require_unchanged(info, _describe(info.path, file).digest)
        return Adapter(info, modules)


def _describe(path: Path, file: BufferedReader) -> _Description:
    with _open_regular(path / CONFIG_FILE) as config_file:
        config = config_file.read(MAX_CONFIG_BYTES + 1)
    if len(config) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes")
    file.seek(0)
    header, tensors = read_header(file)
    status = os.fstat(file.fileno())
    digest = hashlib.blake2b(digest_size=16)
    for part in (config, header, f"{status.st_size} {status.st_mtime_ns}".encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return _Description(config, tensors, digest.hexdigest(), status.st_size)


def _require_unchanged(info: AdapterInfo, digest: str) -> None:
    if digest != info.digest:
        raise AdapterError("its files have changed since the adapter was described; scan again")


@contextmanager
def _errors_name(name: str) -> Iterator[None]:
    """Errors inside say which adapter; an unreadable file is an AdapterError too."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {error}") from error
    except OSError as error:
        file_name = os.path.basename(os.fspath(error.filename or "a file"))
        raise AdapterError(
            f"adapter {name!r}: cannot read {file_name!r}: {error.strerror or error}"
        ) from error


def _open_weights(path: Path) -> BufferedReader:
    if not (path / CONFIG_FILE).exists():
        raise AdapterError(f"{CONFIG_FILE} is missing; an adapter is a directory saved by PEFT")
    if not (path / WEIGHTS_FILE).exists():
        advice = "save it with PEFT's save_pretrained"
        if (path / _PICKLE_FILE).exists():
            advice = f"{_PICKLE_FILE} is not read; save with safe_serialization=True"
        raise AdapterError(f"{WEIGHTS_FILE} is missing; {advice}")
    return _open_regular(path / WEIGHTS_FILE)


def _open_regular(path: Path) -> BufferedReader:
    """Open a file, never a pipe or a device, which could block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise AdapterError(f"{path.name} is not a regular file")
    return path.open("rb")
