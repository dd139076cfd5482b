"""Any adapter that can be opened, written as PEFT writes it: a NeMo file, a pickle.

Copies bytes, no torch; knows formats only through adapters/source. Called by the command
`adapters convert`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.safetensors_header import WEIGHTS_FILE, encode_header
from loraswarm.adapters.source import AdapterSource, errors_name, open_source
from loraswarm.errors import AdapterError


class Conversion(NamedTuple):
    """What was written, and what it was read from."""

    path: Path
    source_format: str
    num_tensors: int
    num_bytes: int


def convert_to_peft(source_path: Path, out_directory: Path) -> Conversion:
    """Write adapter_config.json and adapter_model.safetensors; the config comes last.

    Tensors keep their dtype and values; no base is needed, and none is asked whether it fits.

    Cost      a megabyte of memory besides the names.
    Raises    AdapterError if the source cannot be read, or if `out_directory` is not empty or
              cannot be written.
    """
    with errors_name(source_path.name), open_source(source_path) as source:
        _make_empty(out_directory)
        weights_path = out_directory / WEIGHTS_FILE
        try:
            num_bytes = _write_weights(source, weights_path)
            (out_directory / CONFIG_FILE).write_bytes(source.config)
        except BaseException:
            weights_path.unlink(missing_ok=True)
            raise
        return Conversion(out_directory, source.file_format, len(source.tensors), num_bytes)


def _make_empty(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = os.listdir(path)
    except OSError as error:
        raise AdapterError(f"cannot write to {str(path)!r}: {error.strerror or error}") from error
    if found:
        raise AdapterError(f"{str(path)!r} is not empty; give a new directory")


def _write_weights(source: AdapterSource, path: Path) -> int:
    names, header = encode_header(source.tensors)
    try:
        with path.open("xb") as file:
            file.write(header)
            for name in names:
                for chunk in source.chunks(name):
                    file.write(chunk)
            return file.tell()
    except OSError as error:
        raise AdapterError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
