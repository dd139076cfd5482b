"""Carries out jobs: looks at stores, describes adapters, and makes images of them for host memory.

Owns the stores, the scanner, the base's checkpoint and the host cache's files. Knows nothing about
threads, sockets or requests. Called by engine/loader's threads, several at a time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from loraswarm.adapters.adapter import Adapter, AdapterInfo
from loraswarm.adapters.printable import quoted
from loraswarm.adapters.reading import read_adapter, read_adapter_info, stamped
from loraswarm.adapters.scanner import Scanner
from loraswarm.adapters.stores import Found, open_store
from loraswarm.config import Quantize
from loraswarm.core.base_shape import BaseShape
from loraswarm.core.client import AdapterSummary
from loraswarm.core.events import ErrorInfo
from loraswarm.engine.loader_jobs import (
    Job,
    JobFailed,
    Loaded,
    LoadJob,
    Located,
    LocateJob,
    Result,
    ScanDone,
    ScanJob,
    Surveyed,
    SurveyJob,
    UnwatchJob,
    WatchJob,
    is_remote,
)
from loraswarm.errors import AdapterError, EngineError, LoRASwarmError, StoreError
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.image import AdapterImage, pack_adapter
from loraswarm.models.quantized.base import open_base

if TYPE_CHECKING:
    from loraswarm.memory.image_file import ImageFiles

MAX_READS = 3
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker is made of; plain data, so that it can be made in another process.

    `dtype_name` is the base's dtype in the engine, e.g. "bfloat16", and `quantize` how its matrices
    are kept there. Images are kept in files of `host_cache_dir`, if given, up to
    `host_cache_bytes`. Remote adapters are downloaded to `download_dir`, by default the system's
    place for temporary files, and removed when read.
    """

    roots: tuple[str, ...]
    shape: BaseShape
    geometry: PageGeometry
    dtype_name: str
    model_path: str
    model_name: str
    quantize: Quantize | None = None
    host_cache_dir: str | None = None
    host_cache_bytes: int = 0
    download_dir: str | None = None


class LoadWorker:
    """Does any job, in any thread; what is in a file harms its own job only.

    Raises    ConfigError for a root that is no store and for an unusable host cache directory.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, spec.dtype_name)
        self._scanner = Scanner([open_store(root) for root in spec.roots])
        self._base = open_base(Path(spec.model_path), spec.shape, self._dtype, spec.quantize)
        self._files = _image_files(spec)

    def run(self, job: Job) -> Result | None:
        """The job's result; None for jobs that have none. Never raises an Exception."""
        try:
            return self._run(job)
        except Exception as error:  # whatever is in a file, it must harm its own job only
            info = error_info(error, what(job))
            if isinstance(job, WatchJob | UnwatchJob):
                log.error("loader job failed: %s", info.message)
                return None
            return JobFailed(job.job_id, info)

    def close(self) -> None:
        """Close the base's files."""
        self._base.close()

    def _run(self, job: Job) -> Result | None:
        if isinstance(job, LoadJob):
            return self._load(job)
        if isinstance(job, SurveyJob):
            return self._survey(job)
        if isinstance(job, ScanJob):
            return ScanDone(job.job_id, self._scanner.scan())
        if isinstance(job, LocateJob):
            return Located(job.job_id, self._scanner.locate(job.name, job.path))
        if isinstance(job, WatchJob):
            self._scanner.watch(job.found)
        else:
            self._scanner.unwatch(job.name)
        return None

    def _survey(self, job: SurveyJob) -> Surveyed:
        rows: list[tuple[Found, AdapterSummary | str]] = []
        skipped = []
        for found in job.found:
            if is_remote(found.location):
                skipped.append(found)
                continue
            row = self._surveyed(found)
            if row is not None:
                rows.append((found, row))
        return Surveyed(job.job_id, tuple(rows), tuple(skipped))

    def _surveyed(self, found: Found) -> AdapterSummary | str | None:
        """Its summary, or why it is refused; None if that is not known now."""
        row: AdapterSummary | str
        try:
            info = self._described(found, Path(found.location))
            row = _summary(stamped(info, found.stamp))
        except Exception as error:  # this one is refused, the others are described
            if isinstance(error.__cause__, OSError):
                return None
            row = error_info(error, _adapter(found)).message
        try:
            again = self._scanner.store_of(found.location).look_again(found)
        except StoreError:
            return None
        return row if again.stamp == found.stamp else None

    def _load(self, job: LoadJob) -> Loaded:
        found, clock = job.found, _Stopwatch()
        image = self._image_in_file(found)
        if image is not None:
            return Loaded(
                job_id=job.job_id,
                image=image,
                stamp=found.stamp,
                fetch_s=0.0,
                read_s=clock.lap_s(),
                pack_s=0.0,
                num_file_bytes=0,
                is_from_file=True,
            )
        with self._fetched(found) as path:
            fetch_s = clock.lap_s()
            stamp, adapter = self._read(found, path)
        read_s = clock.lap_s()
        # A file must have every matrix of its adapter, whatever the host has now.
        skip = job.shared if self._files is None else ()
        image = pack_adapter(adapter, self._spec.shape, self._spec.geometry, _host_memory, skip)
        image = replace(image, info=stamped(image.info, stamp))
        warning = self._try_keep(replace(found, stamp=stamp), image)
        image = _named(image, found)
        return Loaded(
            job_id=job.job_id,
            image=image,
            stamp=stamp,
            fetch_s=fetch_s,
            read_s=read_s,
            pack_s=clock.lap_s(),
            num_file_bytes=adapter.info.num_bytes,
            warning=warning,
        )

    def _read(self, found: Found, path: Path) -> tuple[str, Adapter]:
        """One content, and its stamp; begins again if the files are replaced meanwhile."""
        store = self._scanner.store_of(found.location)
        for _ in range(MAX_READS):
            stamp = self._scanner.rested_stamp(found)
            try:
                adapter = read_adapter(self._described(found, path), self._base, self._dtype)
            except AdapterError:
                if store.look_again(found).stamp == stamp:
                    raise
                continue
            if store.look_again(found).stamp == stamp:
                if stamp != found.stamp:
                    self._scanner.forget(found)
                return stamp, adapter
        raise StoreError(f"{_adapter(found)}: its files are being replaced; try again")

    def _described(self, found: Found, path: Path) -> AdapterInfo:
        if found.problem is not None:
            raise AdapterError(found.problem)
        return read_adapter_info(path, found.name, self._spec.shape)

    def _image_in_file(self, found: Found) -> AdapterImage | None:
        """The image in a file of the host cache, if it is of these very files."""
        if self._files is None or found.problem is not None:
            return None
        store = self._scanner.store_of(found.location)
        if not is_remote(found.location):
            store.fetch(found, Path(found.location))
            if store.look_again(found).stamp != found.stamp:
                return None
        image = self._files.find(found.location, found.stamp)
        return image and _named(image, found)

    @contextmanager
    def _fetched(self, found: Found) -> Iterator[Path]:
        """Where the adapter can be read until the block is left."""
        store = self._scanner.store_of(found.location)
        if not is_remote(found.location):
            yield store.fetch(found, Path(found.location))
            return
        prefix, parent = "loraswarm-download-", self._spec.download_dir
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as into:
            path = store.fetch(found, Path(into))
            _set_times(path, found.stamp)
            yield path

    def _try_keep(self, found: Found, image: AdapterImage) -> str | None:
        """Write the image to a file, if that is wanted; returns why it could not be written."""
        if self._files is None:
            return None
        try:
            self._files.write(found.location, found.stamp, image)
        except OSError as error:
            warning = f"image of {_adapter(found)} not kept in a file: {error.strerror or error}"
            log.warning("%s", warning)
            return warning
        return None


