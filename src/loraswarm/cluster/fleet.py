"""Which replicas there are: starts them, replaces those that die or hang, drains and removes them.

Owns membership: the replicas by id and their rows of the ClusterView. A replica that comes later
has a new id. Knows no requests; the front says whether a replica has any (`Upkeep`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from loraswarm.cluster.news import News
from loraswarm.cluster.replicas import Replica, StartReplica
from loraswarm.cluster.view import ClusterView, ReplicaView
from loraswarm.errors import EngineError, InvalidRequest, LoRASwarmError

MOST_ADDED = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetLimits:
    """A replica that answers nothing for `hang_s` is killed; it is asked every `ping_s` while it
    has requests, else every `idle_ping_s`, as an idle engine checks itself before it answers.
    Starts that fail are tried again after `retry_s`, doubled each time up to `max_retry_s`;
    `max_failures` in a row while nothing serves end the cluster. A removal waits `drain_s` for the
    replica's requests to end or move.
    """

    ping_s: float = 1.0
    idle_ping_s: float = 10.0
    hang_s: float = 60.0
    retry_s: float = 0.5
    max_retry_s: float = 30.0
    max_failures: int = 5
    drain_s: float = 60.0


class Upkeep(Protocol):
    """What the fleet asks of the front."""

    def is_busy(self, replica_id: str) -> bool:
        """Does it have requests, so that it must answer?"""
        ...

    def note_arrival(self, replica: Replica) -> None:
        """It serves from now on."""
        ...

    def note_departure(self, replica_id: str) -> None:
        """It is gone."""
        ...

    async def prepare(self, replica: Replica) -> None:
        """Before it serves: what it must be told first."""
        ...

    async def evacuate(self, replica_id: str) -> None:
        """Move away what can be moved; it takes no new requests."""
        ...


class Fleet:
    """The replicas of one cluster; `wanted` of them are kept alive."""

    def __init__(
        self, start: StartReplica, view: ClusterView, upkeep: Upkeep, limits: FleetLimits
    ) -> None:
        self.replicas: dict[str, Replica] = {}
        self.news = News()
        self.wanted = 0
        self.failure: LoRASwarmError | None = None
        self._start = start
        self._view = view
        self._upkeep = upkeep
        self._limits = limits
        self._numbers = itertools.count()
        self._num_starting = 0
        self._num_failures = 0
        self._leaving: set[str] = set()
        self._ending: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended = asyncio.Event()
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def num_serving(self) -> int:
        return sum(replica.accepts for replica in self._view.replicas.values())

    @property
    def num_starting(self) -> int:
        return self._num_starting

    @property
    def leaving(self) -> frozenset[str]:
        """Those that are being drained, and may be reopened."""
        return frozenset(self._leaving - self._ending)

    async def open(self, num_replicas: int) -> None:
        """Start the first replicas, all at once.

        Raises   what the first that failed says; the others are closed.
        """
        self.wanted = self._num_starting = num_replicas
        starts = [asyncio.create_task(self._start_one()) for _ in range(num_replicas)]
        try:
            await asyncio.gather(*starts)
            self._num_starting = 0
            self._replace_missing()  # one may have died while others still started
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise

    def add(self, num_replicas: int) -> None:
        """Keep so many more alive. Raises InvalidRequest if that is none, or very many."""
        if not 1 <= num_replicas <= MOST_ADDED:
            raise InvalidRequest(
                f"count is {num_replicas}; it must be at least 1 and at most {MOST_ADDED}", "count"
            )
        self.wanted += num_replicas
        self._replace_missing()

    async def remove(self, replica_id: str) -> None:
        """Drain it, then end it; what still runs on it after `drain_s` is run again elsewhere.

        Raises   InvalidRequest if there is no such replica, or no other one serves, or it was
                 reopened before it was empty.
        """
        if replica_id not in self.replicas or replica_id in self._leaving:
            known = ", ".join(sorted(self.replicas.keys() - self._leaving)) or "none"
            raise InvalidRequest(f"no replica is named {replica_id!r}; known: {known}", "replica")
        if self.wanted <= 1:
            raise InvalidRequest("this is the last replica; add another one first", "replica")
        others = (each for each in self._view.replicas.values() if each.replica_id != replica_id)
        if not any(each.accepts for each in others):
            raise InvalidRequest(
                f"no other replica serves now ({self._num_starting} are being started); remove"
                f" {replica_id!r} when one does",
                "replica",
            )
        self.wanted -= 1
        self._leaving.add(replica_id)
        self._view.replicas[replica_id].accepts = False
        log.info("replica=%s leaving", replica_id)
        # Once begun it is brought to its end, also if the caller stops waiting.
        await asyncio.shield(self._spawn(self._drain(replica_id)))
        if replica_id in self.replicas:
            raise InvalidRequest(
                f"replica {replica_id!r} was reopened while it drained, as requests queue",
                "replica",
            )

    async def _drain(self, replica_id: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_s):
                await self._upkeep.evacuate(replica_id)
                while replica_id in self._leaving and self._upkeep.is_busy(replica_id):
                    await self.news.wait()
        if replica_id not in self._leaving:
            return  # it was reopened, or has died
        self._ending.add(replica_id)
        if replica := self.replicas.get(replica_id):
            await replica.close()
        while replica_id in self.replicas:
            await self.news.wait()

    def reopen(self, replica_id: str) -> None:
        """Keep one that is being drained; nothing happens if it is not, or no more."""
        if replica_id in self.leaving and replica_id in self.replicas:
            self._leaving.discard(replica_id)
            self.wanted += 1
            self._view.replicas[replica_id].accepts = True
            self.news.tell()

    def kill(self, replica_id: str) -> None:
        """It does not do what it must: end it at once, and let another take its place."""
        if replica := self.replicas.get(replica_id):
            self._view.replicas[replica_id].accepts = False
            replica.kill()

    def note_death(self, replica_id: str) -> None:
        """A stream of it has ended with its death, which may be seen here later: nothing more is
        to be sent there. Nothing happens to one that is alive, which would never accept again."""
        replica = self.replicas.get(replica_id)
        if replica is not None and not replica.is_alive:
            self._view.replicas[replica_id].accepts = False

    async def close(self) -> None:
        """End all replicas. Safe to call twice."""
        self._is_closed = True
        self.news.tell()
        await asyncio.gather(*(replica.close() for replica in tuple(self.replicas.values())))
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in tuple(self.replicas.values())))
        self._ended.set()

    async def wait_closed(self) -> None:
        """Until `close` has been called, or no replica could be started for long."""
        await self._ended.wait()

    async def _start_one(self) -> None:
        """Start a replica and let it serve; it is watched from then on."""
        replica = await self._start(f"r{next(self._numbers)}")
        try:
            await self._upkeep.prepare(replica)
        except BaseException:
            await replica.close()
            raise
        self._join(replica)

    def _join(self, replica: Replica) -> None:
        self.replicas[replica.replica_id] = replica
        self._view.replicas[replica.replica_id] = ReplicaView(replica.replica_id, replica.limits)
        self._num_failures = 0
        self._upkeep.note_arrival(replica)
        self._spawn(self._watch(replica))
        self._spawn(self._ping(replica))
        log.info("replica=%s serving num_replicas=%d", replica.replica_id, len(self.replicas))
        self.news.tell()

    async def _watch(self, replica: Replica) -> None:
        """When it ends, take it out and start another in its place if one is wanted."""
        await replica.wait_closed()
        replica_id = replica.replica_id
        del self.replicas[replica_id]
        self._view.remove_replica(replica_id)
        self._upkeep.note_departure(replica_id)
        is_expected = replica_id in self._leaving or self._is_closed
        self._leaving.discard(replica_id)
        self._ending.discard(replica_id)
        level = logging.INFO if is_expected else logging.ERROR
        log.log(level, "replica=%s gone num_replicas=%d", replica_id, len(self.replicas))
        self._replace_missing()
        self.news.tell()
        await replica.close()

    def _replace_missing(self) -> None:
        if self._is_closed:
            return
        num_staying = len(self.replicas.keys() - self._leaving)
        for _ in range(self.wanted - num_staying - self._num_starting):
            self._num_starting += 1
            self._spawn(self._start_until_it_serves())

    async def _start_until_it_serves(self) -> None:
        delay_s = self._limits.retry_s
        try:
            while not self._is_closed:
                try:
                    await self._start_one()
                    return
                except Exception as error:
                    self._note_failure(error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, self._limits.max_retry_s)
        finally:
            self._num_starting -= 1

    def _note_failure(self, error: Exception) -> None:
        self._num_failures += 1
        log.error("replica start failed num_failures=%d reason=%s", self._num_failures, error)
        if self._num_failures >= self._limits.max_failures and not self.replicas:
            self.failure = EngineError(f"no replica can be started: {error}")
            self._is_closed = True
            self._ended.set()
            self.news.tell()

    async def _ping(self, replica: Replica) -> None:
        """Kill it when it does not answer."""
        idle_s = 0.0
        while replica.is_alive:
            await asyncio.sleep(self._limits.ping_s)
            idle_s += self._limits.ping_s
            is_busy = self._upkeep.is_busy(replica.replica_id)
            if not is_busy and idle_s < self._limits.idle_ping_s:
                continue
            idle_s = 0.0
            asked_s = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(self._limits.hang_s):
                    await replica.stats()
            except TimeoutError:
                silent_s = asyncio.get_running_loop().time() - asked_s
                log.error("replica=%s killed silent_s=%.1f", replica.replica_id, silent_s)
                self.kill(replica.replica_id)
                return
            except LoRASwarmError:
                return  # it has died, which `_watch` sees

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of the fleet failed", exc_info=error)
