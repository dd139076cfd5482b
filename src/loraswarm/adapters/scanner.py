"""What has changed in the stores since the last look, and what is still being written.

Owns what was seen of each adapter: a half-written one is not handed on, one that is being replaced
stays as it was until its files have come to rest. Knows nothing of contents, nor of what is served.
Lives where adapters are loaded; scans and locates for the engine.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from loraswarm.adapters.printable import quoted
from loraswarm.adapters.stores import Found, ScanChange, Store, failure_line
from loraswarm.errors import (
    AdapterError,
    ForbiddenPath,
    LoRASwarmError,
    Overloaded,
    PathNotFound,
    StoreError,
)

SETTLE_S = 0.5
PATIENCE_S = 5.0
_Place = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Clock:
    """`now` is that of files (seconds since 1970), `monotonic` ours."""

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(slots=True)
class _Looks:
    """What one scan saw: candidates in the order in which names are given to them."""

    now_s: float
    monotonic_s: float
    found: list[Found] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Scanner:
    """The state of the last looks into some stores. Safe to use from several threads.

    An adapter is taken once its files have rested for `settle_s`: by their times, or because an
    earlier look, at least that long ago, saw the same.
    """

    def __init__(
        self, stores: Sequence[Store], settle_s: float | None = None, clock: Clock | None = None
    ) -> None:
        """`settle_s` None takes SETTLE_S; with 0, everything is taken as it is."""
        self._stores = tuple(stores)
        self._settle_s = SETTLE_S if settle_s is None else settle_s
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._watched: dict[str, Found] = {}
        self._forgotten: set[_Place] = set()
        # The rest belongs to `scan`, of which one runs at a time.
        self._scan_lock = threading.Lock()
        self._listed: dict[int, list[Found]] = {}
        self._looking: dict[int, queue.SimpleQueue[list[Found] | LoRASwarmError]] = {}
        self._taken: dict[_Place, Found] = {}
        self._unsettled: dict[_Place, tuple[str, float]] = {}
        self._is_first = True

    def scan(self) -> ScanChange:
        """Look at every store; what differs from the last scan. Blocks."""
        with self._scan_lock:
            with self._lock:
                forgotten, self._forgotten = self._forgotten, set()
            looks = self._look()
            known = {_place(found): found for found in self._watched_now()} | self._taken
            taken, pending = self._settle(looks, known)
            gone = [found for place, found in self._taken.items() if place not in taken]
            change = ScanChange(
                found=tuple(
                    found
                    for place, found in taken.items()
                    if place in forgotten or _differs(found, known.get(place))
                ),
                removed=tuple(gone),
                pending=tuple(pending),
                failures=tuple(looks.failures),
                elapsed_s=self._clock.monotonic() - looks.monotonic_s,
                is_first=self._is_first,
            )
            self._taken = taken
            self._is_first = False
            return change

    def locate(self, name: str, path: str) -> Found:
        """What is at `path`, to be served as `name`. Blocks for `settle_s` if it is young.

        Raises    ForbiddenPath, PathNotFound, AdapterError (its kind cannot be served),
                  Overloaded (still being written), StoreError.
        """
        now_s = self._clock.now()
        found = self._find(path)
        if self._is_young(found, now_s):
            self._clock.sleep(self._settle_s)
            again = self._find(path)
            if again.stamp != found.stamp:
                raise Overloaded(f"what is at {quoted(path)} is still being written; try again")
            found = again
        if found.problem is not None:
            raise AdapterError(found.problem)
        return replace(found, name=name, is_by_request=True)

    def watch(self, found: Found) -> None:
        """Scan what a request has named like what stores list; its name goes first."""
        with self._lock:
            self._watched[found.name] = found

    def unwatch(self, name: str) -> None:
        """Forget what a request has named; no-op if it is not watched."""
        with self._lock:
            self._watched.pop(name, None)

    def forget(self, found: Found) -> None:
        """Let the next scan report it again: what was read in its place was not what was found."""
        with self._lock:
            self._forgotten.add(_place(found))

    def rested_stamp(self, found: Found) -> str:
        """The stamp of what is at the place of `found` now. If that is something else and
        young, blocks for `settle_s`.

        Raises    StoreError; Overloaded if it is still being written.
        """
        store = self.store_of(found.location)
        now_s = self._clock.now()
        seen = store.look_again(found)
        if seen.stamp != found.stamp and self._is_young(seen, now_s):
            self._clock.sleep(self._settle_s)
            if store.look_again(found).stamp != seen.stamp:
                raise Overloaded(
                    f"adapter {quoted(found.name)} is still being written; try again in a moment"
                )
        return seen.stamp

    def store_of(self, location: str) -> Store:
        """The store that the location of a Found is in. Raises StoreError if it is in none."""
        for store in self._stores:
            if location == store.root or location.startswith(store.root.rstrip("/") + "/"):
                return store
        raise StoreError(f"no store holds {quoted(location)}")

    def _watched_now(self) -> list[Found]:
        with self._lock:
            return list(self._watched.values())

    def _look(self) -> _Looks:
        # Times are taken first: what changes during the look is young.
        looks = _Looks(self._clock.now(), self._clock.monotonic())
        for index, listed in enumerate(self._list_all()):
            if isinstance(listed, LoRASwarmError):
                looks.failures.append(str(listed))
            else:
                self._listed[index] = listed
        listed_now = [found for index in range(len(self._stores)) for found in self._of(index)]
        by_location = {found.location: found for found in listed_now}
        looks.found = [*self._look_at_watched(by_location, looks.failures), *listed_now]
        return looks

    def _of(self, index: int) -> list[Found]:
        """What a store has shown last."""
        return self._listed.get(index, [])

    def _list_all(self) -> list[list[Found] | LoRASwarmError]:
        """Look at the stores beside each other. One that does not answer for PATIENCE_S holds up no
        other: what it says later is for a later scan."""
        for index, store in enumerate(self._stores):
            if index not in self._looking:
                self._looking[index] = _look_beside(store)
        deadline_s = time.monotonic() + PATIENCE_S
        return [self._listed_by(index, deadline_s) for index in range(len(self._stores))]

    def _listed_by(self, index: int, deadline_s: float) -> list[Found] | LoRASwarmError:
        store = self._stores[index]
        try:
            listed = self._looking[index].get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            return StoreError(f"store {quoted(store.root)} has not answered for {PATIENCE_S:g} s")
        del self._looking[index]
        return listed

    def _look_at_watched(
        self, by_location: dict[str, Found], failures: list[str]
    ) -> Iterator[Found]:
        for watched in self._watched_now():
            found = by_location.get(watched.location)
            if found is not None and found.name == watched.name:
                yield found
                continue
            try:
                found = found or self._find(watched.location)
            except (PathNotFound, ForbiddenPath):
                continue
            except StoreError as error:
                failures.append(str(error))
                found = self._taken.get(_place(watched), watched)
            yield replace(found, name=watched.name, is_by_request=True)

    def _settle(
        self, looks: _Looks, known: dict[_Place, Found]
    ) -> tuple[dict[_Place, Found], list[Found]]:
        """What is taken as it is, or as it was before a change under way; and what is pending."""
        taken: dict[_Place, Found] = {}
        pending: list[Found] = []
        unsettled: dict[_Place, tuple[str, float]] = {}
        owners: dict[str, str] = {}
        for found in looks.found:
            place = _place(found)
            if place in taken or place in unsettled:
                continue
            before = known.get(place)
            if self._is_settled(found, before, looks):
                before = found
            else:
                pending.append(found)
                seen = self._unsettled.get(place)
                is_same = seen is not None and seen[0] == found.stamp
                unsettled[place] = seen if seen and is_same else (found.stamp, looks.monotonic_s)
            if before is not None:
                owner = owners.setdefault(before.name, before.location)
                shadowed_by = None if owner == before.location else owner
                taken[place] = replace(before, shadowed_by=shadowed_by)
        self._unsettled = unsettled
        return taken, pending

    def _is_settled(self, found: Found, before: Found | None, looks: _Looks) -> bool:
        if before is not None and (before.stamp, before.problem) == (found.stamp, found.problem):
            return True
        if not self._is_young(found, looks.now_s):
            return True
        seen = self._unsettled.get(_place(found))
        return (
            seen is not None
            and seen[0] == found.stamp
            and looks.monotonic_s - seen[1] >= self._settle_s
        )

    def _is_young(self, found: Found, now_s: float) -> bool:
        return self._settle_s > 0 and found.changed_s + self._settle_s > now_s

    def _find(self, path: str) -> Found:
        """What is at `path` in the first store that has it."""
        failure: LoRASwarmError = ForbiddenPath(
            f"{quoted(path)} is not within the directories and URLs given with --adapters"
        )
        for store in self._stores:
            try:
                found = store.locate(path)
            except (PathNotFound, StoreError) as error:
                # A store that fails may hold it: that it is nowhere else says less.
                failure = failure if isinstance(failure, StoreError) else error
                continue
            if found is not None:
                return found
        raise failure


def _look_beside(store: Store) -> queue.SimpleQueue[list[Found] | LoRASwarmError]:
    """Look in a thread that may be left behind; what it finds will be in the queue."""
    answer: queue.SimpleQueue[list[Found] | LoRASwarmError] = queue.SimpleQueue()

    def look() -> None:
        try:
            answer.put(store.look())
        except LoRASwarmError as error:
            answer.put(error)
        except Exception as error:  # of a driver: it must not keep the scan waiting
            answer.put(StoreError(failure_line(store.root, error)))

    threading.Thread(target=look, name="store-look", daemon=True).start()
    return answer


def _differs(found: Found, before: Found | None) -> bool:
    """Whether anything but the time of its last change does."""
    return found != before


def _place(found: Found) -> _Place:
    return found.name, found.location
