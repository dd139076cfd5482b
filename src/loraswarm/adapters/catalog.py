"""Which adapter names may be asked for, and why the others may not. No torch.

Owns the map from names to described adapters, found by reading the roots given to it; one bad
directory never hides the good ones. Knows nothing of weights or memory. Built at start, asked by
the engine and by listings.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.adapters.source import NEMO_SUFFIX
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.client import AdapterSummary
from loraswarm.errors import AdapterError, ConfigError, UnknownAdapter

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A directory that is not served, and why."""

    name: str
    path: Path
    reason: str


class Catalog:
    """The adapters under some roots, in the state of the last `scan`.

    A root holds one directory per adapter, whose name is the adapter's; hidden ones and plain files
    are passed over, except .nemo files, which are refused: they need a directory each. A root that
    holds adapter_config.json, or one .nemo file and no directory, is itself one adapter. The first
    directory of a name owns it, be it served or refused.
    """

    def __init__(
        self, roots: Sequence[str], shape: BaseShape, model_name: str | None = None
    ) -> None:
        """`model_name` is the id of the base model, which no adapter may take."""
        self._roots = tuple(roots)
        self._shape = shape
        self._model_name = model_name
        self._served: dict[str, AdapterInfo] = {}
        self._refused: tuple[Refusal, ...] = ()

    @property
    def served(self) -> Mapping[str, AdapterInfo]:
        """Adapters that can be asked for, by name, as of the last scan."""
        return MappingProxyType(self._served)

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """Directories that are not served, in the order they were found."""
        return self._refused

    def scan(self) -> None:
        """Read every root again; what was served before is replaced.

        Cost      the headers of all adapters, no weights.
        Raises    ConfigError if a root is not a readable directory; the catalog is then unchanged.
        """
        start_s = time.perf_counter()
        served: dict[str, AdapterInfo] = {}
        refused: list[Refusal] = []
        owners: dict[str, Path] = {}
        for path in self._directories():
            name = _printable(path.name)
            try:
                self._check_name(path, owners)
                served[name] = read_adapter_info(path, name, self._shape)
            except AdapterError as error:
                refused.append(Refusal(name, path, str(error)))
            owners.setdefault(name, path)
        self._served, self._refused = served, tuple(refused)
        self._log((time.perf_counter() - start_s) * 1e3)

    def resolve(self, name: str) -> AdapterInfo:
        """The adapter of that name.

        Raises    AdapterError with the reason if it is there but refused; UnknownAdapter, listing
                  the served ones, if it is not there.
        """
        info = self._served.get(name)
        if info is not None:
            return info
        for refusal in self._refused:
            if refusal.name == name:
                raise AdapterError(refusal.reason)
        raise UnknownAdapter(name, self._served)

    def summaries(self) -> tuple[AdapterSummary, ...]:
        """Served and refused adapters, sorted by name."""
        rows = [_summary(info) for info in self._served.values()]
        rows += [
            AdapterSummary(
                name=refusal.name, path=_printable(str(refusal.path)), refusal=refusal.reason
            )
            for refusal in self._refused
        ]
        return tuple(sorted(rows, key=lambda row: (row.name, row.path)))

    def _directories(self) -> Iterator[Path]:
        for root in self._roots:
            path = Path(os.path.abspath(root))
            if not os.path.isdir(path):
                problem = "is not a directory" if os.path.exists(path) else "does not exist"
                raise ConfigError(
                    f"--adapters {root!r} {problem}; give a directory that holds one directory"
                    " per adapter"
                )
            if os.path.exists(path / CONFIG_FILE):
                yield path
                continue
            found = list(_candidates(path))
            is_adapter = len(found) == 1 and _is_nemo_file(found[0])
            yield from [path] if is_adapter else found

    def _check_name(self, path: Path, owners: Mapping[str, Path]) -> None:
        name = path.name
        if _printable(name) != name or name != name.strip() or not name:
            raise AdapterError(
                f"the directory name {_printable(name)!r} cannot be a model id: it is empty, has"
                " unprintable characters, or begins or ends with a space; rename it"
            )
        if name == self._model_name:
            raise AdapterError(
                f"adapter {name!r} has the name of the base model; rename one of them"
                " (--served-model-name)"
            )
        if name in owners:
            raise AdapterError(
                f"adapter {name!r} is already named by {_printable(str(owners[name]))!r};"
                " rename one of them"
            )
        if _is_nemo_file(path):
            raise AdapterError(
                f"{name!r} lies beside other adapters; move it into a directory of its own, which"
                " gives the adapter its name"
            )
        if os.path.islink(path) and not os.path.exists(path):
            raise AdapterError(f"adapter {name!r} is a broken symbolic link")

    def _log(self, elapsed_ms: float) -> None:
        for refusal in self._refused:
            _logger.warning(
                "adapter refused name=%r path=%r reason=%r",
                refusal.name,
                _printable(str(refusal.path)),
                refusal.reason,
            )
        _logger.info(
            "adapters scanned served=%d refused=%d elapsed_ms=%.1f",
            len(self._served),
            len(self._refused),
            elapsed_ms,
        )


def _is_nemo_file(path: Path) -> bool:
    return path.name.endswith(NEMO_SUFFIX) and os.path.isfile(path)


def _candidates(root: Path) -> Iterator[Path]:
    """What may be an adapter under `root`, sorted by name: directories, links that are no files,
    .nemo files.

    A link that leads nowhere is among them, so that it is reported instead of being overlooked.
    """
    try:
        with os.scandir(root) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"--adapters {str(root)!r} cannot be read: {error.strerror}") from error
    for entry in found:
        is_link = entry.is_symlink()
        is_directory = not os.path.isfile(entry) if is_link else entry.is_dir()
        if (is_directory or _is_nemo_file(Path(entry))) and not entry.name.startswith("."):
            yield Path(entry)


def _summary(info: AdapterInfo) -> AdapterSummary:
    return AdapterSummary(
        name=info.name,
        path=_printable(str(info.path)),
        method=info.method,
        max_rank=info.max_rank,
        num_bytes=info.num_bytes,
        digest=info.digest,
        file_format=info.file_format,
    )


def _printable(text: str) -> str:
    """`text`, or its escaped form if a listing could not show it."""
    return text if text.isprintable() else ascii(text)[1:-1]
