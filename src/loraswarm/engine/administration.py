"""Carries out what an operator asks about adapters, beside the requests.

Owns commands under way and the operator's pins. A command is a generator that is resumed after each
round of news until it returns; it never waits. Called by the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass, replace

from loraswarm.adapters.catalog import Catalog, Entry
from loraswarm.core.admin import (
    AdminCommand,
    AdminResult,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapter,
    RescanAdapters,
    ScanReport,
    UnloadAdapter,
    UnpinAdapter,
)
from loraswarm.core.events import ErrorInfo, ReportedError
from loraswarm.engine.loader import Loader
from loraswarm.engine.loader_jobs import (
    JobFailed,
    Located,
    LocateJob,
    ScanJob,
    UnwatchJob,
    WatchJob,
)
from loraswarm.engine.residency import News, Residency
from loraswarm.engine.states import AdapterStates
from loraswarm.errors import InvalidRequest, LoRASwarmError, Overloaded
from loraswarm.memory.memory import Memory

log = logging.getLogger(__name__)
Course = Generator[None, None, AdminResult]


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of command `command_id`."""

    command_id: int
    result: AdminResult | ErrorInfo


class Administration:
    """Commands of one engine."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        memory: Memory,
        loader: Loader,
        states: AdapterStates,
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._memory = memory
        self._loader = loader
        self._states = states
        self._courses: dict[int, Course] = {}
        self._answers: list[Answer] = []
        self._news = News()
        self._reports: dict[int, ScanReport] = {}
        self._arrived: list[tuple[Entry, Entry]] = []
        self._pins: dict[str, Entry] = {}
        self._pinning: list[Entry] = []
        self._next_own_id = -1

    @property
    def is_busy(self) -> bool:
        return bool(self._courses or self._answers)

    @property
    def num_pinned_pages(self) -> int:
        """Pages that the operator's pins take for good."""
        entries = (*self._pins.values(), *self._pinning)
        infos = [entry.info for entry in entries if entry.info is not None]
        return sum(self._memory.adapters.num_pages(info) for info in infos)

    def pinned_names(self) -> frozenset[str]:
        """Adapters that the operator has pinned."""
        return frozenset(self._pins)

    def begin(self, command_id: int, command: AdminCommand) -> None:
        """Start a command; its answer comes with `take_answers`. Ids are the caller's, from 0."""
        self._courses[command_id] = self._course(command)
        self._resume(command_id)

    def take_answers(self) -> list[Answer]:
        """Commands that have ended since last asked."""
        answers, self._answers = self._answers, []
        return answers

    def proceed(
        self, news: News, arrived: list[tuple[Entry, Entry]], reports: dict[int, ScanReport]
    ) -> None:
        """Resume every command. `arrived` pairs what was wanted with what has come."""
        self._news, self._arrived, self._reports = news, arrived, reports
        for command_id in list(self._courses):
            self._resume(command_id)
        self._news, self._arrived, self._reports = News(), [], {}

    def follow_catalog(self) -> None:
        """Move the operator's pins to new generations; called when the catalog has changed."""
        for name, entry in list(self._pins.items()):
            if self._catalog.is_current(entry.key):
                continue
            self._unpin(name)
            if self._catalog.entry_named(name) is not None:
                self._courses[self._next_own_id] = self._pin(name)
                self._next_own_id -= 1

    def _resume(self, command_id: int) -> None:
        result: AdminResult | ErrorInfo
        try:
            next(self._courses[command_id])
            return
        except StopIteration as end:
            result = end.value
        except LoRASwarmError as error:
            result = ErrorInfo.of(error)
        del self._courses[command_id]
        if command_id >= 0:
            self._answers.append(Answer(command_id, result))
        elif isinstance(result, ErrorInfo):
            log.warning("pin lost with a change of files reason=%r", result.message)

    def _course(self, command: AdminCommand) -> Course:
        if isinstance(command, LoadAdapter):
            return self._load(command)
        if isinstance(command, UnloadAdapter):
            return self._unload(command.name)
        if isinstance(command, PinAdapter):
            return self._pin(command.name)
        if isinstance(command, UnpinAdapter):
            return self._unpin_named(command.name)
        if isinstance(command, PrefetchAdapter):
            return self._prefetch(command.name)
        assert isinstance(command, RescanAdapters)
        return self._rescan()

    def _load(self, command: LoadAdapter) -> Course:
        self._catalog.check_free(command.name, command.in_place)
        job_id = self._residency.next_job_id()
        self._loader.submit(LocateJob(job_id, command.name, command.path))
        while (located := self._result_of(job_id)) is None:
            yield
        assert isinstance(located, Located)
        found = located.found
        candidate = Entry(found.name, found.location, found.stamp, 0, None, is_by_request=True)
        read = yield from self._bring(candidate)
        info, found = read.info, replace(found, stamp=read.stamp)
        assert info is not None
        entry = self._catalog.register(found, command.in_place)
        self._catalog.learned(entry, info)
        self._loader.submit(WatchJob(self._residency.next_job_id(), found))
        self._residency.drop_stale()
        self.follow_catalog()
        return self._states.of(command.name)

    def _unload(self, name: str) -> Course:
        state = replace(self._states.of(name), state="unloaded", tier="store")
        state = replace(state, host_bytes=0, device_bytes=0, is_pinned=False)
        entry = self._catalog.remove(name)
        self._loader.submit(UnwatchJob(self._residency.next_job_id(), name))
        self.follow_catalog()
        self._residency.drop_stale()
        used = [entry]
        while any(map(self._states.is_used, used)):
            yield
            used += [found for wanted, found in self._arrived if wanted.found == entry.found]
        return state

    def _pin(self, name: str) -> Course:
        entry = yield from self._bring(self._catalog.resolve(name))
        if name in self._pins:
            return self._states.of(name)
        self._check_room(entry)
        self._residency.begin_use(entry)
        self._pinning.append(entry)
        try:
            yield from self._hold_in_pages(entry)
        except BaseException:
            self._residency.end_use(entry.key)
            raise
        finally:
            self._pinning.remove(entry)
        if name in self._pins or not self._catalog.is_current(entry.key):
            self._let_go(entry)  # another command has pinned it, or it is served no more
        else:
            self._pins[name] = entry
        return self._states.of(name)

    def _check_room(self, entry: Entry) -> None:
        assert entry.info is not None
        num_pages = self._memory.adapters.num_pages(entry.info)
        total = self._memory.pool.num_pages
        if 2 * (self.num_pinned_pages + num_pages) > total:
            raise InvalidRequest(
                f"adapter {entry.name!r} takes {num_pages:,} pages and {self.num_pinned_pages:,}"
                f" are pinned; at most half of the pool's {total:,} may be (--pool-bytes)",
                "lora_name",
            )
        largest = self._states.largest_need()
        if self.num_pinned_pages + num_pages + largest > total:
            raise Overloaded(
                f"adapter {entry.name!r} cannot be pinned now: a running request may need"
                f" {largest:,} of the pool's {total:,} pages"
            )

    def _unpin_named(self, name: str) -> Course:
        self._catalog.resolve(name)
        if name in self._pins:
            self._unpin(name)
        return self._states.of(name)
        yield  # a generator, as every command

    def _unpin(self, name: str) -> None:
        self._let_go(self._pins.pop(name))

    def _let_go(self, entry: Entry) -> None:
        """Take back the pin of a command."""
        self._memory.adapters.unpin(entry.key, was_used=False)
        self._residency.end_use(entry.key)

    def _prefetch(self, name: str) -> Course:
        entry = yield from self._bring(self._catalog.resolve(name))
        adapters = self._memory.adapters
        assert entry.info is not None
        num_pages = adapters.num_load_pages(entry.info)
        if not adapters.is_resident(entry.key) and num_pages <= self._memory.pool.num_free:
            yield from self._hold_in_pages(entry)
            adapters.unpin(entry.key, was_used=False)
        return self._states.of(name)

    def _rescan(self) -> Course:
        job_id = self._residency.next_job_id()
        self._loader.submit(ScanJob(job_id))
        while job_id not in self._reports:
            self._result_of(job_id)
            yield
        return self._reports[job_id]

    def _bring(self, entry: Entry) -> Generator[None, None, Entry]:
        """Wait until it is in host memory or pages; the entry as it was read."""
        if self._residency.is_within_reach(entry):
            return entry
        error = self._residency.bring(entry)
        while error is None:
            yield
            for wanted, found in self._arrived:
                if wanted.found == entry.found:
                    return found
            failed = (e for lost, e in self._news.failed if lost.found == entry.found)
            error = next(failed, None)
        raise ReportedError(error)

    def _hold_in_pages(self, entry: Entry) -> Generator[None, None, None]:
        """Pin it in pages and wait until it has been copied there."""
        key, adapters = entry.key, self._memory.adapters
        assert entry.info is not None
        if not adapters.is_resident(key) and not self._memory.has_room(
            adapters.num_load_pages(entry.info)
        ):
            raise Overloaded(f"no room in pages for adapter {entry.name!r} now; try again")
        load, _ = self._memory.pin_adapter(entry.info)
        if load is not None:
            self._residency.start_copies([load])
        while not adapters.is_ready(key):
            yield
            if key in self._news.uncopied:
                adapters.unpin(key, was_used=False)
                raise ReportedError(self._news.uncopied[key])

    def _result_of(self, job_id: int) -> Located | None:
        """The result of a job if it has come; raises its failure."""
        for result in self._news.others:
            if result.job_id == job_id and isinstance(result, JobFailed):
                raise ReportedError(result.error)
            if result.job_id == job_id and isinstance(result, Located):
                return result
        return None
