"""Policies side by side on traces: figures of each run, and what `cost` is to the others.

Knows neither files nor how figures are shown. Called by commands/simulate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loraswarm.engine.policies.merging import NAMES, make_policy
from loraswarm.errors import ConfigError
from loraswarm.simulate.machine import Machine
from loraswarm.simulate.oracle import run_oracle
from loraswarm.simulate.replay import Replay, Run
from loraswarm.simulate.traces import Trace

ORACLE = "oracle"
POLICIES = (*NAMES, ORACLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One policy on one trace. A latency is from arrival to the last token; `merged_share` is of
    time and of the layers' bytes; a switch is a change of what is to be merged."""

    trace: str
    policy: str
    num_requests: int
    mean_latency_s: float
    p99_latency_s: float
    mean_first_token_s: float
    output_tokens_per_s: float
    merged_share: float
    switches_per_minute: float
    switching_share: float
    duration_s: float


def check_policies(names: Sequence[str]) -> tuple[str, ...]:
    """Raises ConfigError for none, an unknown one or one that comes twice."""
    for name in names:
        if name not in POLICIES:
            raise ConfigError(
                f"--policies has {name!r}; it must be of {', '.join(POLICIES)}, joined by commas"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"--policies names one twice: {','.join(names)}")
    return tuple(names)


def compare(
    traces: Sequence[Trace],
    machine: Machine,
    policies: Sequence[str],
    report: Callable[[str], None],
) -> list[Figures]:
    """Every policy on every trace; `report` gets a line before each run."""
    found = []
    for trace in traces:
        for name in policies:
            report(f"simulating trace={trace.name} policy={name}")
            found.append(figures_of(trace.name, name, run_policy(trace, machine, name)))
    return found


def run_policy(trace: Trace, machine: Machine, name: str) -> Run:
    """One policy, which knows nothing yet, on one trace."""
    if name == ORACLE:
        return run_oracle(trace, machine)
    return Replay(trace, machine, make_policy(name, machine.merge_costs())).run()


def figures_of(trace: str, policy: str, run: Run) -> Figures:
    """What is shown of a run."""
    latencies_s = np.array([served.latency_s for served in run.served])
    first_s = [served.first_token_s - served.request.arrival_s for served in run.served]
    start_s = min(served.request.arrival_s for served in run.served)
    duration_s = run.served[-1].end_s - start_s
    num_tokens = sum(served.request.output_tokens for served in run.served)
    return Figures(
        trace=trace,
        policy=policy,
        num_requests=len(run.served),
        mean_latency_s=float(latencies_s.mean()),
        p99_latency_s=float(np.quantile(latencies_s, 0.99)),
        mean_first_token_s=float(np.mean(first_s)),
        output_tokens_per_s=num_tokens / duration_s,
        merged_share=run.merged_s / duration_s,
        switches_per_minute=60.0 * run.num_switches / duration_s,
        switching_share=run.switch_s / duration_s,
        duration_s=duration_s,
    )
