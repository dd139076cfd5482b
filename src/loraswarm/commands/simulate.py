"""`loraswarm simulate merging`: policies on traces, as a table, a JSON file and a picture.

Reads the files that the options name and hands them on; simulates nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraswarm.adapters.printable import one_line
from loraswarm.bench.table import aligned
from loraswarm.commands.bench_outputs import check_outputs
from loraswarm.commands.simulation_files import read_trace, report, write_results
from loraswarm.core.cost_model import CostFigures
from loraswarm.errors import ConfigError
from loraswarm.simulate.compare import POLICIES, Figures, check_policies, compare
from loraswarm.simulate.machine import Machine, read_figures
from loraswarm.simulate.plot import check_plot, plot
from loraswarm.simulate.traces import NAMES, Trace, TraceRequest, make_trace

MAX_REQUESTS = 100_000
HEADING = (
    "trace",
    "policy",
    "mean s",
    "p99 s",
    "first token s",
    "tokens/s",
    "merged",
    "switches/min",
    "mean, of best",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """What the command line says; empty `traces` and `policies` are all there are."""

    cost_model: str | None = None
    traces: tuple[str, ...] = ()
    policies: str | None = None
    requests: int = 300
    seed: int = 0
    json: str | None = None
    plot: str | None = None

    def policy_names(self) -> tuple[str, ...]:
        """Raises ConfigError for one that there is not."""
        return check_policies(POLICIES if self.policies is None else self.policies.split(","))

    def check(self) -> None:
        """Raises ConfigError naming the option."""
        if not 2 <= self.requests <= MAX_REQUESTS:
            raise ConfigError(
                f"--requests is {self.requests}; it must be from 2 to {MAX_REQUESTS:,}"
            )
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must be >= 0")
        self.policy_names()
        check_outputs({"--json": self.json, "--plot": self.plot})
        if self.plot is not None:
            check_plot(self.plot)


def merging(options: SimulateOptions) -> None:
    """Simulate and print.

    Raises   ConfigError for options and files that cannot work, before anything is simulated.
    """
    options.check()
    figures = read_figures(options.cost_model)
    traces = [_trace(name, figures, options) for name in options.traces or NAMES]
    found = compare(traces, Machine(figures), options.policy_names(), report)
    try:
        write_results(options, found, "loraswarm-simulation", lambda path: plot(found, path))
    finally:
        print(table(found), flush=True)


def table(found: Sequence[Figures]) -> str:
    """A row for each trace and policy; the last column compares with the least mean of a trace."""
    best: dict[str, float] = {}
    for one in found:
        best[one.trace] = min(best.get(one.trace, one.mean_latency_s), one.mean_latency_s)
    rows = [HEADING] + [_row(one, best[one.trace]) for one in found]
    return aligned([list(row) for row in rows])


def _row(one: Figures, best_s: float) -> tuple[str, ...]:
    return (
        one_line(one.trace),
        one.policy,
        f"{one.mean_latency_s:.3f}",
        f"{one.p99_latency_s:.3f}",
        f"{one.mean_first_token_s:.3f}",
        f"{one.output_tokens_per_s:.1f}",
        f"{one.merged_share:.0%}",
        f"{one.switches_per_minute:.1f}",
        f"{one.mean_latency_s / best_s:.3f}",
    )


def _trace(name: str, figures: CostFigures, options: SimulateOptions) -> Trace:
    """A generated one, or that of a file, whose times are taken as they are."""
    if name in NAMES or not Path(name).suffix:
        return make_trace(name, figures, options.requests, options.seed)
    path = Path(name)
    requests = [TraceRequest(*row) for row in zip(*read_trace(path), strict=True)]
    return Trace.of(path.name, requests)
