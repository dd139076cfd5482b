"""Does jobs beside the engine's steps: the face that the engine sees, and threads behind it.

Knows which jobs may wait for which others, not what a job takes. Made by engine/setup and used by
the engine's thread; JobThreads also serve engine/loader_child.
"""

from __future__ import annotations

import itertools
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from loraswarm.engine.loader_jobs import (
    Job,
    LoadJob,
    Result,
    ScanJob,
    SurveyJob,
    UnwatchJob,
    WatchJob,
    is_remote,
)

NUM_THREADS = 2
END_URGENCY = -1
CLOSE_TIMEOUT_S = 5.0
log = logging.getLogger(__name__)


class Loader(Protocol):
    """Jobs go in, results come out, in any order; one thread calls all of this."""

    def submit(self, job: Job) -> None:
        """Begin the job some time soon; never waits. WatchJob and UnwatchJob have no result, every
        other job has exactly one, unless the loader is closed before."""
        ...

    def take_done(self) -> list[Result]:
        """Results since last asked; never waits."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable while `take_done` would return something."""
        ...

    @property
    def num_open(self) -> int:
        """Jobs whose result has not been taken."""
        ...

    def close(self) -> None:
        """Give up what is open and end what runs beside; safe to call twice."""
        ...


class JobRunner(Protocol):
    """Carries out jobs, several at a time; engine/loader_worker.LoadWorker or a stand-in."""

    def run(self, job: Job) -> Result | None:
        """The job's result; None for jobs that have none. Never raises."""
        ...


class Inbox:
    """Results on their way to the engine's thread, and a descriptor that says there are some."""

    def __init__(self) -> None:
        self._results: deque[Result] = deque()
        self._awaited: set[int] = set()
        self._lock = threading.Lock()
        self._reading, self._writing = socket.socketpair()
        for end in (self._reading, self._writing):
            end.setblocking(False)

    def expect(self, job: Job) -> None:
        """Count a job as open, if it has a result."""
        if has_result(job):
            self._awaited.add(job.job_id)

    @property
    def num_open(self) -> int:
        return len(self._awaited)

    def put(self, result: Result) -> None:
        """Any thread; without effect after `close`."""
        with self._lock:
            if self._writing.fileno() < 0:
                return
            self._results.append(result)
            if len(self._results) == 1:
                self._writing.send(b"\0")

    def take(self) -> list[Result]:
        """All that have come since the last time."""
        with self._lock:
            results = list(self._results)
            self._results.clear()
            if results:
                self._reading.recv(1)
        self._awaited.difference_update(result.job_id for result in results)
        return results

    def fileno(self) -> int:
        return self._reading.fileno()

    def close(self) -> None:
        with self._lock:
            self._results.clear()
            self._reading.close()
            self._writing.close()
        self._awaited.clear()


class JobThreads:
    """Threads that take jobs, lane by lane, and hand each result to `deliver`.

        look      1 thread      scans, in the order in which they came
        find      1 thread      what operators name
        near      num_threads   loads from local directories, then surveys
        far       num_threads   loads from remote stores, which may take long to answer

    A slow store thus keeps no adapter of another lane waiting. A job computes with one thread.
    """

    def __init__(
        self, runner: JobRunner, deliver: Callable[[Result], None], num_threads: int = NUM_THREADS
    ) -> None:
        self._runner = runner
        self._deliver = deliver
        self._is_closed = threading.Event()
        sizes = {"look": 1, "find": 1, "near": num_threads, "far": num_threads}
        self._lanes = {name: _Lane() for name in sizes}
        self._have_begun = threading.Barrier(1 + sum(sizes.values()))
        self._threads = [
            threading.Thread(
                target=self._work, args=(lane,), name=f"loader-{name}-{number}", daemon=True
            )
            for name, lane in self._lanes.items()
            for number in range(sizes[name])
        ]
        for thread in self._threads:
            thread.start()
        self._have_begun.wait()
        # What a thread sets is also what threads that begin later start with; this undoes it.
        torch.set_num_threads(torch.get_num_threads())

    def submit(self, job: Job) -> None:
        name, urgency = _lane_of(job)
        self._lanes[name].put(job, urgency)

    def close(self) -> None:
        """Drop what has not begun; wait for what has, but not for a store that does not answer."""
        self._is_closed.set()
        for lane in self._lanes.values():
            for _ in self._threads:
                lane.put(None, END_URGENCY)
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("loader thread left behind, in a job name=%s", thread.name)

    def _work(self, lane: _Lane) -> None:
        torch.get_num_threads()  # torch gives a thread its number at its first question, so ask
        torch.set_num_threads(1)  # of this thread
        self._have_begun.wait()
        while (job := lane.get()) is not None:
            result = self._runner.run(job)
            if result is not None and not self._is_closed.is_set():
                self._deliver(result)
            del job, result  # a thread that waits must keep no image alive


class _Lane:
    """A queue of jobs, the most urgent (least number) first, else in order; None ends a thread."""

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()

    def put(self, job: Job | None, urgency: int) -> None:
        self._jobs.put((urgency, next(self._numbers), job))

    def get(self) -> Job | None:
        return self._jobs.get()[2]


class ThreadLoader:
    """A Loader with threads in this process. They share its interpreter with the engine's thread,
    which waits for them now and then; ProcessLoader has one of its own."""

    def __init__(self, runner: JobRunner, num_threads: int = NUM_THREADS) -> None:
        self._inbox = Inbox()
        self._threads = JobThreads(runner, self._inbox.put, num_threads)

    def submit(self, job: Job) -> None:
        """See `Loader`."""
        self._inbox.expect(job)
        self._threads.submit(job)

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
        """See `Loader`."""
        self._inbox.close()
        self._threads.close()


def has_result(job: Job) -> bool:
    """Whether anything will be said about the job."""
    return not isinstance(job, WatchJob | UnwatchJob)


def _lane_of(job: Job) -> tuple[str, int]:
    """Where a job waits, and how urgent it is there."""
    if isinstance(job, LoadJob):
        return ("far" if is_remote(job.found.location) else "near"), 0
    if isinstance(job, SurveyJob):
        return "near", 1
    return ("look" if isinstance(job, ScanJob) else "find"), 0
