"""Where each adapter is, and how it gets nearer: store, host memory, pages.

Owns what is on its way and the memory of failures; tells the loader and the copier what to do and
the caches what has come. Knows no requests beyond how many use an adapter. Called by the engine's
thread alone; implements AdapterSupply for the scheduler.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.adapters.catalog import Catalog, Entry
from loraswarm.adapters.stores import Found
from loraswarm.core.admin import Tier
from loraswarm.core.client import TimeTotals
from loraswarm.core.events import ErrorInfo
from loraswarm.core.sequence import AdapterKey
from loraswarm.engine.backoff import Backoff
from loraswarm.engine.loader import Loader
from loraswarm.engine.loader_jobs import JobFailed, Loaded, LoadJob, Result, is_remote
from loraswarm.errors import EngineError
from loraswarm.memory.adapter_cache import AdapterLoad
from loraswarm.memory.host_cache import HostCache
from loraswarm.memory.memory import Memory
from loraswarm.memory.page_copier import CopyDone, PageCopier

MAX_OPEN_LOADS = 4
STAGES = ("fetch", "read", "pack", "map", "copy")
"""From a remote store; from its files; into an image; an image from a file; into pages."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """What was wanted as `wanted` is in host memory now; `info` describes it as it was read."""

    wanted: Entry
    info: AdapterInfo
    stamp: str


@dataclass(slots=True)
class News:
    """What has happened since last asked. `others` are results of jobs that are no loads."""

    arrived: list[Arrived] = field(default_factory=list)
    failed: list[tuple[Entry, ErrorInfo]] = field(default_factory=list)
    copied: list[AdapterKey] = field(default_factory=list)
    uncopied: dict[AdapterKey, ErrorInfo] = field(default_factory=dict)
    others: list[Result] = field(default_factory=list)


class Residency:
    """The tiers of one engine."""

    def __init__(
        self,
        loader: Loader,
        host: HostCache,
        copier: PageCopier,
        memory: Memory,
        catalog: Catalog,
    ) -> None:
        self._loader = loader
        self._host = host
        self._copier = copier
        self._memory = memory
        self._catalog = catalog
        self._backoff: Backoff[Found] = Backoff()
        self._ids = itertools.count()
        self._queue: dict[Found, Entry] = {}
        self._open: dict[int, Entry] = {}
        self._users: Counter[AdapterKey] = Counter()
        self._entries: dict[AdapterKey, Entry] = {}
        self._lost: list[tuple[Entry, ErrorInfo]] = []
        self._fresh: list[AdapterKey] = []
        self._released: list[AdapterKey] = []
        self.may_overrun: Callable[[], bool] = lambda: False
        self.num_failures = 0
        self.num_unkept_images = 0
        self.loads = {stage: TimeTotals() for stage in STAGES}

    @property
    def num_loading(self) -> int:
        """Loads that are queued or under way."""
        return len(self._queue) + len(self._open)

    @property
    def is_busy(self) -> bool:
        """Whether news will come of what is under way."""
        return bool(self._queue or self._open or self._lost or self._copier.num_copying)

    @property
    def has_lost(self) -> bool:
        """Whether there is news at once, of what could not even be asked for."""
        return bool(self._lost)

    def unblock(self) -> None:
        """No sequence can run: what waits for room in the host need not wait for them."""
        self._submit(is_blocked=True)

    def next_job_id(self) -> int:
        """A number for a job; also for those that others submit."""
        return next(self._ids)

    def tier_of(self, key: AdapterKey | None) -> Tier:
        """The nearest place where the adapter is; pages count when it has been copied."""
        if key is not None and self._memory.adapters.is_ready(key):
            return "device"
        return "host" if key is not None and self._host.has(key) else "store"

    def host_bytes(self, key: AdapterKey) -> int:
        """Bytes of the adapter's image in host memory; 0 if it is not there."""
        image = self._host.get(key)
        return 0 if image is None else image.num_bytes

    def is_within_reach(self, entry: Entry) -> bool:
        """Whether a sequence can be queued for it: it is in pages or in host memory."""
        if entry.info is None:
            return False
        return self._memory.adapters.is_resident(entry.key) or self._host.has(entry.key)

    def is_loading(self, entry: Entry) -> bool:
        """Whether it is on its way to host memory."""
        if not self._queue and not self._open:
            return False
        found = entry.found
        return found in self._queue or any(other.found == found for other in self._open.values())

    def last_error(self, entry: Entry) -> ErrorInfo | None:
        """Why it could not be loaded the last time, if so."""
        return self._backoff.last_error(entry.found)

    def bring(self, entry: Entry) -> ErrorInfo | None:
        """Bring an adapter to host memory; returns why not, if it has just failed."""
        if self.is_within_reach(entry) or self.is_loading(entry):
            return None
        error = self._backoff.refusal(entry.found)
        if error is None:
            self._queue[entry.found] = entry
            self._submit()
        return error

    def begin_use(self, entry: Entry) -> None:
        """A request uses this content from now on; what it is read from is remembered."""
        self._users[entry.key] += 1
        self._entries[entry.key] = entry

    def end_use(self, key: AdapterKey) -> None:
        """The request has ended; the last one of a content that is served no more frees it."""
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key], self._entries[key]
            if not self._catalog.is_current(key):
                self._drop(key)

    def keys_of(self, name: str) -> set[AdapterKey]:
        """Contents of that name that requests use or that are in memory."""
        keys = (*self._users, *self._host.keys(), *self._memory.adapters.keys())
        return {key for key in keys if key[0] == name}

    def drop_stale(self) -> None:
        """Free what is neither served nor used; called when the catalog has changed."""
        for key in {*self._host.keys(), *self._memory.adapters.keys()}:
            if not self._users[key] and not self._catalog.is_current(key):
                self._drop(key)

    def is_at_hand(self, key: AdapterKey) -> bool:
        """See AdapterSupply."""
        return self._host.has(key)

    def want(self, key: AdapterKey) -> None:
        """See AdapterSupply; a failure comes with the news."""
        entry = self._entries[key]
        error = self.bring(entry)
        if error is not None and all(lost is not entry for lost, _ in self._lost):
            self._lost.append((entry, error))

    def hold(self, key: AdapterKey) -> None:
        """See AdapterSupply."""
        self._host.protect(key)

    def release(self, key: AdapterKey) -> None:
        """See AdapterSupply; takes effect with `start_copies`, which may need the image."""
        self._released.append(key)

    def touch(self, key: AdapterKey) -> None:
        """A request asks for the adapter."""
        self._host.touch(key)

    def start_copies(self, loads: Iterable[AdapterLoad]) -> None:
        """Begin to copy adapters from host memory into the pages that they have been given; what
        nobody holds any more may leave the host from now on."""
        for load in loads:
            image = self._host.get(load.info.key)
            assert image is not None, f"{load.info.key} was admitted but is not in host memory"
            self._copier.submit(load, image)
        for key in self._released:
            self._host.unprotect(key)
        self._released.clear()

    def let_go(self) -> None:
        """What has come with the last news is used by now, or may leave host memory again."""
        for key in self._fresh:
            self.release(key)
        self._fresh.clear()

    def take_news(self) -> News:
        """What loader and copier have done; adapters that were copied are ready from now on.

        What has come to host memory stays there until `let_go`.
        """
        news = News()
        news.failed, self._lost = self._lost, []
        for result in self._loader.take_done():
            self._take_result(result, news)
        for done in self._copier.take_done():
            self._take_copy(done, news)
        self._submit()
        return news

    def _take_result(self, result: Result, news: News) -> None:
        entry = self._open.pop(result.job_id, None)
        if entry is None:
            news.others.append(result)
        elif isinstance(result, Loaded):
            self._take_image(entry, result, news)
        else:
            assert isinstance(result, JobFailed)
            self.num_failures += 1
            self._backoff.failed(entry.found, result.error)
            news.failed.append((entry, result.error))

    def _take_image(self, entry: Entry, result: Loaded, news: News) -> None:
        image = result.image
        if self._host.missing(image):
            self._queue[entry.found] = entry  # its shared matrices have left meanwhile
            return
        self._backoff.succeeded(entry.found)
        self.num_unkept_images += result.warning is not None
        seconds = result.fetch_s + result.read_s + result.pack_s
        if result.is_from_file:
            self._count("map", result.read_s, image.num_bytes)
        else:
            if is_remote(entry.location):
                self._count("fetch", result.fetch_s, result.num_file_bytes)
            self._count("read", result.read_s, result.num_file_bytes)
            self._count("pack", result.pack_s, image.num_bytes)
            self._memory.costs.saw_read(image.num_bytes, seconds)
        self.hold(image.info.key)
        self._fresh.append(image.info.key)
        self._host.put(image)
        news.arrived.append(Arrived(entry, image.info, result.stamp))

    def _take_copy(self, done: CopyDone, news: News) -> None:
        if done.error is None:
            self._memory.adapters.finish_load(done.key)
            self._count("copy", done.seconds, done.num_bytes)
            self._memory.costs.saw_copy(done.num_bytes, done.seconds)
            news.copied.append(done.key)
            return
        self.num_failures += 1
        self._memory.adapters.fail_load(done.key)
        message = f"adapter {done.key[0]!r} could not be copied into pages: {done.error!r}"
        news.uncopied[done.key] = ErrorInfo(message, EngineError.error_type, 500)

    def _count(self, stage: str, seconds: float, num_bytes: int) -> None:
        before = self.loads[stage]
        self.loads[stage] = TimeTotals(
            count=before.count + 1,
            seconds=before.seconds + seconds,
            num_bytes=before.num_bytes + num_bytes,
        )

    def _submit(self, is_blocked: bool = False) -> None:
        """Start queued loads, oldest first, while they fit the host beside what it must keep.

        One at a time goes ahead without, while nothing that is kept would leave otherwise:
        requests for several adapters, of which each keeps a part, must not wait for each other.
        """
        while self._queue and len(self._open) < MAX_OPEN_LOADS:
            found, entry = next(iter(self._queue.items()))
            num_loading_bytes = sum(self._num_bytes(other) for other in self._open.values())
            if not self._host.may_load(self._num_bytes(entry), num_loading_bytes):
                is_stuck = not self._open and not self._copier.num_copying
                if not (is_stuck and (is_blocked or self.may_overrun())):
                    return
            del self._queue[found]
            job_id = self.next_job_id()
            self._open[job_id] = entry
            self._loader.submit(LoadJob(job_id, found, self._host.shared_matrices()))

    def _num_bytes(self, entry: Entry) -> int:
        """What its image will take; unknown before it was described."""
        if entry.info is None:
            return 0
        return self._memory.adapters.num_bytes(entry.info).own

    def _drop(self, key: AdapterKey) -> None:
        self._memory.drop_adapter(key)
        self._host.drop(key)
