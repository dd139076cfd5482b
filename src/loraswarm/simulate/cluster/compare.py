"""Policies side by side on traces of a cluster: the figures of each run.

Knows neither files nor how figures are shown. Called by commands/simulate_cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loraswarm.simulate.cluster.cluster import Cluster, Run, Setup, require_fit
from loraswarm.simulate.cluster.policies import Policy
from loraswarm.simulate.cluster.traces import ClusterTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One policy on one trace. A latency is from arrival to the last token.

    `utilization` is the replicas' share of time in steps, `num_loads` count adapters brought from
    their store, `num_lost_tokens` what moves had computed again. `decision_s` are real seconds of
    this machine, all others those of the simulated clock.
    """

    trace: str
    policy: str
    num_requests: int
    mean_latency_s: float
    p50_latency_s: float
    p99_latency_s: float
    mean_first_token_s: float
    p99_first_token_s: float
    output_tokens_per_s: float
    utilization: float
    num_moves: int
    moved_bytes: int
    num_lost_tokens: int
    num_loads: int
    num_preemptions: int
    duration_s: float
    decision_s: float


def compare(
    traces: Sequence[ClusterTrace],
    setup: Setup,
    policies: Sequence[Policy],
    seed: int,
    report: Callable[[str], None],
) -> list[Figures]:
    """Every policy on every trace; `report` gets a line before each run.

    Raises   ConfigError before the first run, for a trace that does not fit the replicas.
    """
    for trace in traces:
        require_fit(trace, setup.limits)
    found = []
    for trace in traces:
        for policy in policies:
            report(f"simulating trace={trace.name} policy={policy.name}")
            run = Cluster(trace, setup, policy, seed).run()
            found.append(figures_of(trace.name, policy.name, run, setup.num_replicas))
    return found


def figures_of(trace: str, policy: str, run: Run, num_replicas: int) -> Figures:
    """What is shown of a run."""
    latencies_s = np.array([each.end_s - each.arrival_s for each in run.requests])
    first_s = np.array([each.first_s - each.arrival_s for each in run.requests])
    p50_s, p99_s = np.quantile(latencies_s, (0.5, 0.99)).tolist()
    return Figures(
        trace=trace,
        policy=policy,
        num_requests=len(run.requests),
        mean_latency_s=float(latencies_s.mean()),
        p50_latency_s=p50_s,
        p99_latency_s=p99_s,
        mean_first_token_s=float(first_s.mean()),
        p99_first_token_s=float(np.quantile(first_s, 0.99)),
        output_tokens_per_s=sum(each.num_given for each in run.requests) / run.duration_s,
        utilization=run.busy_s / (num_replicas * run.duration_s),
        num_moves=run.moved.num_requests,
        moved_bytes=run.moved.num_bytes,
        num_lost_tokens=run.moved.num_lost_tokens,
        num_loads=run.num_loads,
        num_preemptions=run.num_preemptions,
        duration_s=run.duration_s,
        decision_s=run.decision_s,
    )
