"""`loraswarm simulate cluster`: policies of many replicas on traces, as a table and files.

Reads the files that the options name and hands them on; simulates nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraswarm.adapters.printable import one_line
from loraswarm.bench.table import aligned
from loraswarm.cluster.view import ReplicaLimits
from loraswarm.commands.bench_outputs import check_outputs
from loraswarm.commands.options import parse_bytes
from loraswarm.commands.simulation_files import read_trace, report, write_results
from loraswarm.core.cost_model import CostFigures, TransferCosts
from loraswarm.errors import ConfigError
from loraswarm.simulate.cluster.cluster import Setup
from loraswarm.simulate.cluster.compare import Figures, compare
from loraswarm.simulate.cluster.plot import plot
from loraswarm.simulate.cluster.policies import NAMES as POLICIES
from loraswarm.simulate.cluster.policies import Policy, check_policies
from loraswarm.simulate.cluster.traces import NAMES, ClusterTrace, make_trace, of_columns, scaled
from loraswarm.simulate.machine import Machine, read_figures
from loraswarm.simulate.plot import check_plot

MAX_REPLICAS = 1_000
MAX_ADAPTERS = 100_000
MAX_REQUESTS = 1_000_000
MAX_SEATS = 4096
MAX_STEP_TOKENS = 65_536
PAGE_TOKENS = 16
LINK_FIXED_S = 0.001
DEFAULT_UTILIZATION = 0.8
HEADING = (
    "trace",
    "policy",
    "mean s",
    "p50 s",
    "p99 s",
    "first token s",
    "its p99 s",
    "tokens/s",
    "busy",
    "moves",
    "loads",
    "deciding s",
    "p99, of best",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What the command line says. Empty `traces` are DEFAULT_TRACES, no `policies` all there are.

    `utilization` None: generated traces DEFAULT_UTILIZATION, those of files as they are.
    """

    replicas: int = 64
    adapters: int = 500
    requests: int = 10_000
    traces: tuple[str, ...] = ()
    policies: str | None = None
    seed: int = 0
    cost_model: str | None = None
    utilization: float | None = None
    seats: int = 32
    step_tokens: int = 512
    pool: str = "4GiB"
    host_cache: str = "4GiB"
    link: str = "1250MB"
    count_solving: bool = False
    json: str | None = None
    plot: str | None = None

    def chosen(self) -> tuple[Policy, ...]:
        """Raises ConfigError for a policy that there is not."""
        return check_policies(POLICIES if self.policies is None else self.policies.split(","))

    def check(self) -> None:
        """Raises ConfigError naming the option."""
        limits = (
            ("--replicas", self.replicas, 1, MAX_REPLICAS),
            ("--adapters", self.adapters, 1, MAX_ADAPTERS),
            ("--requests", self.requests, 2, MAX_REQUESTS),
            ("--seats", self.seats, 1, MAX_SEATS),
            ("--step-tokens", self.step_tokens, self.seats, MAX_STEP_TOKENS),
        )
        for name, value, least, most in limits:
            if not least <= value <= most:
                raise ConfigError(f"{name} is {value}; it must be from {least:,} to {most:,}")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must be >= 0")
        if self.utilization is not None and not 0.0 < self.utilization <= 10.0:
            raise ConfigError(
                f"--utilization is {self.utilization}; it must be above 0 and at most 10"
            )
        self.chosen()
        check_outputs({"--json": self.json, "--plot": self.plot})
        if self.plot is not None:
            check_plot(self.plot)

    def setup(self, figures: CostFigures) -> Setup:
        """Raises ConfigError naming the option whose bytes are none, or too few for a page."""
        page_bytes = PAGE_TOKENS * max(1, figures.kv_token_bytes)
        num_pages = _bytes("--pool", self.pool, page_bytes) // page_bytes
        limits = ReplicaLimits(
            num_seats=self.seats,
            max_step_tokens=self.step_tokens,
            num_pages=num_pages,
            page_tokens=PAGE_TOKENS,
            page_bytes=page_bytes,
            host_bytes=_bytes("--host-cache", self.host_cache, 1),
        )
        link = TransferCosts(fixed_s=LINK_FIXED_S, byte_s=1.0 / _bytes("--link", self.link, 1))
        return Setup(
            num_replicas=self.replicas,
            limits=limits,
            costs=figures,
            link=link,
            counts_solving=self.count_solving,
        )


DEFAULT_TRACES = ("code",)


def cluster(options: ClusterOptions) -> None:
    """Simulate and print.

    Raises   ConfigError for options and files that cannot work, before anything is simulated.
    """
    options.check()
    figures = read_figures(options.cost_model)
    setup = options.setup(figures)
    traces = [_trace(name, setup, options) for name in options.traces or DEFAULT_TRACES]
    found = compare(traces, setup, options.chosen(), options.seed, report)
    try:
        write_results(
            options, found, "loraswarm-cluster-simulation", lambda path: plot(found, path)
        )
    finally:
        print(table(found), flush=True)


def table(found: Sequence[Figures]) -> str:
    """A row for each trace and policy; the last column compares with the least p99 of a trace."""
    best: dict[str, float] = {}
    for one in found:
        best[one.trace] = min(best.get(one.trace, one.p99_latency_s), one.p99_latency_s)
    rows = [HEADING] + [_row(one, best[one.trace]) for one in found]
    return aligned([list(row) for row in rows])


def _row(one: Figures, best_s: float) -> tuple[str, ...]:
    return (
        one_line(one.trace),
        one.policy,
        f"{one.mean_latency_s:.3f}",
        f"{one.p50_latency_s:.3f}",
        f"{one.p99_latency_s:.3f}",
        f"{one.mean_first_token_s:.3f}",
        f"{one.p99_first_token_s:.3f}",
        f"{one.output_tokens_per_s:.1f}",
        f"{one.utilization:.0%}",
        f"{one.num_moves:,}",
        f"{one.num_loads:,}",
        f"{one.decision_s:.1f}",
        f"{one.p99_latency_s / best_s:.2f}",
    )


def _bytes(name: str, text: str, least: int) -> int:
    num_bytes = parse_bytes(name, text)
    assert num_bytes is not None
    if num_bytes < least:
        raise ConfigError(f"{name} is {text!r}; it must be at least {least:,} bytes")
    return num_bytes


def _trace(name: str, setup: Setup, options: ClusterOptions) -> ClusterTrace:
    """A generated one, or that of a file, whose times are taken as they are unless a utilization is
    asked for."""
    machine, share = Machine(setup.costs), options.utilization
    if name in NAMES or not Path(name).suffix:
        trace = make_trace(name, machine, options.requests, options.adapters, options.seed)
        share = share or DEFAULT_UTILIZATION
    else:
        path = Path(name)
        trace = of_columns(path.name, read_trace(path), machine, options.seed)
    if share is None:
        return trace
    return scaled(trace, setup.costs, setup.num_replicas, share, setup.limits.max_step_tokens)
