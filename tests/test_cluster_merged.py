"""Counts of several replicas become those of one engine."""

from __future__ import annotations

import dataclasses

from loraswarm.cluster.merged import NOTHING, merge_stats, only_totals
from loraswarm.core.client import EngineStats, MergeState, TimeTotals


def merged(target: str | None, share: float, switches: int) -> EngineStats:
    state = MergeState(
        target=target,
        share=share,
        num_merged_linears=2,
        merged_bytes=10,
        reserved_bytes=100,
        total_switches=switches,
    )
    return dataclasses.replace(NOTHING, merging=state)


def test_counts_are_added_and_names_and_loads_are_joined():
    one = dataclasses.replace(
        NOTHING,
        num_running=2,
        total_misses=3,
        running_adapters=("b", "a"),
        loads={"read": TimeTotals(count=1, seconds=0.5, num_bytes=7)},
    )
    two = dataclasses.replace(one, running_adapters=("c", "a"), loads={})
    found = merge_stats([one, two, NOTHING])
    assert (found.num_running, found.total_misses) == (4, 6)
    assert found.running_adapters == ("a", "b", "c")
    assert found.loads == {"read": TimeTotals(count=1, seconds=0.5, num_bytes=7)}
    assert found.merging is None


def test_what_is_merged_is_named_only_where_all_agree():
    same = merge_stats([merged("a", 1.0, 3), merged("a", 0.5, 4), merged(None, 0.0, 1)]).merging
    assert (same.target, same.share) == ("a", 0.5)
    assert (same.num_merged_linears, same.merged_bytes, same.reserved_bytes) == (6, 30, 300)
    assert same.total_switches == 8
    differ = merge_stats([merged("a", 1.0, 3), merged("b", 1.0, 4)]).merging
    assert (differ.target, differ.share, differ.total_switches) == (None, 0.0, 7)


def test_of_a_replica_that_is_gone_only_what_grows_is_kept():
    gone = only_totals(dataclasses.replace(merged("a", 1.0, 3), num_running=5, total_misses=9))
    assert (gone.num_running, gone.total_misses) == (0, 9)
    found = merge_stats([gone, merged("b", 1.0, 4)]).merging
    assert (found.target, found.merged_bytes, found.total_switches) == ("b", 10, 7)
