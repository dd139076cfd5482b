"""The base that an adapter is checked against: its sizes, and its weights if they are asked for.

Used by commands/adapters. No torch until a weight is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from loraswarm.adapters.config_keys import ConfigKeys
from loraswarm.adapters.inferred_shape import infer_shape
from loraswarm.adapters.source import AdapterSource
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import ConfigError
from loraswarm.models import config_keys
from loraswarm.models.families import decoder_config
from loraswarm.models.quantization import quantization_of, without_quantization
from loraswarm.models.source import read_config

if TYPE_CHECKING:
    from torch import Tensor

    from loraswarm.models.quantized.base import OpenBase

UNKNOWN_DTYPE = "bfloat16"


class WeightsNotAtHand(Exception):
    """An adapter depends on weights of a base of which only the sizes are known."""


class CheckedBase:
    """`BaseWeights` whose checkpoint is opened when the first weight is asked for.

    `path` is None for a base that was inferred. A context manager, which closes the checkpoint.
    """

    def __init__(self, shape: BaseShape, dtype_name: str, path: Path | None) -> None:
        self._shape = shape
        self._open: OpenBase | None = None
        self.dtype_name = dtype_name
        self.path = path

    @classmethod
    def of_model(cls, path: Path, dtype_name: str) -> Self:
        """The model in directory `path`; `dtype_name` "auto" is that of its config.json.

        Raises    ConfigError if its config.json cannot be read or served.
        """
        with _errors_of_the_base():
            config = read_config(path)
        quantization_of(config, None)  # refuses what is not served
        if dtype_name == "auto":
            dtype_name = config_keys.ConfigKeys(config).dtype_name() or UNKNOWN_DTYPE
        return cls(decoder_config(without_quantization(config)).shape(), dtype_name, path)

    @classmethod
    def of_adapter(cls, source: AdapterSource, dtype_name: str) -> Self | None:
        """The model that the adapter names, if it is a directory here, else what its tensors tell.

        Raises    ConfigError as `of_model` does.
        """
        named = ConfigKeys.parse(source.config).get("base_model_name_or_path")
        if isinstance(named, str) and os.path.isfile(os.path.join(named, "config.json")):
            return cls.of_model(Path(named), dtype_name)
        shape = infer_shape(source)
        if shape is None:
            return None
        return cls(shape, UNKNOWN_DTYPE if dtype_name == "auto" else dtype_name, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open is not None:
            self._open.close()

    @property
    def shape(self) -> BaseShape:
        return self._shape

    def weight(self, path: str) -> Tensor:
        """See `BaseWeights`. Raises WeightsNotAtHand, or ConfigError for a broken checkpoint."""
        with _errors_of_the_base():
            return self._opened().weight(path)

    def bias(self, path: str) -> Tensor | None:
        """See `BaseWeights`. Raises as `weight` does."""
        with _errors_of_the_base():
            return self._opened().bias(path)

    def _opened(self) -> OpenBase:
        # Imported here: headers are checked without torch.
        import torch

        from loraswarm.models.quantized.base import open_base

        if self.path is None:
            raise WeightsNotAtHand
        if self._open is None:
            dtype = getattr(torch, self.dtype_name)
            self._open = open_base(self.path, self._shape, dtype, None)
        return self._open


@contextmanager
def _errors_of_the_base() -> Iterator[None]:
    """A file of the base that cannot be read is a ConfigError: no fault of the adapter."""
    try:
        yield
    except OSError as error:
        name = os.fspath(error.filename or "its files")
        raise ConfigError(f"cannot read {name!r}: {error.strerror or error}") from error
