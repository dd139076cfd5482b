"""Writes one checkpoint out of a base and an adapter, tensor by tensor, file by file.

Files, names and dtypes stay those of the base; what the tensors hold is models/merged_tensors'.
Called by `loraswarm merge`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from loraswarm.adapters.adapter import Adapter
from loraswarm.adapters.reading import read_adapter, read_adapter_info
from loraswarm.adapters.source import TensorSpec
from loraswarm.adapters.stored_tensor import size_of
from loraswarm.errors import ConfigError
from loraswarm.models.checkpoint import INDEX_FILE, SINGLE_FILE
from loraswarm.models.checkpoint_base import CheckpointBase
from loraswarm.models.checkpoint_writer import (
    new_directory,
    require_new,
    write_index,
    write_json,
    write_tensors,
)
from loraswarm.models.families import decoder_config
from loraswarm.models.loader import FLOAT_DTYPES
from loraswarm.models.merged_tensors import MergedTensor, merged_config, merged_tensors
from loraswarm.models.source import MODEL_FILES, read_config

BLOCK_ELEMENTS = 1 << 24  # 64 MiB in float32
CONFIG_FILE = "config.json"
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was written: tensors that the adapter changed, all tensors, bytes of weights."""

    num_changed: int
    num_tensors: int
    num_bytes: int


def merge(
    model: Path, adapter_path: Path, out: Path, dtype_name: str, report: Report
) -> MergeResult:
    """Write the base in directory `model` with the adapter in it to the new directory `out`.

    Each weight is computed in float32 and rounded once, to the dtype it has in the base's file
    (`dtype_name` "auto") or to the one that is named. `out` appears when it is whole. On a terminal
    a bar shows the progress; elsewhere `report` gets one line a file.

    Cost      memory: the adapter in float32 and a few blocks of BLOCK_ELEMENTS; time: the base is
              read once.
    Raises    ConfigError for model, `out` and dtype; AdapterError for the adapter, if it cannot be
              read, applied to this base, or merged at all.
    """
    require_new(out)
    config = read_config(model)
    with CheckpointBase(model, decoder_config(config).shape()) as base:
        info = read_adapter_info(adapter_path, Path(os.path.abspath(adapter_path)).name, base.shape)
        # Read in float32: what a 16-bit adapter holds stays exact, and 16-bit bases are rounded
        # after the sum only.
        adapter = read_adapter(info, base, torch.float32)
        with torch.inference_mode(), new_directory(out) as directory:
            merging = _Merging(base, config, adapter, dtype_name)
            result = merging.write(directory, report)
            _copy_files(model, directory)
    return result


class _Merging:
    """Places and values of the merged tensors of one run."""

    def __init__(
        self, base: CheckpointBase, config: Mapping[str, Any], adapter: Adapter, dtype_name: str
    ) -> None:
        self._base = base
        self._config = merged_config(config, adapter)
        if dtype_name != "auto":
            keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
            self._config |= dict.fromkeys(keys, dtype_name)
        merged = decoder_config(self._config).shape()
        self._tensors = {
            tensor.name: tensor for tensor in merged_tensors(base.shape, merged, adapter)
        }
        self._files: dict[str, dict[str, TensorSpec]] = {}
        for tensor in self._tensors.values():
            stored = base.stored[tensor.like]
            dtype = stored.dtype if dtype_name == "auto" else _stored_name(dtype_name)
            specs = self._files.setdefault(stored.file.name, {})
            specs[tensor.name] = TensorSpec(dtype, tensor.shape)

    def write(self, directory: Path, report: Report) -> MergeResult:
        """All files of weights, their index if there are several, and config.json."""
        total = sum(size_of(*spec) for specs in self._files.values() for spec in specs.values())
        _check_space(directory, total)
        write_json(directory / CONFIG_FILE, self._config)
        with tqdm(desc="merging", total=total, unit="B", unit_scale=True, disable=None) as bar:
            for file, specs in sorted(self._files.items()):
                write_tensors(directory / file, specs, lambda name: self._blocks(name, bar.update))
                if bar.disable:
                    num_bytes = sum(size_of(*spec) for spec in specs.values())
                    report(f"merged file={file} bytes={num_bytes} total_bytes={total}")
        if self._files.keys() != {SINGLE_FILE}:
            write_index(directory, self._files)
        num_changed = sum(bool(tensor.changes) for tensor in self._tensors.values())
        return MergeResult(num_changed, len(self._tensors), total)

    def _blocks(self, name: str, advance: Callable[[int], object]) -> Iterator[Tensor]:
        tensor = self._tensors[name]
        stored = self._base.stored[tensor.like]
        dtype = FLOAT_DTYPES[self._files[stored.file.name][name].dtype]
        num_rows = tensor.shape[0]
        step = max(1, BLOCK_ELEMENTS // math.prod(tensor.shape[1:]))
        for begin in range(0, num_rows, step):
            values = self._values(tensor, begin, min(begin + step, num_rows))
            block = values.to(dtype)
            is_computed = tensor.changes or block.dtype != FLOAT_DTYPES[stored.dtype]
            if is_computed and not bool(block.isfinite().all()):
                raise ConfigError(
                    f"tensor {name!r} has merged values that"
                    f" {str(dtype).removeprefix('torch.')} cannot hold; use a wider --dtype"
                )
            yield block
            advance(block.nbytes)

    def _values(self, tensor: MergedTensor, begin: int, end: int) -> Tensor:
        """Rows of a merged tensor before they are rounded."""
        if tensor.base_name is None:
            values = torch.zeros(end - begin, *tensor.shape[1:])
        else:
            values = self._base.rows(tensor.base_name, begin, end)
        if tensor.changes:
            values = values.to(torch.promote_types(values.dtype, torch.float32))
        for change in tensor.changes:
            values = change(values, begin)
        return values


def _stored_name(dtype_name: str) -> str:
    names = {str(dtype).removeprefix("torch."): name for name, dtype in FLOAT_DTYPES.items()}
    return names[dtype_name]


def _check_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ConfigError(
            f"the merged weights take {num_bytes:,} bytes; {directory.parent} has {free:,} free"
        )


def _copy_files(model: Path, directory: Path) -> None:
    """What belongs to a model besides weights and config: tokenizer, chat template, defaults."""
    written = {CONFIG_FILE, INDEX_FILE}
    for pattern in MODEL_FILES:
        for file in sorted(model.glob(pattern)):
            if file.name in written or file.suffix == ".safetensors" or not file.is_file():
                continue
            copy = directory / file.relative_to(model)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
