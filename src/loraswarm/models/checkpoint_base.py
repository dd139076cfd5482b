"""A base's weights straight from its checkpoint, for those who read adapters without a decoder.

Maps the files and copies nothing, so that a large base takes little memory. Knows no adapters.
Used by models/merge, by `loraswarm adapters check` and by engine/loader_worker.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, BaseShape
from loraswarm.errors import ConfigError
from loraswarm.models.checkpoint import StoredTensor, open_tensors, stored_tensors
from loraswarm.models.loader import FLOAT_DTYPES

OLD_ROPE = "rotary_emb.inv_freq"


class CheckpointBase:
    """`BaseWeights` of the checkpoint in directory `path`, in the dtypes of its files.

    A context manager: files are opened when first asked for and closed with the block; tensors are
    views of them, not to be written to. `stored` has the tensors that a decoder of this shape
    takes, by name; those of a tied lm_head and of old rope tables are left out.

    Raises    ConfigError naming the tensor that is missing, unexpected, of another shape or not of
              a float dtype.
    """

    def __init__(self, path: Path, shape: BaseShape) -> None:
        self._shape = shape
        self._files = ExitStack()
        self._readers: dict[Path, Any] = {}
        self.stored: dict[str, StoredTensor] = {
            name: stored
            for name, stored in stored_tensors(path).items()
            if not name.endswith(OLD_ROPE)
        }
        if shape.ties_embeddings:
            self.stored.pop(f"{LM_HEAD}.weight", None)
        _check(path, self.stored, tensor_shapes(shape))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    @property
    def shape(self) -> BaseShape:
        return self._shape

    def weight(self, path: str) -> Tensor:
        """See `BaseWeights`; in the dtype of the file."""
        if path == LM_HEAD and self._shape.ties_embeddings:
            path = EMBEDDING
        tensor: Tensor = self._reader(f"{path}.weight").get_tensor(f"{path}.weight")
        return tensor

    def bias(self, path: str) -> Tensor | None:
        """See `BaseWeights`; in the dtype of the file."""
        name = f"{path}.bias"
        return self._reader(name).get_tensor(name) if name in self.stored else None

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows `begin : end` of the tensor `name`, in the dtype of the file."""
        rows: Tensor = self._reader(name).get_slice(name)[begin:end]
        return rows

    def _reader(self, name: str) -> Any:
        file = self.stored[name].file
        if file not in self._readers:
            self._readers[file] = self._files.enter_context(open_tensors(file))
        return self._readers[file]


class ConvertedBase:
    """`BaseWeights` of the checkpoint in directory `path`, in `dtype`: the same bits that a decoder
    of that dtype has. Several threads may ask at once.

    The checkpoint is opened when the first weight is asked for, and stays open until `close`.
    Raises    ConfigError as `CheckpointBase` does, also for a file that cannot be read.
    """

    def __init__(self, path: Path, shape: BaseShape, dtype: torch.dtype) -> None:
        self._path = path
        self._shape = shape
        self._dtype = dtype
        self._lock = threading.Lock()
        self._checkpoint: CheckpointBase | None = None

    @property
    def shape(self) -> BaseShape:
        return self._shape

    def weight(self, path: str) -> Tensor:
        """See `BaseWeights`; a copy, unless the file has the dtype."""
        with self._lock:
            stored = self._opened().weight(path)
        return stored.to(self._dtype)

    def bias(self, path: str) -> Tensor | None:
        """See `BaseWeights`."""
        with self._lock:
            stored = self._opened().bias(path)
        return None if stored is None else stored.to(self._dtype)

    def close(self) -> None:
        """Close the checkpoint's files; they are opened again if a weight is asked for."""
        with self._lock:
            if self._checkpoint is not None:
                self._checkpoint.__exit__(None, None, None)
                self._checkpoint = None

    def _opened(self) -> CheckpointBase:
        try:
            self._checkpoint = self._checkpoint or CheckpointBase(self._path, self._shape)
        except OSError as error:
            name = os.fspath(error.filename or self._path)
            raise ConfigError(f"cannot read {name!r}: {error.strerror or error}") from error
        return self._checkpoint


def tensor_shapes(shape: BaseShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this shape by name; a tied lm_head has none."""
    shapes: dict[str, tuple[int, ...]] = {}
    sites = [shape.embedding_site, *range(shape.num_linears)]
    if not shape.ties_embeddings:
        sites.append(shape.head_site)
    for site in sites:
        in_size, out_size = shape.site_sizes(site)
        path = shape.site_path(site)
        is_table = site == shape.embedding_site
        shapes[f"{path}.weight"] = (in_size, out_size) if is_table else (out_size, in_size)
        if shape.has_bias(site):
            shapes[f"{path}.bias"] = (out_size,)
    for path, size in shape.norm_sizes().items():
        shapes[f"{path}.weight"] = (size,)
    return shapes


def _check(
    path: Path, stored: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]]
) -> None:
    for name in sorted(expected.keys() - stored.keys()):
        raise ConfigError(f"{path} lacks tensor {name!r}")
    for name in sorted(stored.keys() - expected.keys()):
        raise ConfigError(f"{path} holds tensor {name!r}, which config.json has no place for")
    for name, tensor in stored.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise ConfigError(
                f"tensor {name!r} is {tensor.dtype}; weights must be one of"
                f" {', '.join(FLOAT_DTYPES)} (quantized checkpoints are not supported)"
            )
        if tensor.shape != expected[name]:
            raise ConfigError(
                f"tensor {name!r} has shape {list(tensor.shape)}; config.json calls for"
                f" {list(expected[name])}"
            )
