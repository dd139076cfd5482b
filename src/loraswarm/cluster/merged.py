"""Many replicas' catalogs, states and counts as one engine's. Pure. Used by the front."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from loraswarm.cluster.replicas import Replica
from loraswarm.core.admin import AdapterState, ScanReport, Tier
from loraswarm.core.client import AdapterSummary, EngineStats, MergeState, TimeTotals

TIERS: tuple[Tier, ...] = ("device", "host", "store")
State = Literal["served", "pending", "refused", "unloaded"]
STATES: tuple[State, ...] = ("served", "pending", "refused", "unloaded")
SUMMED = (
    "host_bytes",
    "device_bytes",
    "num_running",
    "num_waiting",
    "num_requests",
    "num_device_hits",
    "num_host_hits",
    "num_misses",
)


class MergedAdapters(Mapping[str, AdapterSummary]):
    """The catalogs of all replicas by name; an adapter that any of them serves is served."""

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        self._replicas = replicas

    def __getitem__(self, name: str) -> AdapterSummary:
        found: AdapterSummary | None = None
        for replica in self._replicas.values():
            summary = replica.adapters.get(name)
            if summary is not None and (found is None or _rank(summary) > _rank(found)):
                found = summary
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        names: dict[str, None] = {}
        for replica in self._replicas.values():
            names.update(dict.fromkeys(replica.adapters))
        return iter(names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def merge_states(states: Sequence[AdapterState]) -> AdapterState:
    """One adapter's states on several replicas: the nearest tier, counts added up.

    `reason` says so if some of them do not serve it.
    """
    best = min(states, key=lambda one: (STATES.index(one.state), TIERS.index(one.tier)))
    others = sorted({one.state for one in states} - {best.state})
    if others:
        num_others = sum(one.state != best.state for one in states)
        note = f"{num_others} of {len(states)} replicas have it as {', '.join(others)}"
        best = dataclasses.replace(best, reason="; ".join(filter(None, (best.reason, note))))
    sums = {name: sum(getattr(one, name) for one in states) for name in SUMMED}
    return dataclasses.replace(
        best,
        **sums,
        is_loading=any(one.is_loading for one in states),
        is_pinned=any(one.is_pinned for one in states),
        last_error=next((one.last_error for one in states if one.last_error), None),
    )


def merge_catalogs(found: Sequence[Sequence[AdapterState]]) -> tuple[AdapterState, ...]:
    """The states of all adapters of all replicas, sorted by name."""
    by_name: dict[str, list[AdapterState]] = {}
    for states in found:
        for state in states:
            by_name.setdefault(state.name, []).append(state)
    return tuple(merge_states(states) for _, states in sorted(by_name.items()))


def merge_reports(reports: Sequence[ScanReport]) -> ScanReport:
    """What any of them has found; they look at the same stores."""
    names = "added", "changed", "removed", "pending", "failures"
    lists = {
        name: tuple(sorted({item for report in reports for item in getattr(report, name)}))
        for name in names
    }
    return ScanReport(**lists, elapsed_s=max(report.elapsed_s for report in reports))


def merge_stats(stats: Sequence[EngineStats]) -> EngineStats:
    """Counts added up; names of adapters together."""
    merged: dict[str, object] = {}
    for field in dataclasses.fields(EngineStats):
        values = [getattr(one, field.name) for one in stats]
        if field.name == "loads":
            merged[field.name] = _merge_loads(values)
        elif field.name == "merging":
            merged[field.name] = _merge_merging([one for one in values if one is not None])
        elif field.name.endswith("_adapters") and field.type == "tuple[str, ...]":
            merged[field.name] = tuple(sorted({name for names in values for name in names}))
        else:
            merged[field.name] = sum(values)
    return EngineStats(**merged)  # type: ignore[arg-type]


def only_totals(stats: EngineStats) -> EngineStats:
    """What stays of a replica's counts when it is gone: those that only grow."""
    kept = {
        field.name: getattr(stats, field.name)
        for field in dataclasses.fields(EngineStats)
        if field.name.startswith("total_") or field.name == "loads"
    }
    if stats.merging is not None:
        total = stats.merging.total_switches
        kept["merging"] = dataclasses.replace(NOTHING_MERGED, total_switches=total)
    return dataclasses.replace(NOTHING, **kept)


NOTHING_MERGED = MergeState(
    target=None,
    share=0.0,
    num_merged_linears=0,
    merged_bytes=0,
    reserved_bytes=0,
    total_switches=0,
)
NOTHING = EngineStats(
    num_waiting=0,
    num_running=0,
    num_free_pages=0,
    num_kv_pages=0,
    num_adapter_pages=0,
    num_pinned_adapters=0,
    num_resident_adapters=0,
)


def _merge_loads(found: Sequence[Mapping[str, TimeTotals]]) -> dict[str, TimeTotals]:
    merged: dict[str, TimeTotals] = {}
    for loads in found:
        for stage, add in loads.items():
            old = merged.get(stage, TimeTotals())
            merged[stage] = TimeTotals(
                count=old.count + add.count,
                seconds=old.seconds + add.seconds,
                num_bytes=old.num_bytes + add.num_bytes,
            )
    return merged


def _merge_merging(states: Sequence[MergeState]) -> MergeState | None:
    """Counts and bytes added up; a target and its share only if all that have one agree."""
    if not states:
        return None
    shares = {one.target: one.share for one in states if one.target is not None}
    is_one = len(shares) == 1
    sums = ("num_merged_linears", "merged_bytes", "reserved_bytes", "total_switches")
    return MergeState(
        target=next(iter(shares)) if is_one else None,
        share=sum(one.share for one in states) / len(states) if is_one else 0.0,
        **{name: sum(getattr(one, name) for one in states) for name in sums},
    )


def _rank(summary: AdapterSummary) -> tuple[bool, bool, int]:
    return summary.refusal is None, bool(summary.digest), summary.generation
