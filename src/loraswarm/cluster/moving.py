"""Moves a running request from one replica to another: it has exactly one owner at any time.

    freeze     the source plans it no more, keeps its pages, and says where it is
    adopt      the target takes the tokens (and K and V), and goes on
    hand over  the target is the owner; the client has read the source's events to their end first
    release    the source forgets it

If a hop before the hand-over fails, the source thaws it and remains its owner; if the source has
died, the request is run again from what its client has. A replica that obeys neither is killed.
Called by the controller and by draining.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from loraswarm.cluster.fleet import Fleet
from loraswarm.cluster.open_requests import Handover, OpenRequest, OpenRequests, Pause
from loraswarm.cluster.replicas import Replica
from loraswarm.errors import LoRASwarmError

T = TypeVar("T")
HOP_TIMEOUT_S = 30.0
log = logging.getLogger(__name__)


class MoveFailed(LoRASwarmError):
    """The request was not moved; it goes on where it was."""


class Mover:
    """Carries out single moves, any number at once but one of a request."""

    def __init__(
        self, fleet: Fleet, requests: OpenRequests, timeout_s: float = HOP_TIMEOUT_S
    ) -> None:
        """No hop takes longer than `timeout_s`."""
        self._fleet = fleet
        self._requests = requests
        self._timeout_s = timeout_s

    async def move(self, request_id: str, target_id: str, with_kv: bool) -> None:
        """Let `target_id` go on with the request, with its K and V or by computing them again.

        Raises   MoveFailed: it has ended, is being moved, or a hop failed.
        """
        held = self._requests.get(request_id)
        source = self._fleet.replicas.get(held.replica_id or "") if held else None
        target = self._fleet.replicas.get(target_id)
        if held is None or source is None or target is None or source is target:
            raise MoveFailed(f"request {request_id!r} cannot be moved to {target_id!r}")
        if not held.settled.is_set() or held.handover is not None:
            raise MoveFailed(f"request {request_id!r} is being moved")
        if target_id in held.refused_by:
            raise MoveFailed(f"replica {target_id!r} has refused request {request_id!r}")
        held.settled.clear()
        # What was begun is brought to its end also if the caller stops waiting.
        work = asyncio.ensure_future(self._move(held, source, target, with_kv))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait((work,))
            raise

    async def _move(
        self, held: OpenRequest, source: Replica, target: Replica, with_kv: bool
    ) -> None:
        request_id, begin_s = held.request_id, asyncio.get_running_loop().time()
        try:
            handover = await self._take_over(held, source, target, with_kv)
            num_tokens = len(held.request.prompt_token_ids) + handover.num_tokens
            pause = Pause(begin_s, num_tokens, with_kv)
            self._requests.hand_over(held, target.replica_id, handover, pause)
        except Exception as error:  # whatever it is, the source must not hold it for ever
            await self._obey(source, lambda: source.thaw(request_id))
            raise MoveFailed(f"request {request_id!r} stays where it is: {error}") from error
        finally:
            held.settled.set()
        await self._obey(source, lambda: source.release(request_id))

    async def _take_over(
        self, held: OpenRequest, source: Replica, target: Replica, with_kv: bool
    ) -> Handover:
        """Freeze it there and adopt it here. Raises LoRASwarmError if it must be thawed."""
        snapshot = await self._within(source.freeze(held.request_id, with_kv))
        try:
            stream = await self._within(target.adopt(snapshot))
        except LoRASwarmError:
            held.refused_by.add(target.replica_id)  # the next plan would try the same again
            raise
        if held.is_open and target.replica_id in self._fleet.replicas:
            return Handover(stream, len(snapshot.output_token_ids))
        await stream.aclose()
        raise MoveFailed("it has ended meanwhile, or its target has")

    async def _within(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work
        except TimeoutError:
            raise MoveFailed(f"no answer in {self._timeout_s:g} s") from None

    async def _obey(self, replica: Replica, command: Callable[[], Awaitable[None]]) -> None:
        """See that it does so, or is no more: until then it holds a request that it must not."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await command()
        except (LoRASwarmError, TimeoutError) as error:
            if replica.is_alive:
                log.error("replica=%s killed: it does not let go, %r", replica.replica_id, error)
                self._fleet.kill(replica.replica_id)
