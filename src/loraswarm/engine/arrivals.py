"""Requests that wait for adapters to come to host memory, outside the scheduler.

Owns who waits for what; does not load anything. Used by the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraswarm.adapters.catalog import Entry
from loraswarm.adapters.stores import Found
from loraswarm.core.request import Request
from loraswarm.core.snapshot import SequenceSnapshot


@dataclass(slots=True, eq=False)
class Arrival:
    """A request, its adapters as the catalog knew them when it came, its seed, which does not
    depend on when they come, and its place in the line. With a `snapshot` it comes from another
    engine, in the middle of its answer; a frozen one becomes a frozen sequence."""

    request: Request
    entries: list[Entry]
    seed: int
    order: int
    arrived_s: float
    snapshot: SequenceSnapshot | None = None
    is_frozen: bool = False


class Arrivals:
    """Arrivals by request id and by what they wait for."""

    def __init__(self) -> None:
        self._by_id: dict[str, Arrival] = {}
        self._by_found: dict[Found, list[Arrival]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Arrival]:
        return iter(list(self._by_id.values()))

    def get(self, request_id: str) -> Arrival | None:
        return self._by_id.get(request_id)

    def add(self, arrival: Arrival) -> None:
        """Wait for all of its adapters."""
        self._by_id[arrival.request.request_id] = arrival
        for entry in arrival.entries:
            self._by_found.setdefault(entry.found, []).append(arrival)

    def waiting_for(self, entry: Entry) -> list[Arrival]:
        """Those with this adapter among theirs, in order of arrival."""
        return list(self._by_found.get(entry.found, ()))

    def remove(self, request_id: str) -> Arrival | None:
        """Wait no more; None if it did not."""
        arrival = self._by_id.pop(request_id, None)
        for entry in arrival.entries if arrival else ():
            others = self._by_found[entry.found]
            others.remove(arrival)  # type: ignore[arg-type]
            if not others:
                del self._by_found[entry.found]
        return arrival
