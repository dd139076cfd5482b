"""What an engine counts, read from its parts at one moment. Used by the engine."""

from __future__ import annotations

from loraswarm.core.client import EngineStats
from loraswarm.engine.parts import EngineParts
from loraswarm.engine.states import AdapterStates


def engine_stats(parts: EngineParts, states: AdapterStates) -> EngineStats:
    """Counts of requests, pages and adapters at this moment."""
    memory, host, scheduler = parts.memory, parts.host, parts.scheduler
    totals = states.totals
    running, _ = scheduler.adapters_in_use()
    return EngineStats(
        num_waiting=scheduler.num_waiting + len(states.arrivals),
        num_running=scheduler.num_running,
        num_frozen=scheduler.num_frozen + sum(one.is_frozen for one in states.arrivals),
        num_free_pages=memory.pool.num_free,
        num_kv_pages=memory.pool.num_owned("kv") + memory.prefixes.num_used_pages,
        num_prefix_pages=memory.prefixes.num_idle_pages,
        num_adapter_pages=memory.pool.num_owned("adapter"),
        num_pinned_adapters=memory.adapters.num_pinned,
        num_resident_adapters=memory.adapters.num_resident,
        num_host_adapters=host.num_images,
        num_host_bytes=host.num_bytes,
        num_loading=parts.residency.num_loading,
        total_preemptions=scheduler.num_preemptions,
        total_device_hits=totals["device"],
        total_host_hits=totals["host"],
        total_misses=totals["store"],
        total_load_failures=parts.residency.num_failures,
        total_unkept_images=parts.residency.num_unkept_images,
        total_device_evictions=memory.adapters.total_evictions,
        total_host_evictions=host.total_evictions,
        total_prefix_evictions=memory.prefixes.total_evicted_pages,
        total_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
        total_prefix_asked_tokens=scheduler.num_prefix_asked_tokens,
        loads=dict(parts.residency.loads),
        running_adapters=tuple(sorted(running)),
        waiting_adapters=tuple(sorted(states.waiting_names())),
        merging=None if parts.merger is None else parts.merger.state,
    )
