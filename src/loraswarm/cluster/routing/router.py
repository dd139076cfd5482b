"""What a routing policy is asked and what it answers.

A policy keeps nothing but the place in its own order; what it decides from is the ClusterView.
Called by the front and by the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loraswarm.cluster.view import ClusterView, ReplicaView, RoutedRequest


class KnownPrefix(Protocol):
    """Where the beginning of one prompt is cached."""

    def tokens_at(self, replica_id: str) -> int:
        """Tokens of the prompt whose K and V that replica has in cached pages."""
        ...

    def best_replicas(self) -> Sequence[str]:
        """Replicas that have the most of it; none if nobody has any. Some may be gone."""
        ...


@dataclass(frozen=True, slots=True)
class PrefixTokens:
    """A `KnownPrefix` given outright: cached tokens by replica."""

    tokens: Mapping[str, int] = field(default_factory=dict)

    def tokens_at(self, replica_id: str) -> int:
        return self.tokens.get(replica_id, 0)

    def best_replicas(self) -> Sequence[str]:
        most = max(self.tokens.values(), default=0)
        return [each for each, tokens in self.tokens.items() if tokens == most] if most else []


NO_PREFIX = PrefixTokens()


class Router(Protocol):
    """Which replica serves a request."""

    def route(
        self, request: RoutedRequest, view: ClusterView, prefix: KnownPrefix = NO_PREFIX
    ) -> str | None:
        """A replica that accepts requests; the view is left as it is.

        None: the front holds the request and asks again, in order of arrival, when one has ended
        or a replica has come. It is always the answer where no replica accepts requests.
        """
        ...


def accepting(view: ClusterView) -> list[ReplicaView]:
    """Replicas that may be given requests, in the view's order."""
    return [replica for replica in view.replicas.values() if replica.accepts]
