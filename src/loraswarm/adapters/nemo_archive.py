"""A .nemo file: NeMo's LoRA adapter, read in place and shown as the same adapter saved by PEFT.

A tar, or a gzipped one, of model_config.yaml and the weights of each rank of the training. Members
are never written to disk under their names. Opened through adapters/source.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from loraswarm.adapters.bounded_yaml import MAX_YAML_BYTES
from loraswarm.adapters.nemo_config import (
    CONFIG_MEMBER,
    TARGET_GROUPS,
    NemoConfig,
    parse_nemo_config,
)
from loraswarm.adapters.nemo_layout import to_peft
from loraswarm.adapters.printable import one_line, quoted
from loraswarm.adapters.source import open_regular
from loraswarm.adapters.state_dict_pickle import read_state_dict
from loraswarm.adapters.stored_tensor import Span, TensorEntry
from loraswarm.adapters.tar_directory import read_tar
from loraswarm.adapters.tensor_file import CHUNK_BYTES, TensorFile, digest_of
from loraswarm.errors import AdapterError

# Weights do not get much smaller by gzip; what grows more is made to fill the disk.
MAX_GROWTH = 16
MIN_UNPACKED_BYTES = 16 * 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_WEIGHTS = "model_weights.ckpt"
_DISTRIBUTED = "model_weights/"


class NemoArchive(TensorFile):
    """An `AdapterSource` over one open .nemo file: `original`, and `tar`, which it may be itself.

    A gzipped file is unpacked into a temporary file without a name, which ends with the source.
    """

    file_format = "nemo"

    def __init__(self, label: str, original: BufferedReader, tar: BufferedReader) -> None:
        self._original = original
        members = read_tar(tar, label)
        config = parse_nemo_config(_read_config(tar, members, label), label)
        self._headers = [members[CONFIG_MEMBER]]
        stages = [
            [self._read_checkpoint(tar, members, name, label) for name in ranks]
            for ranks in _checkpoints(config, members, label)
        ]
        tensors = to_peft(config, stages, label)
        super().__init__(label, tar, tensors)
        self.num_bytes = os.fstat(original.fileno()).st_size
        found = {name.split(".")[-3] for name in tensors}
        _check_targets(config, found, label)
        self.config = config.peft_config(found)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[NemoArchive]:
        """Raises AdapterError naming the file, the member, the key or the tensor that is wrong."""
        label = one_line(path.name, 100)
        with open_regular(path) as original:
            is_packed = original.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            original.seek(0)
            if not is_packed:
                yield cls(label, original, original)
                return
            with _unpack(original, label) as tar:
                yield cls(label, original, tar)

    def digest(self) -> str:
        """See `AdapterSource`; config and pickles are read anew."""
        return digest_of(map(self._read_again, self._headers), self._original)

    def _read_checkpoint(
        self, tar: BufferedReader, members: Mapping[str, Span], name: str, label: str
    ) -> Mapping[str, TensorEntry]:
        pickle, entries = read_state_dict(tar, members[name], f"{label}: {name}")
        self._headers.append(pickle)
        return entries


def _read_config(tar: BufferedReader, members: Mapping[str, Span], label: str) -> bytes:
    span = members.get(CONFIG_MEMBER)
    if span is None:
        raise AdapterError(f"{label} holds no {CONFIG_MEMBER}; it is no adapter saved by NeMo 1")
    tar.seek(span.begin)
    return tar.read(min(span.num_bytes, MAX_YAML_BYTES + 1))


def _checkpoints(config: NemoConfig, members: Mapping[str, Span], label: str) -> list[list[str]]:
    if any(name.startswith(_DISTRIBUTED) for name in members):
        raise AdapterError(
            f"{label} holds a distributed checkpoint, {_DISTRIBUTED}, which is not read; export"
            " the adapter from NeMo for Hugging Face PEFT"
        )
    expected = config.checkpoints()
    names = {name for stage in expected for name in stage}
    found = {name for name in members if name.rpartition("/")[2] == _WEIGHTS}
    for name in sorted(names ^ found):
        state = "missing" if name in names else "there, but not called for"
        raise AdapterError(
            f"{label}: {quoted(name)} is {state}; {CONFIG_MEMBER} says that"
            f" tensor_model_parallel_size is {config.tensor_parallel} and"
            f" pipeline_model_parallel_size is {config.pipeline_parallel}"
        )
    return expected


def _check_targets(config: NemoConfig, found: set[str], label: str) -> None:
    """Tensors that the config does not list are applied; listed ones must be there."""
    if not found:
        raise AdapterError(f"{label} holds no tensors")
    for group, targets in TARGET_GROUPS.items():
        lost = config.targets.intersection(targets) - found
        if lost:
            raise AdapterError(
                f"{label}: {CONFIG_MEMBER}: peft.lora_tuning.target_modules has {group}, but the"
                f" file holds no tensor of {', '.join(sorted(lost))}"
            )


@contextmanager
def _unpack(packed: BufferedReader, label: str) -> Iterator[BufferedReader]:
    limit = max(MAX_GROWTH * os.fstat(packed.fileno()).st_size, MIN_UNPACKED_BYTES)
    with tempfile.TemporaryFile() as unpacked:
        try:
            with gzip.GzipFile(fileobj=packed) as stream:
                while part := stream.read(CHUNK_BYTES):
                    unpacked.write(part)
                    if unpacked.tell() > limit:
                        raise AdapterError(f"{label} unpacks to more than {limit} bytes")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise AdapterError(f"{label} cannot be unpacked: {error}") from None
        unpacked.flush()
        with os.fdopen(os.dup(unpacked.fileno()), "rb") as tar:
            yield tar
