"""What tests of migration do with two engines in one process."""

from __future__ import annotations

from dataclasses import replace

from loraswarm.core.events import SequenceEvent
from loraswarm.core.snapshot import SequenceSnapshot
from loraswarm.engine.engine import Engine


def take(engine: Engine, request_id: str, with_kv: bool = True) -> SequenceSnapshot:
    """The snapshot of an open request, frozen from now on; no step was under way."""
    snapshot, events = engine.freeze(request_id, with_kv)
    assert snapshot is not None
    assert not events
    return snapshot


def renamed(snapshot: SequenceSnapshot, request_id: str) -> SequenceSnapshot:
    return replace(snapshot, request=replace(snapshot.request, request_id=request_id))


def finish(engine: Engine) -> dict[str, list[SequenceEvent]]:
    """Step to the end of everything; events by request."""
    events: dict[str, list[SequenceEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check()
    return events


def computed_tokens(engine: Engine) -> list[int]:
    """How many tokens each later step computes, as far as it has come."""
    counts: list[int] = []
    prepare = engine._runner.prepare

    def counted(step, kv_cache):
        counts.append(step.num_tokens)
        return prepare(step, kv_cache)

    engine._runner.prepare = counted
    return counts


def assert_nothing_left(engine: Engine) -> None:
    """No page, pin, hold or name of a request is left."""
    engine.check()
    stats, pool = engine.stats(), engine._memory.pool
    assert (stats.num_running, stats.num_waiting, stats.num_frozen) == (0, 0, 0)
    assert (stats.num_kv_pages, stats.num_pinned_adapters) == (0, 0)
    num_held = stats.num_prefix_pages + stats.num_adapter_pages
    assert stats.num_free_pages + num_held == pool.num_pages
    assert not engine._reception.open_ids
    assert not engine._residency._users
    assert not engine._memory.adapters._protected
