"""The files of one adapter behind one face: its config, the tensors in it, and what identifies it.

A source knows names, shapes and places of tensors, never what they mean. Opened by adapters/reading
for as long as an adapter is described or read, and by adapters/convert; no torch until a tensor is
read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loraswarm.adapters.printable import MAX_MESSAGE_CHARACTERS, one_line, quoted
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
INDEX_DTYPES = ("U8", "I16", "I32", "I64")
NEMO_SUFFIX = ".nemo"
PEFT_FILES = ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors")


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

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, row-major and little-endian, a megabyte at a time at most.

        Raises    AdapterError naming it, if the file has become shorter.
        """
        ...

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
    """The files of the adapter in directory `path`, or in the .nemo file `path`.

    They are closed when the block is left.

    Raises    AdapterError naming the file and what is wrong with it; OSError if it cannot be read.
    """
    from loraswarm.adapters.nemo_archive import NemoArchive
    from loraswarm.adapters.peft_directory import PeftDirectory

    archive = _find_nemo(path)
    opened = PeftDirectory.open(path) if archive is None else NemoArchive.open(archive)
    with opened as source:
        yield source


def _find_nemo(path: Path) -> Path | None:
    if path.suffix == NEMO_SUFFIX and not path.is_dir():
        return path
    names = sorted(os.listdir(path))
    archives = [name for name in names if name.endswith(NEMO_SUFFIX) and name[0] != "."]
    if not archives:
        return None
    if len(archives) > 1:
        raise AdapterError(
            f"there are {len(archives)} {NEMO_SUFFIX} files, {quoted(archives[0])} and others; give"
            " each a directory of its own"
        )
    beside = [name for name in names if name in PEFT_FILES]
    if beside:
        raise AdapterError(
            f"{quoted(archives[0])} lies beside {beside[0]!r}: two adapters; give each a directory"
            " of its own"
        )
    return path / archives[0]


def open_regular(path: Path) -> BufferedReader:
    """Open a file, never a pipe or a device, which could block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise AdapterError(f"{one_line(path.name)} is not a regular file")
    # It may have become a pipe since: never wait for a writer, and look again.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise AdapterError(f"{one_line(path.name)} is not a regular file")
    return file


@contextmanager
def errors_name(name: str) -> Iterator[None]:
    """Errors inside say which adapter, in one printable line; an unreadable file is one too."""
    try:
        yield
    except AdapterError as error:
        message = str(error)
        cause: Exception = error
    except OSError as error:
        file_name = os.path.basename(os.fspath(error.filename or "a file"))
        message = f"cannot read {quoted(os.fsdecode(file_name))}: {error.strerror or error}"
        cause = error
    else:
        return
    line = one_line(f"adapter {quoted(name)}: {message}", MAX_MESSAGE_CHARACTERS)
    try:
        raise AdapterError(line) from cause
    finally:
        del cause  # else it would keep this frame, and all that called it, until a collection
