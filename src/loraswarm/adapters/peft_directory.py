"""A directory as PEFT saves it: adapter_config.json beside adapter_model.safetensors or .bin.

Where both weights files are there, PEFT reads the safetensors, and so do we. Knows no method:
names, shapes and bytes only. Opened through adapters/source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.safetensors_header import WEIGHTS_FILE, read_header
from loraswarm.adapters.source import open_regular
from loraswarm.adapters.state_dict_pickle import PICKLE_FILE, read_adapter_model
from loraswarm.adapters.stored_tensor import Span, TensorEntry
from loraswarm.adapters.tensor_file import TensorFile, digest_of
from loraswarm.errors import AdapterError

# Lists of trained tokens are the longest that a config holds.
MAX_CONFIG_BYTES = 4 * 2**20


class WeightsFormat(NamedTuple):
    """A weights file that PEFT writes. `read_entries` says where its header and tensors lie."""

    file_name: str
    file_format: str
    read_entries: Callable[[BufferedReader], tuple[Span, Mapping[str, TensorEntry]]]


_FORMATS = (
    WeightsFormat(WEIGHTS_FILE, "peft", read_header),
    WeightsFormat(PICKLE_FILE, "peft-pickle", read_adapter_model),
)


class PeftDirectory(TensorFile):
    """An `AdapterSource` over the config and one open weights file."""

    def __init__(self, path: Path, file: BufferedReader, weights: WeightsFormat) -> None:
        self._path = path
        self.file_format = weights.file_format
        self.config = _read_config(path)
        self._header, entries = weights.read_entries(file)
        super().__init__(weights.file_name, file, entries)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[PeftDirectory]:
        """Raises AdapterError naming the file that is missing or malformed."""
        if not (path / CONFIG_FILE).exists():
            raise AdapterError(
                f"{CONFIG_FILE} is missing; an adapter is a directory saved by PEFT, or one that"
                " holds one .nemo file"
            )
        for weights in _FORMATS:
            if (path / weights.file_name).exists():
                break
        else:
            raise AdapterError(f"{WEIGHTS_FILE} is missing; save it with PEFT's save_pretrained")
        with open_regular(path / weights.file_name) as file:
            yield cls(path, file, weights)

    def digest(self) -> str:
        """See `AdapterSource`; config and header are read anew."""
        parts = (_read_config(self._path), self._read_again(self._header))
        return digest_of(parts, self._file)


def _read_config(path: Path) -> bytes:
    with open_regular(path / CONFIG_FILE) as config_file:
        config = config_file.read(MAX_CONFIG_BYTES + 1)
    if len(config) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes")
    return config
