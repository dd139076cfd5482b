"""Which adapter names may be asked for, which content each stands for, and why the others may not.

Owns the map from names to generations: a change of content under a name is a new one. Knows
nothing of weights or memory, and reads no file: what was found comes from adapters/scanner, what
was described from whoever did it. Held by the engine. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.adapters.generations import Generations
from loraswarm.adapters.stores import Found, ScanChange, name_problem, printable
from loraswarm.adapters.unserved import (
    Refusal,
    Unserved,
    log_refusal,
    no_log,
    shadow_refusal,
    unserved_summary,
)
from loraswarm.core.admin import ScanReport
from loraswarm.core.client import AdapterSummary
from loraswarm.core.sequence import AdapterKey
from loraswarm.errors import AdapterError, InvalidRequest, Overloaded, UnknownAdapter

MAX_INFOS = 2048
State = Literal["served", "pending", "refused", "unloaded"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One generation of a name. `info` is None while it is not described."""

    name: str
    location: str
    stamp: str
    generation: int
    info: AdapterInfo | None
    is_by_request: bool = False

    @property
    def found(self) -> Found:
        """What it was made of."""
        return Found(self.name, self.location, self.stamp, is_by_request=self.is_by_request)

    @property
    def key(self) -> AdapterKey:
        assert self.info is not None, f"{self.name!r} is not described"
        return self.info.key


@dataclass(slots=True)
class _Row:
    """A name. `summary` outlives `entry.info`, which may be forgotten."""

    entry: Entry
    summary: AdapterSummary
    found: Found

    def is_of(self, found: Found) -> bool:
        """Whether it was made of these very files."""
        held = self.found
        return (held.location, held.stamp) == (found.location, found.stamp)


