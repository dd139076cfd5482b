"""Copies images into pages of the pool beside the steps: one thread, first in, first out.

On a device a copy follows all that was launched before it was submitted: what read or wrote those
pages for whoever had them last. Does not decide what is copied or where (AdapterCache) and touches
no page but those of its loads. Called by the engine's thread alone, which is woken when a copy is
done.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import torch

from loraswarm.core.sequence import AdapterKey
from loraswarm.memory.adapter_cache import AdapterLoad
from loraswarm.memory.image import AdapterImage
from loraswarm.memory.page_buffer import PageBuffer
from loraswarm.memory.tile_store import TileStore

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class CopyDone:
    """One copy: seconds of the copy itself, and the bytes copied, shared matrices included.

    With an `error` the pages hold anything; the caller frees them (AdapterCache.fail_load).
    """

    key: AdapterKey
    seconds: float
    num_bytes: int
    error: Exception | None = None


class _Job(NamedTuple):
    """`begun` is what the engine's thread had launched by then."""

    load: AdapterLoad
    image: AdapterImage
    begun: torch.cuda.Event | None


class PageCopier:
    """Copies of adapters under way. Pages of a load must stay the load's own until it is done."""

    def __init__(self, buffer: PageBuffer, tiles: TileStore, wake: Callable[[], None]) -> None:
        """`wake` is called from the copier's thread when `take_done` has something."""
        self._buffer = buffer
        self._tiles = tiles
        self._wake = wake
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._done: deque[tuple[AdapterLoad, CopyDone]] = deque()
        self._copying: set[AdapterKey] = set()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="page-copier", daemon=True)
        self._thread.start()

    @property
    def num_copying(self) -> int:
        """Loads that were submitted and have not been taken back."""
        return len(self._copying)

    def is_copying(self, key: AdapterKey) -> bool:
        return key in self._copying

    def submit(self, load: AdapterLoad, image: AdapterImage) -> None:
        """Copy the image, and those of its shared matrices that are not in the pool yet.

        `image.shared` must have every matrix of the load, also those another load writes: that one
        may fail. The image is kept until the copy is done.
        """
        assert not self._is_closed, "submit to a closed copier"
        assert load.info.key == image.info.key
        assert load.info.key not in self._copying, f"copied twice at once: {load.info.key}"
        self._copying.add(load.info.key)
        self._jobs.put(_Job(load, image, self._buffer.moment()))

    def take_done(self) -> list[CopyDone]:
        """Copies that ended since the last call, in order; those without error can be used now."""
        taken = []
        while self._done:
            load, done = self._done.popleft()
            self._copying.remove(done.key)
            if done.error is None:
                self._tiles.place(load)
            taken.append(done)
        return taken

    def close(self) -> None:
        """End the thread after the copy it is at; loads that are still queued are dropped."""
        self._is_closed = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        _give_way()
        while (job := self._jobs.get()) is not None and not self._is_closed:
            self._done.append((job.load, self._copy(job)))
            # A reference kept until the next job would keep a large image alive.
            del job
            self._wake()

    def _copy(self, job: _Job) -> CopyDone:
        load, begin = job.load, time.perf_counter()
        try:
            self._buffer.wait_for(job.begun)
            num_bytes = self._tiles.copy(load, job.image)
        except Exception as error:
            _logger.exception("adapter copy failed name=%r", load.info.name)
            return CopyDone(load.info.key, time.perf_counter() - begin, 0, error)
        return CopyDone(load.info.key, time.perf_counter() - begin, num_bytes)


def _give_way() -> None:
    """Let this thread have the cores that the engine's threads leave idle: copying takes bandwidth
    from a step, but no time of its threads."""
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):  # forbidden: then it competes
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
