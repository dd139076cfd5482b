"""Which adapter names may be asked for, and why the others may not. No torch.

Owns the map from names to described adapters, and the rule by which a directory holds adapters; one
bad directory never hides the good ones. Knows nothing of weights or memory. Built at start, asked
by the engine and by listings; the rule also by the commands.
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
from loraswarm.adapters.source import NEMO_SUFFIX, PEFT_FILES
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
    """The adapters that `adapter_paths` finds under some roots, in the state of the last `scan`.

    The name of its directory is the adapter's. The first directory of a name owns it, be it served
    or refused.
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

    def scan(self, is_logged: bool = True) -> None:
        """Read every root again; what was served before is replaced.

        Whatever describing an adapter raises refuses that adapter alone. `is_logged` is about the
        refusals and the totals.

        Cost      the headers of all adapters, no weights.
        Raises    ConfigError if a root is not a readable directory; the catalog is then unchanged.
        """
        start_s = time.perf_counter()
        served: dict[str, AdapterInfo] = {}
        refused: list[Refusal] = []
        owners: dict[str, Path] = {}
        for path in self._paths():
            name = printable(path.name)
            try:
                check_entry(path)
                self._check_owner(name, owners)
                served[name] = read_adapter_info(path, name, self._shape)
            except Exception as error:  # whatever is in a file, it must harm its own adapter only
                refused.append(Refusal(name, path, refusal_reason(name, error)))
            owners.setdefault(name, path)
        self._served, self._refused = served, tuple(refused)
        if is_logged:
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
                name=refusal.name, path=printable(str(refusal.path)), refusal=refusal.reason
            )
            for refusal in self._refused
        ]
        return tuple(sorted(rows, key=lambda row: (row.name, row.path)))

    def _paths(self) -> Iterator[Path]:
        for root in self._roots:
            try:
                yield from adapter_paths(root)
            except ConfigError as error:
                raise ConfigError(f"--adapters {error}") from error

    def _check_owner(self, name: str, owners: Mapping[str, Path]) -> None:
        if name == self._model_name:
            raise AdapterError(
                f"adapter {name!r} has the name of the base model; rename one of them"
                " (--served-model-name)"
            )
        if name in owners:
            raise AdapterError(
                f"adapter {name!r} is already named by {str(owners[name])!r}; rename one of them"
            )

    def _log(self, elapsed_ms: float) -> None:
        for refusal in self._refused:
            _logger.warning(
                "adapter refused name=%r path=%r reason=%r",
                refusal.name,
                printable(str(refusal.path)),
                refusal.reason,
            )
        _logger.info(
            "adapters scanned served=%d refused=%d elapsed_ms=%.1f",
            len(self._served),
            len(self._refused),
            elapsed_ms,
        )


def adapter_paths(root: str) -> list[Path]:
    """Where the adapters of directory `root` are: absolute paths, sorted by name.

    A root holds one directory per adapter. Hidden ones and plain files are passed over, except
    .nemo files, which need a directory each: `check_entry` refuses them. A root that holds
    adapter_config.json is itself one adapter; so is one without directories that holds one .nemo
    file or weights.

    Raises    ConfigError if `root` is not a readable directory.
    """
    path = Path(os.path.abspath(root))
    try:
        names, found = _candidates(path)
    except (FileNotFoundError, ValueError):  # ValueError: no file has such a name
        problem = "does not exist"
    except NotADirectoryError:
        problem = "is not a directory"
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    else:
        is_nemo = len(found) == 1 and _is_nemo_file(found[0])
        has_weights = not found and not names.isdisjoint(PEFT_FILES)
        return [path] if CONFIG_FILE in names or is_nemo or has_weights else found
    raise ConfigError(f"{root!r} {problem}; give a directory that holds one directory per adapter")


def check_entry(path: Path) -> None:
    """Raise AdapterError if the name or the kind of what `adapter_paths` found cannot be served."""
    name = path.name
    if printable(name) != name or name != name.strip() or not name:
        raise AdapterError(
            f"the directory name {name!r} cannot be a model id: it is empty, has"
            " unprintable characters, or begins or ends with a space; rename it"
        )
    if _is_nemo_file(path):
        raise AdapterError(
            f"{name!r} lies beside other adapters; move it into a directory of its own, which"
            " gives the adapter its name"
        )
    if os.path.islink(path) and not os.path.exists(path):
        raise AdapterError(f"adapter {name!r} is a broken symbolic link")


def refusal_reason(name: str, error: Exception) -> str:
    """Why adapter `name` is refused if reading it raised `error`; a bug of ours goes to the log."""
    if isinstance(error, AdapterError):
        return str(error)
    _logger.error("adapter not described name=%r", name, exc_info=error)
    return f"adapter {name!r} could not be read: {type(error).__name__} (see the log)"


def printable(text: str) -> str:
    """`text`, or its escaped form if a listing could not show it."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _is_nemo_file(path: Path) -> bool:
    return path.name.endswith(NEMO_SUFFIX) and os.path.isfile(path)


def _candidates(root: Path) -> tuple[set[str], list[Path]]:
    """All names in `root`, and what may be an adapter there, sorted: directories, links that are
    no files, .nemo files.

    A link that leads nowhere is among them, so that it is reported instead of being overlooked.
    """
    with os.scandir(root) as entries:
        items = sorted(entries, key=lambda entry: entry.name)
    found = []
    for item in items:
        is_link = item.is_symlink()
        is_file = os.path.isfile(item) if is_link else item.is_file()
        is_directory = not is_file if is_link else item.is_dir()
        is_nemo = is_file and item.name.endswith(NEMO_SUFFIX)
        if (is_directory or is_nemo) and not item.name.startswith("."):
            found.append(root / item.name)
    return {item.name for item in items}, found


def _summary(info: AdapterInfo) -> AdapterSummary:
    return AdapterSummary(
        name=info.name,
        path=printable(str(info.path)),
        method=info.method,
        max_rank=info.max_rank,
        num_bytes=info.num_bytes,
        digest=info.digest,
        file_format=info.file_format,
    )