class _Stopwatch:
    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def lap_s(self) -> float:
        """Seconds since the last lap."""
        begin, self._begin = self._begin, time.perf_counter()
        return self._begin - begin


def error_info(error: Exception, what: str) -> ErrorInfo:
    """What the engine is told; a bug of ours goes to the log with its traceback."""
    if isinstance(error, LoRASwarmError):
        return ErrorInfo(str(error), error.error_type, error.http_status)
    log.error("%s failed", what, exc_info=error)
    message = f"{what} failed: {type(error).__name__} (see the log)"
    return ErrorInfo(message, EngineError.error_type, EngineError.http_status)


def what(job: Job) -> str:
    """A job as messages call it."""
    if isinstance(job, LoadJob):
        return f"loading {_adapter(job.found)}"
    if isinstance(job, SurveyJob):
        return f"describing {len(job.found)} adapters"
    if isinstance(job, ScanJob):
        return "scanning the stores"
    name = job.found.name if isinstance(job, WatchJob) else job.name
    return f"finding adapter {quoted(name)}"


def _adapter(found: Found) -> str:
    return f"adapter {quoted(found.name)}"


def _summary(info: AdapterInfo) -> AdapterSummary:
    return AdapterSummary(
        name=info.name,
        path=str(info.path),
        method=info.method,
        max_rank=info.max_rank,
        num_bytes=info.num_bytes,
        digest=info.digest,
        file_format=info.file_format,
    )


def _named(image: AdapterImage, found: Found) -> AdapterImage:
    """The image under the name and place of `found`: files may be served by several names, and
    downloads lie elsewhere."""
    info = replace(image.info, name=found.name, path=Path(found.location))
    return replace(image, info=info)


def _set_times(path: Path, stamp: str) -> None:
    """Give downloaded files a time that follows from the stamp: digests, which have it, are then
    the same each time the same content is downloaded."""
    digest = hashlib.blake2b(stamp.encode(), digest_size=7).digest()
    time_ns = int.from_bytes(digest)
    for file in [path, *path.rglob("*")]:
        os.utime(file, ns=(time_ns, time_ns))


def _host_memory(num_bytes: int) -> np.ndarray:
    return np.empty(num_bytes, dtype=np.uint8)


def _image_files(spec: WorkerSpec) -> ImageFiles | None:
    if spec.host_cache_dir is None:
        return None
    # Only here: an engine without such files imports where msgspec is not.
    from loraswarm.memory.image_file import ImageFiles, image_signature

    base = f"{_base_identity(Path(spec.model_path))} {spec.quantize}"
    signature = image_signature(spec.shape, spec.geometry, spec.dtype_name, base)
    return ImageFiles(Path(spec.host_cache_dir), signature, spec.host_cache_bytes)


def _base_identity(path: Path) -> str:
    """Changes whenever a file of the base does: some methods compute with its weights."""
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.json")])
    status = [(file.name, file.stat()) for file in files]
    return repr([(name, found.st_size, found.st_mtime_ns) for name, found in status])
