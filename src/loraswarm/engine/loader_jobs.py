"""What the engine asks of its loader and what it answers: plain data, pickled between processes.

Knows nothing about threads, processes or sockets. Made by the engine and by engine/loader_worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import SharedMatrix
from loraswarm.core.client import AdapterSummary
from loraswarm.core.events import ErrorInfo

if TYPE_CHECKING:
    from loraswarm.adapters.stores import Found, ScanChange
    from loraswarm.memory.image import AdapterImage


@dataclass(frozen=True, slots=True)
class ScanJob:
    """Look at every store; answered by ScanDone."""

    job_id: int


@dataclass(frozen=True, slots=True)
class LocateJob:
    """Find the adapter at `path` within the stores; answered by Located."""

    job_id: int
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class WatchJob:
    """Scan `found` from now on, though it lies where no scan would look; has no result."""

    job_id: int
    found: Found


@dataclass(frozen=True, slots=True)
class UnwatchJob:
    """Undo WatchJob; has no result."""

    job_id: int
    name: str


@dataclass(frozen=True, slots=True)
class SurveyJob:
    """Describe these from their headers; answered by Surveyed."""

    job_id: int
    found: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Bring an adapter to host memory; answered by Loaded.

    `shared` are matrices that the host has already; they are not packed again.
    """

    job_id: int
    found: Found
    shared: frozenset[SharedMatrix] = frozenset()


@dataclass(frozen=True, slots=True)
class ScanDone:
    job_id: int
    change: ScanChange


@dataclass(frozen=True, slots=True)
class Located:
    job_id: int
    found: Found


@dataclass(frozen=True, slots=True)
class Surveyed:
    """Each adapter's summary, or why it cannot be served.

    `skipped` were not looked into, since they would have to be downloaded for it.
    """

    job_id: int
    rows: tuple[tuple[Found, AdapterSummary | str], ...]
    skipped: tuple[Found, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An adapter in host memory; its info has no plan, and its path is `Found.location`.

    `stamp` is that of the files that were read, which may be younger than what was found.
    `fetch_s` is downloading, `read_s` describing, reading and checking, `pack_s` writing the image
    and its file. `num_file_bytes` were read; with `is_from_file` none, since a file of the host
    cache had the image. `warning` is what went wrong without harm to the image.
    """

    job_id: int
    image: AdapterImage
    stamp: str
    fetch_s: float
    read_s: float
    pack_s: float
    num_file_bytes: int
    is_from_file: bool = False
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job has no other result. A 4xx says what is wrong with the job or the files, a 5xx that
    it may go well later."""

    job_id: int
    error: ErrorInfo


Job = ScanJob | LocateJob | WatchJob | UnwatchJob | SurveyJob | LoadJob
Result = ScanDone | Located | Surveyed | Loaded | JobFailed


def is_remote(location: str) -> bool:
    """Whether an adapter's location is a URL, not a path."""
    return "://" in location
