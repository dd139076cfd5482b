"""A directory that holds adapters: the rule by which it does, and what tells that one has changed.

Owns the rule; reads no file, only lists and looks at sizes, times and inodes. What a request names
is confined to the directory, links resolved. Opened through adapters/stores; the rule is also asked
by commands.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.printable import quoted
from loraswarm.adapters.source import NEMO_SUFFIX, PEFT_FILES, errors_name, open_source
from loraswarm.adapters.stores import (
    Found,
    failure_line,
    loose_archive_problem,
    name_problem,
    printable,
    scheme_of,
)
from loraswarm.errors import (
    AdapterError,
    ConfigError,
    ForbiddenPath,
    PathNotFound,
    StoreError,
)

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class LocalStore:
    """A `Store` of one directory. It may be a link; what it leads to may change."""

    def __init__(self, root: str) -> None:
        """Raises ConfigError if `root` is not a readable directory."""
        try:
            adapter_paths(root)
        except ConfigError as error:
            raise ConfigError(f"--adapters {error}") from error
        self._root = os.path.abspath(root)

    @property
    def root(self) -> str:
        return self._root

    def look(self) -> list[Found]:
        """See `Store`. A link to a directory anywhere is an adapter: who put it there may."""
        try:
            paths = adapter_paths(self._root)
        except ConfigError as error:
            raise StoreError(failure_line(self._root, error)) from error
        looks = (_look_at(path) for path in paths)
        return [found for found in looks if found is not None]

    def locate(self, path: str) -> Found | None:
        """See `Store`. None also if a file of the adapter lies outside, or `path` has "..".

        Its location has no links below the root.
        """
        if "\0" in path or scheme_of(path) is not None or ".." in Path(path).parts:
            return None
        root = os.path.realpath(self._root)
        place = os.path.realpath(os.path.join(self._root, path))
        if not _is_below(place, root):
            return None
        location = Path(os.path.normpath(os.path.join(self._root, os.path.relpath(place, root))))
        try:
            names = [""] if _is_nemo_file(location) else list(_files_in(location))
            files = [os.path.realpath(location / name) for name in names]
            contents = _contents_of(location)
        except OSError as error:
            if error.errno not in _NOTHING_THERE:
                raise StoreError(failure_line(self._root, error, path)) from error
            contents = None
        if contents is None or not files:
            self._check_root()
            raise PathNotFound(
                f"there is no adapter at {quoted(path)} (relative paths begin at --adapters)"
            )
        if not all(_is_below(file, root) for file in files):
            return None
        return _found(location, contents)

    def look_again(self, found: Found) -> Found:
        """See `Store`."""
        try:
            contents = _contents_of(Path(found.location))
            return replace(found, stamp=contents.stamp, changed_s=contents.changed_s)
        except OSError as error:
            raise StoreError(failure_line(self._root, error, found.name)) from error

    def fetch(self, found: Found, into: Path) -> Path:
        """See `Store`: where it is, if a request may still name it."""
        if found.is_by_request:
            located = self.locate(os.path.relpath(found.location, self._root))
            if located is None or located.location != found.location:
                raise ForbiddenPath(
                    f"{quoted(found.location)} has become a link out of the store; it is not read"
                )
        return Path(found.location)

    def _check_root(self) -> None:
        if not os.path.isdir(self._root):
            raise StoreError(failure_line(self._root, FileNotFoundError("the directory is gone")))


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
    problem = name_problem(name)
    if problem is not None:
        raise AdapterError(problem)
    if _is_nemo_file(path):
        raise AdapterError(loose_archive_problem(name))
    if os.path.islink(path) and not os.path.exists(path):
        raise AdapterError(f"adapter {name!r} is a broken symbolic link")


class _Contents(NamedTuple):
    """The files that make up an adapter, as far as a look tells."""

    stamp: str
    is_complete: bool
    changed_s: float


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


def _look_at(path: Path) -> Found | None:
    """What `adapter_paths` has found; None if it has gone since."""
    name = printable(path.name)
    try:
        check_entry(path)
        return _found(path, _contents_of(path))
    except AdapterError as error:
        status = _status_of(path)
        stamp = _stamp_of([(path.name, status)])
        return Found(name, str(path), stamp, str(error), changed_s=_changed_s([status]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        # The reason is the one that reading it would give.
        stamp = _stamp_of([(path.name, None)])
        return Found(name, str(path), stamp, _kind_problem(path))


def _found(path: Path, contents: _Contents) -> Found:
    problem = None if contents.is_complete else _kind_problem(path)
    name = printable(path.name)
    return Found(name, str(path), contents.stamp, problem, changed_s=contents.changed_s)


def _kind_problem(path: Path) -> str | None:
    """Why the files are no adapter. What is incomplete is refused before any of it is opened."""
    try:
        with errors_name(printable(path.name)), open_source(path):
            return None
    except AdapterError as error:
        return str(error)


def _contents_of(path: Path) -> _Contents:
    """Raises OSError if it cannot be looked at."""
    if _is_nemo_file(path):
        files = {path.name: _status_of(path)}
    else:
        files = {name: _status_of(path / name) for name in _files_in(path)}
    there = {name for name, status in files.items() if status is not None}
    has_weights = len(there) > 1 or CONFIG_FILE not in there
    num_archives = sum(name.endswith(NEMO_SUFFIX) for name in there)
    is_peft = num_archives == 0 and CONFIG_FILE in there and has_weights
    is_complete = is_peft or (num_archives == 1 and len(there) == 1)
    statuses = list(files.values())
    if not is_complete:
        statuses.append(_status_of(path))
    return _Contents(_stamp_of(sorted(files.items())), is_complete, _changed_s(statuses))


def _files_in(directory: Path) -> Iterator[str]:
    """Names of the files that PEFT's and NeMo's adapters consist of; raises OSError."""
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name
            if name in PEFT_FILES or (name.endswith(NEMO_SUFFIX) and name[0] != "."):
                yield name


def _status_of(path: Path) -> os.stat_result | None:
    """Of what a link leads to; None if that is not there."""
    try:
        return os.stat(path)
    except OSError:
        return None


def _stamp_of(files: Sequence[tuple[str, os.stat_result | None]]) -> str:
    """Changes whenever a file is written to, replaced, renamed, added or removed."""
    facts = [
        (name, status and (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev))
        for name, status in files
    ]
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _changed_s(statuses: Sequence[os.stat_result | None]) -> float:
    """When the youngest was written or put in its place, in seconds since 1970."""
    # The time of the last change of status: copying and unpacking set the other one back.
    return max((max(s.st_mtime, s.st_ctime) for s in statuses if s is not None), default=0.0)


def _is_nemo_file(path: Path) -> bool:
    return path.name.endswith(NEMO_SUFFIX) and os.path.isfile(path)


def _is_below(path: str, root: str) -> bool:
    """Whether a real path is a real root or below it."""
    return os.path.commonpath((path, root)) == root
