"""How near the greedy solver of migration comes to HiGHS and to the lower bound, and its times.

    python benchmarks/migration_solvers.py --instances 200 --ilp-seconds 10
    python benchmarks/migration_solvers.py --instances 0 --sizes 32x1024,1000x32000

Gaps are of the objective to the best placement that HiGHS found in its time (started from a greedy
search of a tenth of it); "proved" counts problems for which it is optimal, "to proof" is the gap to
what HiGHS has proved that no placement is below. Problems are those of tests/migration_cases.py;
`--shard 1/3` takes every third. The greedy solver makes all its rounds there, whatever the load of
the machine: its times are of the CPU. Those of `--sizes` are of whole solves within `--limits-ms`,
the median of `--repeats`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from document import json_path, write_document  # noqa: E402
from loraswarm.cluster.migration.greedy import NUM_ROUNDS, Greedy  # noqa: E402
from loraswarm.cluster.migration.ilp import Ilp  # noqa: E402
from migration_cases import KINDS, draw_problem  # noqa: E402

SIZES = ((4, 24), (8, 48), (12, 64), (12, 40), (6, 64))
MS_PER_S = 1e3
NO_LIMIT_S = 1e6


def gap_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each instance."""
    rows = []
    first, step = (int(part) for part in options.shard.split("/"))
    for seed in range(first - 1, options.instances, step):
        kind = KINDS[seed % len(KINDS)]
        num_replicas, num_requests = SIZES[seed % len(SIZES)]
        problem = draw_problem(kind, num_replicas, num_requests, seed)
        start_s = time.process_time()
        greedy = Greedy(options.greedy_rounds).solve(problem, NO_LIMIT_S)
        cpu_s = time.process_time() - start_s
        best = Ilp().solve(problem, options.ilp_seconds)
        rows.append(
            {
                "kind": kind.name,
                "seed": seed,
                "replicas": num_replicas,
                "requests": num_requests,
                "before_s": greedy.before.objective_s,
                "gap": greedy.after.objective_s / best.after.objective_s - 1.0,
                "to_proof": greedy.after.objective_s / best.lower_bound_s - 1.0,
                "to_own_bound": greedy.gap,
                "is_proved": best.is_optimal,
                "greedy_cpu_ms": cpu_s * MS_PER_S,
                "after_s": greedy.after.objective_s,
                "best_s": best.after.objective_s,
                "ilp_s": best.seconds,
            }
        )
    return rows


def time_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each kind and size."""
    rows = []
    for size in filter(None, options.sizes.split(",")):
        num_replicas, num_requests = (int(part) for part in size.split("x"))
        for kind in KINDS:
            problem = draw_problem(kind, num_replicas, num_requests, seed=0)
            for limit_ms in options.limits_ms:
                rows.append(timed(kind.name, size, problem, limit_ms, options.repeats))
    return rows


def timed(kind: str, size: str, problem: Any, limit_ms: float, repeats: int) -> dict[str, Any]:
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        solution = Greedy().solve(problem, limit_ms / MS_PER_S)
        seconds.append(time.perf_counter() - wall_s)
        cpu_seconds.append(time.process_time() - cpu_s)
    return {
        "kind": kind,
        "size": size,
        "limit_ms": limit_ms,
        "whole_ms": statistics.median(seconds) * MS_PER_S,
        "cpu_ms": statistics.median(cpu_seconds) * MS_PER_S,
        "moves": len(solution.moves),
        "before_s": solution.before.objective_s,
        "after_s": solution.after.objective_s,
        "to_own_bound": solution.gap,
    }


def print_gaps(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    print(
        "kind      count  proved  gap: mean   worst   to proof: mean   worst   HiGHS s"
        "  CPU ms: mean  worst"
    )
    for name in [*(kind.name for kind in KINDS), "all"]:
        some = [row for row in rows if name in ("all", row["kind"])]
        if some:
            print(gap_line(name, some))


def gap_line(name: str, rows: list[dict[str, Any]]) -> str:
    gaps, proofs = [row["gap"] for row in rows], [row["to_proof"] for row in rows]
    return (
        f"{name:9} {len(rows):5} {sum(row['is_proved'] for row in rows):7}"
        f" {statistics.mean(gaps):10.2%} {max(gaps):7.2%}"
        f" {statistics.mean(proofs):16.2%} {max(proofs):7.2%}"
        f" {statistics.mean(row['ilp_s'] for row in rows):9.1f}"
        f" {statistics.mean(row['greedy_cpu_ms'] for row in rows):13.1f}"
        f" {max(row['greedy_cpu_ms'] for row in rows):6.1f}"
    )


def print_times(rows: list[dict[str, Any]]) -> None:
    if rows:
        print("kind      size          limit ms  whole ms   cpu ms  moves  before s   after s  gap")
    for row in rows:
        print(
            f"{row['kind']:9} {row['size']:13} {row['limit_ms']:8.0f} {row['whole_ms']:9.1f}"
            f" {row['cpu_ms']:8.1f} {row['moves']:6} {row['before_s']:9.2f} {row['after_s']:9.3f}"
            f" {row['to_own_bound']:6.2%}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--shard", default="1/1")
    parser.add_argument("--ilp-seconds", type=float, default=10.0)
    parser.add_argument("--greedy-rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--sizes", default="32x1024,128x4096,1000x32000")
    parser.add_argument("--limits-ms", type=float, nargs="+", default=[12.0, 100.0, 900.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=json_path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    gaps = gap_rows(options)
    print_gaps(gaps)
    times = time_rows(options)
    print_times(times)
    if options.json:
        write_document(options.json, options, [*gaps, *times])


if __name__ == "__main__":
    main()
