"""The one stream of events that a client gets, whichever replicas compute it in turn.

Owns the order: place, send, forward, and again from where the client is when a replica dies, gives
the request away or refuses to go on with it. Used by the front.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from loraswarm.cluster.admission import Admission
from loraswarm.cluster.failover import Suspects, is_loss, may_go_on_elsewhere, snapshot_of
from loraswarm.cluster.fleet import Fleet
from loraswarm.cluster.open_requests import OpenRequest, OpenRequests
from loraswarm.cluster.replicas import contents_of
from loraswarm.cluster.view import ClusterView
from loraswarm.core.events import ErrorInfo, SequenceEvent
from loraswarm.errors import LoRASwarmError

Events = AsyncGenerator[SequenceEvent, None]


class Streams:
    """Runs open requests to their ends."""

    def __init__(
        self,
        fleet: Fleet,
        requests: OpenRequests,
        admission: Admission,
        view: ClusterView,
        is_one_machine: bool,
    ) -> None:
        """`is_one_machine`: all replicas read the same files, see `may_go_on_elsewhere`."""
        self._is_one_machine = is_one_machine
        self._fleet = fleet
        self._requests = requests
        self._view = view
        self._admission = admission
        self._suspects = Suspects()

    async def run(self, held: OpenRequest) -> Events:
        """The request's events: no token twice or left out, exactly one terminal event."""
        try:
            while held.is_open:
                async with aclosing(await self._next_stream(held)) as stream:
                    async for event in stream:
                        if is_loss(event) or self._is_refused(held, event):
                            break
                        yield self._take(held, event)
                        if event.finish_reason is not None:
                            return
                await self._note_end(held)
        except LoRASwarmError as error:
            yield SequenceEvent(
                request_id=held.request_id, finish_reason="error", error=ErrorInfo.of(error)
            )
        finally:
            self._suspects.acquit(held)
            if held.handover is not None:  # its client has gone before it read on there
                await held.handover.stream.aclose()

    async def _next_stream(self, held: OpenRequest) -> Events:
        """Of the replica that has adopted it, or of one that is given it now."""
        handover, held.handover = held.handover, None
        if handover is not None:
            if handover.num_tokens == len(held.token_ids):
                held.is_arriving = True
                return handover.stream
            await handover.stream.aclose()  # the source died before it had sent its last ones
        while True:
            await self._suspects.begin(held)
            replica = await self._admission.place(held)
            if not held.token_ids:
                held.digests = contents_of(replica, held.request)
                return replica.generate(held.request)
            try:
                return await replica.adopt(snapshot_of(held))
            except LoRASwarmError as error:
                if not replica.is_alive:
                    self._note_loss(held)
                elif not self._goes_on_elsewhere(held, str(error)):
                    raise

    async def _note_end(self, held: OpenRequest) -> None:
        """A stream has ended without the request's end."""
        owner = held.replica_id
        if owner is None:
            return  # it was refused, and is in line again
        await held.settled.wait()
        if held.handover is None:
            assert owner == held.replica_id, held.request_id
            self._note_loss(held)

    def _note_loss(self, held: OpenRequest) -> None:
        owner = held.replica_id or ""
        self._requests.displace(held)
        replica = self._fleet.replicas.get(owner)
        if replica is not None and owner in self._fleet.leaving:
            return  # it was sent away, which is nobody's fault
        self._fleet.note_death(owner)
        self._suspects.note_loss(held)

    def _is_refused(self, held: OpenRequest, event: SequenceEvent) -> bool:
        """Does the replica that was to go on with it say that it cannot, though another may?"""
        if event.error is None or not held.is_arriving:
            return False
        return self._goes_on_elsewhere(held, event.error.message)

    def _goes_on_elsewhere(self, held: OpenRequest, reason: str) -> bool:
        accepting = [one.replica_id for one in self._view.replicas.values() if one.accepts]
        if not may_go_on_elsewhere(held, accepting, reason, self._is_one_machine):
            return False
        self._requests.displace(held)
        return True

    def _take(self, held: OpenRequest, event: SequenceEvent) -> SequenceEvent:
        if event.token_ids:
            if held.digests is None and not held.token_ids:
                replica = self._fleet.replicas.get(held.replica_id or "")
                held.digests = None if replica is None else contents_of(replica, held.request)
            self._suspects.acquit(held)
        return self._requests.take(held, event)
