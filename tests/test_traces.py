"""The trace generator of the benchmarks: what its options say is what a trace has."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _load_traces() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_traces", BENCHMARKS / "traces.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


traces = _load_traces()
OPTIONS = traces.TraceOptions(num_requests=1333, num_adapters=133, drift_requests=133)


def popularity(requests):
    return [adapter for adapter, _ in Counter(r.adapter for r in requests).most_common(7)]


def test_a_trace_is_made_by_its_options_alone():
    made = traces.make_trace(OPTIONS)
    assert made == traces.make_trace(OPTIONS)
    assert made.requests != traces.make_trace(replace(OPTIONS, seed=1)).requests
    assert len(made.requests) == 1333
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(made.requests))


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_saved_trace_is_read_back_as_it_was(tmp_path, name):
    made = traces.make_trace(OPTIONS)
    made.save(tmp_path / name)
    assert traces.Trace.load(tmp_path / name) == made


def test_the_recorded_trace_is_what_its_options_make():
    recorded = traces.Trace.load(BENCHMARKS / "traces" / "zipf-drift.jsonl.gz")
    again = traces.make_trace(recorded.options)
    assert recorded.adapters == again.adapters
    assert recorded.requests[:1000] == again.requests[:1000]
    assert len(recorded.adapters) == 2000


def test_a_turn_begins_with_the_turn_before_it_and_sessions_share_the_system_prompt():
    made = traces.make_trace(OPTIONS)
    by_session = {}
    for request in made.requests:
        by_session.setdefault(request.session, []).append(request)
    first, second, third = next(turns for turns in by_session.values() if len(turns) == 3)
    tokens = [made.token_ids(turn) for turn in (first, second, third)]
    assert tokens[1][: len(tokens[0])] == tokens[0]
    assert tokens[2][: len(tokens[1])] == tokens[1]
    other = next(
        turns[0]
        for turns in by_session.values()
        if turns[0].adapter == first.adapter and turns[0].session != first.session
    )
    num_system = made.adapters[first.adapter].num_system_tokens
    assert made.token_ids(other)[:num_system] == tokens[0][:num_system]
    assert made.token_ids(other)[num_system : num_system + 4] != tokens[0][num_system:][:4]


def test_popular_adapters_take_the_share_that_zipf_gives_them():
    options = replace(OPTIONS, num_requests=9999, drift_share=0.0)
    made = traces.make_trace(options)
    counts = Counter(request.adapter for request in made.requests)
    weights = [rank**-options.alpha for rank in range(1, options.num_adapters + 1)]
    expected = sum(weights[:7]) / sum(weights)
    measured = sum(count for _, count in counts.most_common(7)) / len(made.requests)
    assert measured == pytest.approx(expected, abs=0.05)


def test_popularity_drifts_only_if_it_is_to():
    for share, is_same in ((0.0, True), (0.5, False)):
        options = replace(OPTIONS, num_requests=9999, drift_share=share, alpha=1.5)
        requests = traces.make_trace(options).requests
        begin, end = popularity(requests[:3333]), popularity(requests[-3333:])
        assert (set(begin[:3]) == set(end[:3])) == is_same
