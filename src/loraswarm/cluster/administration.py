"""An operator's commands, carried out by every replica: all of them, or an error that names who
failed.

Owns what was loaded, unloaded and pinned at run time, which a replica that joins later is told.
Knows nothing about requests. Used by the front.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Literal
from weakref import WeakValueDictionary

from loraswarm.cluster.merged import merge_reports, merge_states
from loraswarm.cluster.replicas import Replica
from loraswarm.core.admin import (
    AdapterState,
    AdminCommand,
    AdminResult,
    LoadAdapter,
    PinAdapter,
    RescanAdapters,
    ScanReport,
    UnloadAdapter,
    UnpinAdapter,
)
from loraswarm.core.events import ErrorInfo, ReportedError
from loraswarm.errors import EngineError, LoRASwarmError, UnknownAdapter

log = logging.getLogger(__name__)
Outcome = AdminResult | LoRASwarmError
Key = tuple[Literal["served", "pinned"], str]


@dataclasses.dataclass(slots=True)
class Intent:
    """What the cluster was last told about a name; `done` are the replicas that did it."""

    number: int
    command: AdminCommand
    done: set[str]
    is_complete: bool = False


class Administration:
    """Commands about adapters; those about one name follow each other."""

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        """`replicas` are those alive, kept current by their owner."""
        self._replicas = replicas
        self._intents: dict[Key, Intent] = {}
        self._numbers = itertools.count()
        # As long as somebody has or waits for one.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def administer(self, command: AdminCommand) -> AdminResult:
        """Carry it out everywhere; it goes on if the caller stops waiting. A replica that dies
        meanwhile is not waited for: the one in its place is told.

        A load or unload that has failed on some replicas is, when it is sent again, sent to those.
        Raises   what they say if all say the same; else an error with the first one's status and
                 all replicas that failed.
        """
        return await asyncio.shield(asyncio.ensure_future(self._administer(command)))

    async def prepare(self, replica: Replica) -> None:
        """Tell a replica that is about to serve what was loaded, unloaded and pinned before.

        Commands that begin meanwhile are told too, so that it misses none if it joins at once.
        What it cannot do is logged: its requests are refused as those of a broken adapter.
        """
        seen = -1
        while missed := [one for one in self._intents.values() if one.number > seen]:
            first = min(missed, key=lambda intent: intent.number)
            if await _tell(replica, first.command):
                first.done.add(replica.replica_id)
            seen = first.number

    async def _administer(self, command: AdminCommand) -> AdminResult:
        turn = self._turns.setdefault(_name_of(command), asyncio.Lock())
        async with turn:
            todo = self._todo(command)
            if not todo:
                raise EngineError("no replica is alive to carry this out; try later")
            before = dict(self._intents)
            intent = self._intend(command)
            outcomes = _without_undone(command, await self._ask(todo, command))
            failed = {n: one for n, one in outcomes.items() if isinstance(one, LoRASwarmError)}
            if intent is not None:
                intent.done |= outcomes.keys() - failed.keys()
                intent.is_complete = not failed
                if not intent.done:
                    self._forget(command, before)
        return _result(command, outcomes)

    def _intend(self, command: AdminCommand) -> Intent | None:
        """Note what is wanted, before any replica has done it."""
        key = _key_of(command)
        if key is None:
            return None
        old = self._intents.pop(key, None)
        is_repeated = old is not None and old.command == command and not old.is_complete
        done = old.done if old is not None and is_repeated else set()
        intent = Intent(next(self._numbers), command, done)
        self._intents[key] = intent
        if isinstance(command, UnloadAdapter):
            self._intents.pop(("pinned", command.name), None)
        return intent

    def _forget(self, command: AdminCommand, before: Mapping[Key, Intent]) -> None:
        """None has done it: what was wanted of the name before holds."""
        name = _name_of(command)
        keys: tuple[Key, ...] = (("served", name), ("pinned", name))
        for key in keys:
            self._intents.pop(key, None)
            if key in before:
                self._intents[key] = before[key]

    def _todo(self, command: AdminCommand) -> dict[str, Replica]:
        alive = {name: replica for name, replica in self._replicas.items() if replica.is_alive}
        if isinstance(command, LoadAdapter | UnloadAdapter):
            intent = self._intents.get(("served", command.name))
            if intent is not None and intent.command == command and not intent.is_complete:
                todo = {name: one for name, one in alive.items() if name not in intent.done}
                return todo or alive  # those that failed are gone
        return alive

    async def _ask(
        self, replicas: Mapping[str, Replica], command: AdminCommand
    ) -> dict[str, Outcome]:
        """What each answers; one that dies is left out, unless all do."""
        found = await asyncio.gather(
            *(replica.administer(command) for replica in replicas.values()), return_exceptions=True
        )
        outcomes: dict[str, Outcome] = {}
        dead: dict[str, Outcome] = {}
        for (name, replica), outcome in zip(replicas.items(), found, strict=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, LoRASwarmError):
                raise outcome
            is_death = isinstance(outcome, LoRASwarmError) and not replica.is_alive
            (dead if is_death else outcomes)[name] = outcome
        return outcomes or dead


def _name_of(command: AdminCommand) -> str:
    return "" if isinstance(command, RescanAdapters) else command.name


def _key_of(command: AdminCommand) -> Key | None:
    """What the command decides for good; None if only for now."""
    if isinstance(command, LoadAdapter | UnloadAdapter):
        return "served", command.name
    if isinstance(command, PinAdapter | UnpinAdapter):
        return "pinned", command.name
    return None


async def _tell(replica: Replica, command: AdminCommand) -> bool:
    """Has it done so? An error is logged, unless there was nothing to undo."""
    if isinstance(command, LoadAdapter):
        # Its name may be there from a scan of the stores.
        command = dataclasses.replace(command, in_place=True)
    try:
        await replica.administer(command)
    except LoRASwarmError as error:
        if not replica.is_alive:
            raise
        is_unknown = error.http_status == UnknownAdapter.http_status
        if is_unknown and isinstance(command, UnloadAdapter | UnpinAdapter):
            return True
        log.error("replica=%s %s: %s", replica.replica_id, command, error)
        return False
    return True


def _without_undone(command: AdminCommand, outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Where there was nothing to undo, as a load had failed there, it is not a failure that one
    could not, if others could."""
    found = dict(outcomes)
    if not isinstance(command, UnloadAdapter | UnpinAdapter):
        return found
    status = UnknownAdapter.http_status
    done = {n: o for n, o in found.items() if getattr(o, "http_status", None) != status}
    return done if any(not isinstance(one, LoRASwarmError) for one in done.values()) else found


def _result(command: AdminCommand, outcomes: Mapping[str, Outcome]) -> AdminResult:
    failed = {name: one for name, one in outcomes.items() if isinstance(one, LoRASwarmError)}
    states = [one for one in outcomes.values() if isinstance(one, AdapterState)]
    reports = [one for one in outcomes.values() if isinstance(one, ScanReport)]
    if failed:
        raise _failure(command, failed, sorted(outcomes.keys() - failed.keys()))
    return merge_reports(reports) if reports else merge_states(states)


def _failure(
    command: AdminCommand, failed: Mapping[str, LoRASwarmError], done: Sequence[str]
) -> LoRASwarmError:
    first = next(iter(failed.values()))
    reasons = {str(error) for error in failed.values()}
    if not done and len(reasons) == 1:
        return first
    said = "; ".join(f"replica {name}: {error}" for name, error in sorted(failed.items()))
    where = f"done by {', '.join(done)}" if done else "done by none"
    info = ErrorInfo.of(first)
    what = type(command).__name__
    message = f"{what} failed on {len(failed)} replicas ({where}): {said}"
    return ReportedError(dataclasses.replace(info, message=message))