class Catalog:
    """Names, each with the generation that new requests get.

    Descriptions are kept for at most MAX_INFOS names, those least recently asked for go first; what
    listings show of them stays.
    """

    def __init__(self, model_name: str | None = None, is_logged: bool = True) -> None:
        """`model_name` is the id of the base model, which no adapter may take. `is_logged` is about
        what is refused."""
        self._model_name = model_name
        self._rows: dict[str, _Row] = {}
        self._pending: dict[str, Found] = {}
        self._log = log_refusal if is_logged else no_log
        self._unserved = Unserved(self._log)
        self._generations = Generations()
        self._described: dict[str, None] = {}
        self._touched: set[str] = set()

    @property
    def served(self) -> Mapping[str, AdapterInfo]:
        """What is described and can be asked for, by name."""
        entries = {name: self._rows[name].entry for name in sorted(self._described)}
        return MappingProxyType(
            {name: entry.info for name, entry in entries.items() if entry.info is not None}
        )

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What is there and not served, sorted by name."""
        refusals = [
            Refusal(name, Path(row.entry.location), row.summary.refusal)
            for name, row in self._rows.items()
            if row.summary.refusal is not None
        ]
        refusals += [shadow_refusal(found) for found in self._unserved]
        return tuple(sorted(refusals, key=lambda refusal: (refusal.name, refusal.path)))

    @property
    def pending(self) -> Mapping[str, Found]:
        """What is still being written, by name; the generation before may be served meanwhile."""
        return MappingProxyType(self._pending)

    def apply(self, change: ScanChange) -> ScanReport:
        """Enter what a scan has found. What is there already stays as it is."""
        before = self._rows.copy()
        touched = {found.name for found in (*change.found, *change.removed)}
        for found in change.removed:
            self._leave(found)
        if change.is_first and not change.failures:
            touched |= self._leave_absent(change)
        for found in sorted(change.found, key=lambda found: found.shadowed_by is not None):
            self._enter(found)
        self._pending = {found.name: found for found in change.pending}
        both = {name for name in touched if name in before and name in self._rows}
        return ScanReport(
            added=tuple(sorted(name for name in touched - both if name in self._rows)),
            changed=tuple(sorted(n for n in both if before[n] is not self._rows[n])),
            removed=tuple(sorted(name for name in touched - both if name in before)),
            pending=tuple(sorted(self._pending)),
            failures=change.failures,
            elapsed_s=change.elapsed_s,
        )

    def check_free(self, name: str, in_place: bool) -> None:
        """Raise InvalidRequest if an operator may not load an adapter as `name`."""
        problem = name_problem(name, "lora_name")
        if problem is not None:
            raise InvalidRequest(problem, "lora_name")
        if name == self._model_name:
            raise InvalidRequest(
                f"{name!r} is the name of the base model; choose another lora_name", "lora_name"
            )
        row = self._rows.get(name)
        if row is not None and row.summary.refusal is None and not in_place:
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded. If you want to load the"
                " adapter in place, set 'load_inplace' to True.",
                "lora_name",
            )

    def register(self, found: Found, in_place: bool) -> Entry:
        """Serve what a request has named; a name that is served gets a new generation.

        Raises    InvalidRequest as `check_free`; AdapterError if its kind cannot be served.
        """
        self.check_free(found.name, in_place)
        if found.problem is not None:
            raise AdapterError(found.problem)
        row = self._rows.get(found.name)
        served = None if row is None else row.found
        unloaded = self._unserved.unloaded_at(found.name, found.location)
        was_shadowed = self._unserved.unshadow(found)
        is_scanned = not was_shadowed and any(
            known.location == found.location and not known.is_by_request
            for known in (served, unloaded)
            if known is not None
        )
        entry = self._put(replace(found, is_by_request=not is_scanned))
        if served and not served.is_by_request and served.location != found.location:
            self._unserved.shadow(served, found.location)
        return entry

    def remove(self, name: str) -> Entry:
        """Serve `name` no more. A scan brings it back only if its files have changed since.

        Raises    UnknownAdapter.
        """
        row = self._rows.get(name)
        if row is None:
            raise UnknownAdapter(name, self._served_names())
        self._drop(name)
        self._unserved.unload(row.found)
        return row.entry

    def resolve(self, name: str) -> Entry:
        """The generation that a new request for `name` gets.

        Raises    AdapterError with the reason if it is refused; Overloaded if it is still being
                  written; UnknownAdapter, listing the served ones, if it is not there.
        """
        row = self._rows.get(name)
        is_served = row is not None and row.summary.refusal is None
        if not is_served and name in self._pending:
            raise Overloaded(f"adapter {name!r} is still being written; try again in a moment")
        if row is None:
            raise UnknownAdapter(name, self._served_names())
        if row.summary.refusal is not None:
            raise AdapterError(row.summary.refusal)
        if name in self._described:
            self._described[name] = self._described.pop(name)
        return row.entry

    def learned(self, entry: Entry, info: AdapterInfo, stamp: str | None = None) -> Entry:
        """Enter what files turned out to be, and the `stamp` of what was read if that was not what
        was found; returns the entry with both.

        Another digest is a new generation. If the name has moved on, nothing changes.
        """
        row = self._row_of(entry)
        if row is None:
            return replace(entry, info=info, stamp=stamp or entry.stamp)
        is_new = row.summary.digest not in ("", info.digest)
        generation = self._generations.next(entry.name) if is_new else entry.generation
        row.entry = replace(entry, generation=generation, info=info, stamp=stamp or entry.stamp)
        row.found = replace(row.found, stamp=row.entry.stamp)
        row.summary = _summary(row.entry, info)
        self._touched.add(entry.name)
        self._described.pop(entry.name, None)
        self._described[entry.name] = None
        self._forget_infos()
        return row.entry

    def refused(self, entry: Entry, reason: str) -> None:
        """That content cannot be served; no-op if the name has moved on."""
        row = self._row_of(entry)
        if row is not None:
            self._refuse(row, reason)

    def surveyed(self, found: Found, row: AdapterSummary | str) -> None:
        """Enter what a survey says for listings, or why it refuses; no-op for what is known."""
        known = self._rows.get(found.name)
        if known is None or not known.is_of(found) or not _is_undescribed(known):
            return
        if isinstance(row, str):
            self._refuse(known, row)
            return
        entry = known.entry
        known.summary = replace(row, path=known.summary.path, generation=entry.generation)
        self._touched.add(found.name)

    def entry_named(self, name: str) -> Entry | None:
        """What `name` stands for; None if it is not served."""
        row = self._rows.get(name)
        return None if row is None or row.summary.refusal is not None else row.entry

    def entry_of(self, key: AdapterKey) -> Entry | None:
        """The generation of that content, if new requests get it."""
        row = self._rows.get(key[0])
        return row.entry if row is not None and row.summary.digest == key[1] else None

    def is_current(self, key: AdapterKey) -> bool:
        return self.entry_of(key) is not None

    def undescribed(self) -> list[Entry]:
        return [row.entry for row in self._rows.values() if _is_undescribed(row)]

    def summary(self, name: str) -> AdapterSummary:
        """A row of `summaries`. Raises UnknownAdapter."""
        row = self._rows.get(name)
        if row is not None:
            return row.summary
        if name in self._pending:
            return unserved_summary(self._pending[name], "it is still being written")
        unloaded = self._unserved.last_unloaded(name)
        if unloaded is None:
            raise UnknownAdapter(name, self._served_names())
        return unserved_summary(unloaded, "it was unloaded")

    def summaries(self) -> tuple[AdapterSummary, ...]:
        """Every name: served, refused, still being written, or unloaded but there; sorted."""
        names = {*self._rows, *self._pending, *self._unserved.unloaded_names()}
        return tuple(self.summary(name) for name in sorted(names))

    def state_of(self, name: str) -> tuple[State, str | None]:
        """Whether `name` can be asked for, and what is to be said about it.

        Raises    UnknownAdapter.
        """
        summary = self.summary(name)
        if name not in self._rows:
            return ("pending" if name in self._pending else "unloaded"), summary.refusal
        if summary.refusal is not None:
            return "refused", summary.refusal
        shadows = self._unserved.shadows_of(name)
        notes = [f"{printable(found.location)!r} has its name too" for found in shadows]
        if name in self._pending:
            notes.append("its files are being replaced")
        return "served", "; ".join(notes) or None

    def take_changes(self) -> tuple[dict[str, AdapterSummary], tuple[str, ...]]:
        """Rows that are new or changed since last asked, and names that are gone."""
        touched, self._touched = self._touched, set()
        changed = {name: self._rows[name].summary for name in touched if name in self._rows}
        return changed, tuple(sorted(touched - changed.keys()))

    def _enter(self, found: Found) -> None:
        if found.shadowed_by is not None:
            self._unserved.shadow(found, found.shadowed_by)
            return
        row = self._rows.get(found.name)
        is_elsewhere = row is not None and row.found.location != found.location
        if found.is_by_request and (row is None or is_elsewhere):
            return  # it was unloaded or replaced while the scan ran
        if row is not None and is_elsewhere and row.found.is_by_request:
            self._unserved.shadow(found, row.found.location)
            return
        self._unserved.unshadow(found)
        if row is not None and row.is_of(found) and row.found.problem == found.problem:
            row.found = found
        elif row is not None or not self._unserved.was_unloaded(found):
            self._put(found)

    def _leave(self, found: Found) -> None:
        self._unserved.leave(found)
        row = self._rows.get(found.name)
        # With another stamp it was loaded by name while the scan ran.
        if row is not None and row.is_of(found):
            self._drop(found.name)

    def _leave_absent(self, change: ScanChange) -> set[str]:
        """Remove what a scan of everything did not find; returns the names."""
        there = {(found.name, found.location) for found in (*change.found, *change.pending)}
        known = (row.found for row in self._rows.values() if not row.found.is_by_request)
        absent = [
            found
            for found in (*known, *self._unserved)
            if (found.name, found.location) not in there
        ]
        for found in absent:
            self._leave(found)
        return {found.name for found in absent}

    def _put(self, found: Found) -> Entry:
        """Make a new generation; what cannot be served is none."""
        name = found.name
        step = self._generations.last if found.problem is not None else self._generations.next
        self._drop(name)
        self._unserved.reload(name)
        entry = Entry(name, found.location, found.stamp, step(name), None, found.is_by_request)
        row = self._rows[name] = _Row(entry, _undescribed_summary(entry), found)
        if name == self._model_name:
            self._refuse(
                row,
                f"adapter {name!r} has the name of the base model; rename one of them"
                " (--served-model-name)",
            )
        elif found.problem is not None:
            self._refuse(row, found.problem)
        return entry

    def _drop(self, name: str) -> None:
        self._rows.pop(name, None)
        self._described.pop(name, None)
        self._touched.add(name)

    def _refuse(self, row: _Row, reason: str) -> None:
        row.entry = replace(row.entry, info=None)
        row.summary = replace(_undescribed_summary(row.entry), refusal=reason)
        self._described.pop(row.entry.name, None)
        self._touched.add(row.entry.name)
        self._log(row.entry.name, row.entry.location, reason)

    def _row_of(self, entry: Entry) -> _Row | None:
        """The row of an entry that is still its name's."""
        row = self._rows.get(entry.name)
        if row is None:
            return None
        return row if replace(row.entry, info=None) == replace(entry, info=None) else None

    def _forget_infos(self) -> None:
        while len(self._described) > MAX_INFOS:
            oldest = next(iter(self._described))
            del self._described[oldest]
            self._rows[oldest].entry = replace(self._rows[oldest].entry, info=None)

    def _served_names(self) -> Iterable[str]:
        return (name for name, row in self._rows.items() if row.summary.refusal is None)


def _is_undescribed(row: _Row) -> bool:
    return row.summary.digest == "" and row.summary.refusal is None


def _undescribed_summary(entry: Entry) -> AdapterSummary:
    return AdapterSummary(
        name=entry.name, path=printable(entry.location), generation=entry.generation
    )


def _summary(entry: Entry, info: AdapterInfo) -> AdapterSummary:
    return replace(
        _undescribed_summary(entry),
        method=info.method,
        max_rank=info.max_rank,
        num_bytes=info.num_bytes,
        digest=info.digest,
        file_format=info.file_format,
    )
