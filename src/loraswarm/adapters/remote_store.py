"""A store at a URL: its adapters by one listing, each downloaded when it is to be read.

Owns which files an adapter consists of there, what a request may name, and how often a failing
server is asked again. Knows protocols only through adapters/remote_files. Opened through
adapters/stores.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.peft_directory import MAX_CONFIG_BYTES
from loraswarm.adapters.printable import quoted
from loraswarm.adapters.remote_files import Patience, RemoteFile, RemoteFiles, TooLarge
from loraswarm.adapters.safetensors_header import WEIGHTS_FILE
from loraswarm.adapters.source import NEMO_SUFFIX, PEFT_FILES
from loraswarm.adapters.stores import (
    Found,
    failure_line,
    loose_archive_problem,
    name_problem,
    printable,
    scheme_of,
)
from loraswarm.errors import ConfigError, LoRASwarmError, PathNotFound, StoreError

T = TypeVar("T")
MAX_ADAPTER_BYTES = 64 << 30
MAX_PATH_CHARACTERS = 1024
_Files = Mapping[str, RemoteFile]


class RemoteStore:
    """A `Store` of the directories below a URL, or of the one adapter there."""

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        """Raises ConfigError for a URL that holds more than a place."""
        _check_url(url)
        self._root = url.rstrip("/")
        self._patience = patience or Patience()
        self._files = RemoteFiles(self._root, PEFT_FILES, self._patience)

    @property
    def root(self) -> str:
        return self._root

    def look(self) -> list[Found]:
        """See `Store`. What is deeper than one directory is passed over."""
        files = self._ask(
            self._patience.look_s, None, lambda left_s: self._files.files_in("", _is_part, left_s)
        )
        tree: dict[str, dict[str, RemoteFile]] = {}
        for file in files:
            directory, _, name = file.name.rpartition("/")
            if not any(part.startswith(".") for part in file.name.split("/")) and _is_part(name):
                tree.setdefault(directory, {})[name] = file
        top = tree.pop("", {})
        found = [self._found(path, parts) for path, parts in tree.items() if "/" not in path]
        if CONFIG_FILE in top or (top and not tree):
            return [self._found("", top)]
        found += [self._loose(name, file) for name, file in top.items() if _is_archive(name)]
        return sorted(found, key=lambda item: (item.name, item.location))

    def locate(self, path: str) -> Found | None:
        """See `Store`. Escapes, queries and empty or dotted parts are of no store."""
        below = self._below(path)
        if below is None:
            return None
        parts = self._parts_of(below, self._patience.look_s, None)
        if not parts:
            raise PathNotFound(
                f"there is no adapter at {quoted(path)} (relative paths begin at --adapters)"
            )
        return self._found(below, parts)

    def look_again(self, found: Found) -> Found:
        """See `Store`."""
        return found

    def fetch(self, found: Found, into: Path) -> Path:
        """See `Store`. All files are of the version that was found, or none is returned."""
        below = found.location.removeprefix(self._root).lstrip("/")
        deadline_s = time.monotonic() + self._patience.fetch_s

        def attempt(left_s: float) -> Path:
            parts = self._unchanged(found, below, left_s)
            for name, file in self._needed(found, parts, into).items():
                self._download(file, into / name, deadline_s)
            self._unchanged(found, below, max(deadline_s - time.monotonic(), 0.001))
            return into

        return self._ask(self._patience.fetch_s, found.name, attempt)

    def _below(self, path: str) -> str | None:
        """The path below the root that a request means; None if it is not below it."""
        if scheme_of(path) is not None:
            if path != self._root and not path.startswith(self._root + "/"):
                return None
            path = path.removeprefix(self._root).removeprefix("/")
        elif path.startswith("/"):
            return None
        path = path.removesuffix("/")
        is_plain = len(path) <= MAX_PATH_CHARACTERS and path.isprintable()
        is_plain = is_plain and not any(char in path for char in "%?#\\:")
        parts = path.split("/") if path else []
        return path if is_plain and not {"", ".", ".."} & set(parts) else None

    def _parts_of(self, below: str, within_s: float, adapter: str | None) -> _Files:
        """The files of one adapter by name; none if it is not there."""

        def attempt(left_s: float) -> list[RemoteFile]:
            try:
                return self._files.files_in(below, _is_part, left_s)
            except FileNotFoundError:
                return []

        files = self._ask(within_s, adapter, attempt)
        return {file.name: file for file in files if _is_part(file.name)}

    def _found(self, below: str, parts: _Files) -> Found:
        location = f"{self._root}/{below}" if below else self._root
        last = location.rpartition("/")[2]
        if location.startswith("hf://"):
            last = last.partition("@")[0]  # what follows is a revision
        if location.startswith("http"):
            last = unquote(last)
        problem = name_problem(last) or _kind_problem(printable(last), parts)
        changed_s = max((file.changed_s for file in parts.values()), default=0.0)
        return Found(printable(last), location, _stamp(parts), problem, changed_s=changed_s)

    def _loose(self, name: str, file: RemoteFile) -> Found:
        problem = name_problem(name) or loose_archive_problem(name)
        stamp = _stamp({name: file})
        return Found(printable(name), f"{self._root}/{name}", stamp, problem)

    def _unchanged(self, found: Found, below: str, left_s: float) -> _Files:
        """Its files, if they are those that were found."""
        parts = self._parts_of(below, min(left_s, self._patience.look_s), found.name)
        if _stamp(parts) == found.stamp:
            return parts
        what = "has changed since it was found" if parts else "is not there any more"
        error = LoRASwarmError(f"it {what}; scan again")
        raise StoreError(failure_line(self._root, error, found.name))

    def _needed(self, found: Found, parts: _Files, into: Path) -> _Files:
        """What must be downloaded; refused if it is too large for us or for the disk."""
        unused = {"adapter_model.bin"} if WEIGHTS_FILE in parts else set()
        needed = {name: file for name, file in parts.items() if name not in unused}
        num_bytes = sum(file.size or 0 for file in needed.values())
        free_bytes = shutil.disk_usage(into).free
        config = needed.get(CONFIG_FILE)
        problem = None
        if config is not None and (config.size or 0) > MAX_CONFIG_BYTES:
            problem = f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES:,} bytes"
        elif num_bytes > MAX_ADAPTER_BYTES:
            problem = f"it has {num_bytes:,} bytes; the limit is {MAX_ADAPTER_BYTES:,}"
        elif num_bytes > free_bytes:
            problem = f"it has {num_bytes:,} bytes; {str(into)!r} has {free_bytes:,} left"
        if problem is not None:
            raise StoreError(failure_line(self._root, LoRASwarmError(problem), found.name))
        return needed

    def _download(self, file: RemoteFile, to: Path, deadline_s: float) -> None:
        limit = MAX_CONFIG_BYTES if to.name == CONFIG_FILE else MAX_ADAPTER_BYTES
        max_bytes = limit if file.size is None else file.size
        self._files.get(file, to, max_bytes, max(deadline_s - time.monotonic(), 0.001))
        num_bytes = to.stat().st_size
        if file.size is not None and num_bytes != file.size:
            raise ConnectionError(f"{to.name} ends after {num_bytes:,} of {file.size:,} bytes")

    def _ask(self, within_s: float, adapter: str | None, attempt: Callable[[float], T]) -> T:
        """What `attempt` returns, which is given the seconds left; failures that may pass are tried
        again.

        Raises    StoreError naming the store, the adapter and the cause.
        """
        deadline_s = time.monotonic() + within_s
        for wait_s in (*self._patience.waits_s, None):
            try:
                return attempt(max(deadline_s - time.monotonic(), 0.001))
            except LoRASwarmError:
                raise
            except Exception as error:  # drivers raise errors of many libraries
                left_s = deadline_s - time.monotonic()
                if wait_s is None or wait_s >= left_s or _is_lasting(error):
                    cause = _cause(error)
                    raise StoreError(failure_line(self._root, cause, adapter)) from error
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    problem = None
    if not parts.netloc:
        problem = "it names no host or bucket"
    elif parts.query or parts.fragment or "?" in url or "#" in url:
        problem = "it may hold no query and no fragment"
    elif parts.scheme != "hf" and "@" in parts.netloc:
        problem = "it may hold no credentials; give them by the environment or ~/.netrc"
        url = f"{parts.scheme}://...@{parts.netloc.rpartition('@')[2]}{parts.path}"
    elif not url.isprintable() or {".", ".."} & set(parts.path.split("/")):
        problem = "its path is not plain"
    if problem is not None:
        raise ConfigError(f"--adapters {quoted(url)}: {problem}")


def _is_part(name: str) -> bool:
    return name in PEFT_FILES or (_is_archive(name) and not name.startswith("."))


def _is_archive(name: str) -> bool:
    return name.endswith(NEMO_SUFFIX)


def _kind_problem(name: str, parts: _Files) -> str | None:
    """Why these files are no adapter."""
    num_archives = sum(map(_is_archive, parts))
    problem = None
    if num_archives > 1:
        problem = f"there are {num_archives} {NEMO_SUFFIX} files"
    elif num_archives == 1 and len(parts) > 1:
        problem = f"there are a {NEMO_SUFFIX} file and files of PEFT"
    elif num_archives == 0 and CONFIG_FILE not in parts:
        problem = f"{CONFIG_FILE} is missing"
    elif num_archives == 0 and len(parts) == 1:
        problem = f"{WEIGHTS_FILE} is missing"
    return None if problem is None else f"adapter {quoted(name)}: {problem}"


def _stamp(parts: _Files) -> str:
    facts = [(name, file.size, file.version) for name, file in sorted(parts.items())]
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _is_lasting(error: Exception) -> bool:
    """Whether asking again cannot help."""
    if isinstance(error, FileNotFoundError | PermissionError | TooLarge | ImportError):
        return True
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _cause(error: Exception) -> Exception:
    """The error with words, where it has none."""
    if isinstance(error, TimeoutError) and not error.args:
        return TimeoutError("no answer in time")
    if isinstance(error, TooLarge):
        return TooLarge("it is larger than was listed")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"not found: {error.filename or error}")
    return error
