"""The engine's side of a loader in a process of its own.

Starts the process, hands it jobs, maps the images that come back, and starts it again if it dies:
what a hostile file may do to it, it does not do to the engine. Implements engine/loader.Loader.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from loraswarm.core.events import ErrorInfo
from loraswarm.engine.loader import Inbox, has_result
from loraswarm.engine.loader_frames import Frame, receive
from loraswarm.engine.loader_jobs import Job, JobFailed, Result, UnwatchJob, WatchJob
from loraswarm.engine.loader_worker import WorkerSpec, what
from loraswarm.errors import StoreError

MAX_STARTS_PER_MINUTE = 5
STOP_TIMEOUT_S = 5.0
# One thread for each job; and what a load has freed is kept for the next one, since touching new
# memory takes longer than reading and packing together.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
log = logging.getLogger(__name__)


class ProcessLoader:
    """A Loader whose jobs are done by another process, at the lowest priority.

    It is started at once, or with the first job. If it dies, jobs that it was given fail with 503,
    and the next job starts it again, MAX_STARTS_PER_MINUTE times at most; what was watched is
    watched again. One that cannot begin, say for a root that is no store, fails its jobs with that.
    """

    def __init__(self, spec: WorkerSpec, starts_at_once: bool = True) -> None:
        self._spec = spec
        self._inbox = Inbox()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._is_closed = False
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._starts: deque[float] = deque()
        self._watched: dict[str, WatchJob] = {}
        self._janitor = _Janitor()
        if starts_at_once:
            self._started_child()
        self._feeder = threading.Thread(target=self._feed, name="loader-feeder", daemon=True)
        self._feeder.start()

    @property
    def pid(self) -> int | None:
        """The process that does the jobs, if there is one now."""
        child = self._child
        return None if child is None or child.has_ended else child.pid

    def submit(self, job: Job) -> None:
        """See `Loader`."""
        self._inbox.expect(job)
        self._jobs.put(job)

    def take_done(self) -> list[Result]:
        """See `Loader`."""
        return self._inbox.take()

    def fileno(self) -> int:
        """See `Loader`."""
        return self._inbox.fileno()

    @property
    def num_open(self) -> int:
        """See `Loader`."""
        return self._inbox.num_open

    def close(self) -> None:
        """See `Loader`; images that have been taken stay readable."""
        with self._lock:
            self._is_closed = True
            child = self._child
        self._jobs.put(None)
        if child is not None:
            child.close()
        self._feeder.join()
        self._janitor.close()
        self._inbox.close()

    def _feed(self) -> None:
        """Hand jobs on, in a thread of its own: starting a process and sending may take a while."""
        while (job := self._jobs.get()) is not None:
            try:
                self._give(job)
            except Exception as error:  # no threads left, say: the next job may fare better
                log.exception("job not handed to the loader")
                if has_result(job):
                    failure = _store_error(f"the loader cannot be reached: {error}")
                    self._inbox.put(JobFailed(job.job_id, failure))

    def _give(self, job: Job) -> None:
        while not self._is_closed:
            child = self._started_child()
            if isinstance(child, ErrorInfo):
                if has_result(job):
                    self._inbox.put(JobFailed(job.job_id, child))
                break
            if child.try_give(job):
                break
        if isinstance(job, WatchJob):
            self._watched[job.found.name] = job
        elif isinstance(job, UnwatchJob):
            self._watched.pop(job.name, None)

    def _started_child(self) -> _Child | ErrorInfo:
        """The running process, or a new one; or why there is none."""
        with self._lock:
            if self._child is not None and not self._child.has_ended:
                return self._child
            now = time.monotonic()
            while self._starts and self._starts[0] < now - 60:
                self._starts.popleft()
            if self._is_closed or len(self._starts) >= MAX_STARTS_PER_MINUTE:
                return self._reason()
            self._starts.append(now)
            try:
                self._child = _Child(self._spec, self._inbox.put, self._janitor)
            except OSError as error:
                log.error("loader cannot be started: %s", error)
                return _store_error(f"the loader cannot be started: {error.strerror or error}")
        for job in self._watched.values():
            self._child.try_give(job)
        return self._child

    def _reason(self) -> ErrorInfo:
        if self._child is not None and self._child.failure is not None:
            return self._child.failure
        return _store_error(
            f"the loader ended {len(self._starts)} times within a minute; see its log, and try"
            " again later"
        )


class _Child:
    """One process, from its start to its end; a thread hands its results to `deliver`.

    `failure` is why it could not begin its work, if so.
    """

    def __init__(
        self, spec: WorkerSpec, deliver: Callable[[Result], None], janitor: _Janitor
    ) -> None:
        self._deliver = deliver
        self._janitor = janitor
        self._open: dict[int, Job] = {}
        self._lock = threading.Lock()
        self.has_ended = False
        self.failure: ErrorInfo | None = None
        self._directory = tempfile.mkdtemp(prefix="loraswarm-loader-", dir=spec.download_dir)
        try:
            self._connection, self._process = _start_process()
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        self._reader = threading.Thread(target=self._read, name="loader-reader", daemon=True)
        self._reader.start()
        self._try_send(dataclasses.replace(spec, download_dir=self._directory))

    @property
    def pid(self) -> int:
        return self._process.pid

    def try_give(self, job: Job) -> bool:
        """Hand it a job, whose result or failure will be delivered; False if it has ended."""
        with self._lock:
            if self.has_ended:
                return False
            if has_result(job):
                self._open[job.job_id] = job
        self._try_send(job)
        return True

    def close(self) -> None:
        """Make it end, and wait for that."""
        self._disconnect()
        self._reader.join()

    def _try_send(self, item: object) -> None:
        with suppress(OSError):  # it has ended: the reader finds out, and fails what waits
            Frame(item).send(self._connection)

    def _read(self) -> None:
        try:
            while True:
                result = receive(self._connection, self._janitor.adopt)
                if isinstance(result, ErrorInfo):
                    self.failure = result
                    continue
                with self._lock:
                    self._open.pop(result.job_id, None)
                self._deliver(result)
                del result  # while waiting for the next one, keep no image alive
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("loader pid=%d cannot be understood", self.pid)
        self._end()

    def _end(self) -> None:
        """Reap the process, and fail what it was given."""
        self._disconnect()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        with self._lock:
            self.has_ended = True
            lost = self._open
        if code != 0:
            log.error("loader ended pid=%d exit_code=%d open_jobs=%d", self.pid, code, len(lost))
        for job_id, job in lost.items():
            interrupted = _store_error(f"{what(job)} was interrupted; try again")
            self._deliver(JobFailed(job_id, self.failure or interrupted))
        self._connection.close()

    def _disconnect(self) -> None:
        with suppress(OSError):  # the other end was faster
            self._connection.shutdown(socket.SHUT_RDWR)


def _start_process() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process, and our end of the socket to it. Raises OSError."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "loraswarm.engine.loader_child", str(theirs.fileno())]
    with theirs:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Not a session: Linux may share the CPU between sessions first, whatever the
                # priorities of their processes are.
                process_group=0,
                env=os.environ | ENVIRONMENT,
            )
        except BaseException:
            ours.close()
            raise
    return ours, process


class _Janitor:
    """Unmaps images in a thread of its own: that of a large one takes longer than a step may."""

    def __init__(self) -> None:
        self._dropped: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="loader-janitor", daemon=True)
        self._thread.start()

    def adopt(self, mapped: np.ndarray) -> np.ndarray:
        """The same bytes; what is mapped is dropped in the janitor's thread."""
        owner = _Owner(mapped)
        weakref.finalize(owner, self._drop, mapped).atexit = False
        return np.asarray(owner)

    def close(self) -> None:
        """From now on, who drops an image unmaps it."""
        self._is_closed = True
        self._dropped.put(None)
        self._thread.join()

    def _drop(self, mapped: np.ndarray) -> None:
        if not self._is_closed:
            self._dropped.put(mapped)

    def _work(self) -> None:
        while (mapped := self._dropped.get()) is not None:
            del mapped


class _Owner:
    """What numpy keeps for as long as an array over the same bytes lives."""

    def __init__(self, mapped: np.ndarray) -> None:
        self.__array_interface__ = mapped.__array_interface__


def _store_error(message: str) -> ErrorInfo:
    return ErrorInfo(message, StoreError.error_type, StoreError.http_status)
