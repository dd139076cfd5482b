"""The files of one adapter behind one face: its config, the tensors in it, and what identifies it.

A source knows names, shapes and places of tensors, never what they mean. Opened by adapters/reading
for as long as an adapter is described or read; no torch until a tensor is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_DTYPES = ("F32", "F16", "BF16")


class TensorSpec(NamedTuple):
    """What a file says about one tensor; `dtype` as safetensors spells it, e.g. BF16."""

    dtype: str
    shape: tuple[int, ...]


class AdapterSource(Protocol):
    """An adapter's open files.

    `config` is an adapter_config.json, read from the file or put together from another format's;
    `tensors` are by the names that PEFT gives them. `label` is how messages call the weights file,
    `num_bytes` its size. `digest` covers the config, the names, shapes and places of tensors, the
    size of the weights file and its modification time in nanoseconds, not the weights: hashing them
    would make a scan as slow as a full read. It is taken anew at each access.
    """

    @property
    def label(self) -> str: ...

    @property
    def file_format(self) -> str: ...

    @property
    def config(self) -> bytes: ...

    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...

    @property
    def num_bytes(self) -> int: ...

    def digest(self) -> str: ...

    def content_digest(self, names: Iterable[str]) -> str:
        """A digest of these tensors' dtypes, shapes and values: equal for equal tensors anywhere.

        Cost      reads them; no torch.
        """
        ...

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, in host memory of our own (never a mapped file).

        Raises    AdapterError naming it, if the file has become shorter.
        """
        ...


@contextmanager
def open_source(path: Path) -> Iterator[AdapterSource]:
    """The files of the adapter in directory `path`; closed when the block is left.

    Raises    AdapterError naming the file and what is wrong with it; OSError if it cannot be read.
    """
    from loraswarm.adapters.peft_directory import PeftDirectory

    with PeftDirectory.open(path) as source:
        yield source


def open_regular(path: Path) -> BufferedReader:
    """Open a file, never a pipe or a device, which could block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise AdapterError(f"{path.name} is not a regular file")
    return path.open("rb")


@contextmanager
def errors_name(name: str) -> Iterator[None]:
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
