"""What becomes of a request whose replica dies with it.

It is run again elsewhere from its prompt and the tokens that its client has. One that may itself be
what kills replicas runs on trial, alone among such, until it gets a token or has killed another:
those that merely were beside it are not blamed. Used by the front's streams.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from loraswarm.cluster.open_requests import OpenRequest
from loraswarm.core.events import SequenceEvent
from loraswarm.core.snapshot import SequenceSnapshot
from loraswarm.errors import EngineError, StoreError

LOSSES_BEFORE_TRIAL = 2
MOST_REFUSALS = 8
log = logging.getLogger(__name__)


def is_loss(event: SequenceEvent) -> bool:
    """Is it the replica's end and not the request's? A refusal or a bad adapter is the request's.

    Nobody aborts a request whose client listens but a replica that stops or has given it away.
    """
    if event.error is not None:
        return event.error.error_type == EngineError.error_type
    return event.finish_reason == "abort"


def snapshot_of(held: OpenRequest) -> SequenceSnapshot:
    """What another replica needs to go on after the last token that the client has."""
    return SequenceSnapshot(
        request=held.request,
        output_token_ids=tuple(held.token_ids),
        adapter_digests=held.digests,
    )


def may_go_on_elsewhere(
    held: OpenRequest, accepting: Collection[str], reason: str, is_one_machine: bool
) -> bool:
    """Its replica has refused to go on with what another has begun: is there one left to ask?

    When as many as are to be asked have refused, the contents that the answer was begun with are
    gone, if all replicas are on one machine. Stores stamp a file differently on each machine, so
    that on several they are asked again to go on with what they serve by those names now, rather
    than to break every answer off.

    Raises   StoreError if nobody has the contents any more.
    """
    if held.replica_id is not None:
        held.refused_by.add(held.replica_id)
    is_anyone_left = any(each not in held.refused_by for each in accepting)
    if is_anyone_left and len(held.refused_by) < MOST_REFUSALS:
        return True
    if not held.digests:
        return False
    if is_one_machine:
        raise StoreError(
            "the replica that had begun this answer is gone, and no other goes on with it:"
            f" {reason}; send it again"
        )
    log.warning("request=%s goes on with what its adapters are now: %s", held.request_id, reason)
    held.digests = None
    held.refused_by.clear()
    return True


class Suspects:
    """Requests that were on replicas when these died, again and again without a token."""

    def __init__(self) -> None:
        self._trial = asyncio.Lock()
        self._tried: OpenRequest | None = None

    def note_loss(self, held: OpenRequest) -> None:
        """Its replica has died.

        Raises   EngineError if the request is to blame and must not be run again.
        """
        if len(held.token_ids) > held.num_tokens_at_loss:
            held.num_losses = 0
        held.num_tokens_at_loss = len(held.token_ids)
        held.num_losses += 1
        if held.num_losses <= LOSSES_BEFORE_TRIAL:
            return
        assert self._tried is held, "`begin` lets none run that is suspected and not on trial"
        log.error("request=%s blamed num_losses=%d", held.request_id, held.num_losses)
        raise EngineError(
            f"{held.num_losses} engines in turn have ended while they ran this request, the last"
            " one with no other such request beside it; it is not tried again"
        )

    async def begin(self, held: OpenRequest) -> None:
        """Before it is run again: if it is suspected, wait until no other such one is on trial."""
        if held.num_losses >= LOSSES_BEFORE_TRIAL and self._tried is not held:
            await self._trial.acquire()
            self._tried = held

    def acquit(self, held: OpenRequest) -> None:
        """It has got a token, or has ended."""
        if self._tried is held:
            self._tried = None
            self._trial.release()
