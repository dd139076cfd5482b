"""Where adapters come from: what a store is, what it finds, and which kinds of store there are.

A store is a local directory or a URL; it lists adapters and says whether they changed without
reading them, and brings one to where it can be read. Knows nothing of names being served. Asked by
adapters/scanner and by whoever loads adapters.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from loraswarm.adapters.printable import one_line, quoted
from loraswarm.errors import ConfigError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Found:
    """One adapter as a store shows it.

    `location` is an absolute path or a URL. `stamp` changes whenever a file of the adapter does.
    `problem` says why its name or its kind cannot be served. `shadowed_by` is the location that has
    the same name and goes first. `is_by_request` means that a request named its place; others were
    found by a scan. `changed_s` is when its youngest file changed (seconds since 1970), 0 if the
    store cannot tell.
    """

    name: str
    location: str
    stamp: str
    problem: str | None = None
    shadowed_by: str | None = None
    is_by_request: bool = False
    changed_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanChange:
    """What differs from the scan before.

    `found` are new or changed, and settled; `removed` are as they were last found; `pending` are
    all that have not settled yet. `failures` are stores that could not be listed, one line each:
    what they held is taken to be there still. With `is_first` there was no scan before, so that
    `found` and `pending` are all there is.
    """

    found: tuple[Found, ...] = ()
    removed: tuple[Found, ...] = ()
    pending: tuple[Found, ...] = ()
    failures: tuple[str, ...] = ()
    elapsed_s: float = 0.0
    is_first: bool = False


class Store(Protocol):
    """A place that holds adapters; safe to use from several threads. Its calls block."""

    @property
    def root(self) -> str:
        """As messages show it: an absolute path or a URL, without a slash at its end."""
        ...

    def look(self) -> list[Found]:
        """Every adapter, sorted by name. No file is opened.

        Raises    StoreError naming the store, if it cannot be listed.
        """
        ...

    def locate(self, path: str) -> Found | None:
        """The adapter at an absolute or relative path or URL; None if it is not of this store.

        Links are resolved first. Its name is that of its last component.
        Raises    PathNotFound if it would be of this store but is not there; StoreError.
        """
        ...

    def look_again(self, found: Found) -> Found:
        """`found` with the stamp and age of what is there now; if it is remote, as it is, since
        `fetch` compares.

        Raises    StoreError if it cannot be looked at.
        """
        ...

    def fetch(self, found: Found, into: Path) -> Path:
        """Where the adapter can be read: its own place, or below the empty directory `into`.

        Raises    StoreError naming the adapter and what failed; ForbiddenPath if what a request
                  named has since become a link out of the store.
        """
        ...


class Driver(NamedTuple):
    """What a scheme of URLs needs: a module, and the extra of this package that installs it."""

    module: str
    extra: str | None


DRIVERS: dict[str, Driver] = {
    "s3": Driver("s3fs", "s3"),
    "gs": Driver("gcsfs", "gs"),
    "hf": Driver("huggingface_hub", None),
    "http": Driver("aiohttp", "http"),
    "https": Driver("aiohttp", "http"),
}


def open_store(root: str) -> Store:
    """The store at a directory or URL. URLs are not contacted yet.

    Raises    ConfigError for a scheme that we do not know or whose driver is not installed, for a
              URL that holds more than a place, and for what is no readable directory.
    """
    # Imported here: both build on this module.
    from loraswarm.adapters.local_store import LocalStore

    scheme = scheme_of(root)
    if scheme is None:
        return LocalStore(root)
    driver = DRIVERS.get(scheme)
    if driver is None:
        raise ConfigError(
            f"--adapters {quoted(root)}: unknown scheme {quoted(scheme)}; give a directory or a URL"
            f" of {', '.join(DRIVERS)}"
        )
    if importlib.util.find_spec(driver.module) is None:
        raise ConfigError(
            f"--adapters {quoted(root)} needs {driver.module}, which is not installed;"
            f" pip install 'loraswarm[{driver.extra}]'"
        )
    from loraswarm.adapters.remote_store import RemoteStore

    return RemoteStore(root)


def scheme_of(text: str) -> str | None:
    """The scheme of a URL as it is written; None for a path."""
    match = _URL.match(text)
    return None if match is None else match[1]


def printable(text: str) -> str:
    """`text`, or its escaped form if a listing could not show it."""
    return text if text.isprintable() else ascii(text)[1:-1]


def name_problem(name: str, what: str = "the directory name") -> str | None:
    """Why `name` cannot be a model id; None if it can."""
    if name and printable(name) == name == name.strip():
        return None
    return (
        f"{what} {name!r} cannot be a model id: it is empty, has"
        " unprintable characters, or begins or ends with a space; rename it"
    )


def loose_archive_problem(name: str) -> str:
    """Why a .nemo file beside adapters is none."""
    return (
        f"{name!r} lies beside other adapters; move it into a directory of its own, which"
        " gives the adapter its name"
    )


def failure_line(store: str, error: BaseException, adapter: str | None = None) -> str:
    """One printable line that names the store, the adapter and the cause."""
    cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
    where = f"store {quoted(store)}" + (f", adapter {quoted(adapter)}" if adapter else "")
    return one_line(f"{where}: {cause}", 600)
