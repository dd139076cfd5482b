"""One session of measuring: which peers, which workloads, in which order, into which file.

The machine's speed drifts within minutes. So peers take turns workload by workload, ours goes
first and last in each turn, and the read rate is measured before each. Called by run_all and by
each peer's script; knows nothing about how a peer is measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comparison
import psutil
from peer import Measured, Peer, Setting, wrong_counts
from swarm_files import BENCHMARKS, write_swarm_once
from workloads import KINDS, Sizes, Workload, make_workload

from loraswarm.bench.metrics import summarize
from loraswarm.bench.report import point_of, result_of, write_json
from loraswarm.commands.bench_outputs import check_outputs
from loraswarm.errors import ConfigError

DEFAULT_WORK = Path.home() / ".cache" / "loraswarm-peers"
OURS = "loraswarm"


@dataclass(slots=True)
class Session:
    """What was measured so far: a result of `loraswarm bench` for each peer and workload."""

    options: dict[str, Any]
    weight_bytes: int
    results: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    not_installed: list[dict[str, str]] = field(default_factory=list)

    def add(self, peer: Peer, setting: Setting, workload: Workload, point: dict[str, Any]) -> None:
        key = peer.name, workload.name
        if key not in self.results:
            about = {"peer": peer.name, "versions": peer.versions(setting)}
            self.results[key] = result_of(peer.name, about | workload.options, [])
        self.results[key]["points"].append(point)

    def document(self) -> dict[str, Any]:
        return {
            "format": comparison.FORMAT,
            "format_version": comparison.FORMAT_VERSION,
            "options": self.options,
            "weight_bytes": self.weight_bytes,
            "results": list(self.results.values()),
            "failures": self.failures,
            "not_installed": self.not_installed,
        }

    def write(self, path: Path | None, work: Path) -> None:
        """The whole to `path`; each result by itself to `work`, for `loraswarm bench compare`."""
        directory = work / "results"
        directory.mkdir(exist_ok=True)
        for (peer, workload), result in self.results.items():
            write_json(result, directory / f"{peer}-{workload}.json")
        if path is not None:
            path.write_text(json.dumps(self.document(), indent=1, allow_nan=False) + "\n")


def main(peers: Sequence[Peer]) -> None:
    """Install what is missing, measure, print the table of what was measured, however it ends.

    Exits with 1 if a measurement failed, or no peer could be installed; 130 after Ctrl-C. A peer
    that cannot be installed is named and left out. A signal to end takes the peer that runs along.
    """
    options = _parse([peer.name for peer in peers])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    asked = [peer for peer in peers if peer.name in options.peers]
    options.work.mkdir(parents=True, exist_ok=True)
    swarm = write_swarm_once(options.work, options.size, options.adapters, options.ranks)
    threads = options.threads or psutil.cpu_count(logical=False) or 1
    setting = Setting(options.work, swarm, threads, options.torch_index)
    plain = {name: _plain(value) for name, value in vars(options).items()}
    session = Session(plain, swarm.weight_bytes)
    ready = [peer for peer in asked if _installed(peer, setting, session)]
    try:
        if not options.install_only:
            for repeat in range(options.repeats):
                _measure_all(ready, setting, session, options, repeat)
    except KeyboardInterrupt:
        print("interrupted: what follows is not the whole session")
        sys.exit(130)
    finally:
        _show(session)
    is_incomplete = options.install_only and len(ready) < len(asked)
    sys.exit(1 if session.failures or is_incomplete or not ready else 0)


def _show(session: Session) -> None:
    """The table, and what is not in it."""
    if session.results:
        print(comparison.table(session.document(), OURS))
    for failure in session.failures:
        print(f"FAILED {failure['peer']} {failure['workload']}: {failure['reason']}")
    for failure in session.not_installed:
        print(f"NOT INSTALLED {failure['peer']}: {failure['reason']}")
    sys.stdout.flush()


def turn(peers: Sequence[Peer], workload: str) -> Iterator[Peer]:
    """Who is asked, in which order: ours first, and once more at the end."""
    able = [peer for peer in peers if peer.has_adapters or not KINDS[workload].needs_adapters]
    ours = [peer for peer in able if peer.name == OURS]
    others = [peer for peer in able if peer.name != OURS]
    yield from (*ours, *others, *(ours if others else ()))


def read_gb_per_s() -> float:
    """In a process of its own, so that no thread of torch is left beside what is measured."""
    program = "from decode import read_bandwidth; print(read_bandwidth())"
    command = [sys.executable, "-c", program]
    return float(subprocess.check_output(command, cwd=BENCHMARKS, text=True))


def _measure_all(
    peers: Sequence[Peer],
    setting: Setting,
    session: Session,
    options: argparse.Namespace,
    repeat: int,
) -> None:
    sizes = Sizes(
        num_requests=options.requests,
        prompt_lengths=options.prompt,
        output_lengths=options.output,
        seed=options.seed + repeat,
    )
    for name in options.workloads:
        workload = make_workload(name, setting.swarm.rank_of, setting.swarm.vocab_size, sizes)
        for position, peer in enumerate(turn(peers, name)):
            place = {"repeat": repeat, "position": position, "seed": sizes.seed}
            try:
                point = _measure(peer, setting, workload, place)
                session.add(peer, setting, workload, point)
            except Exception as error:
                traceback.print_exc()
                session.failures.append(_failure(peer, name, error))
            session.write(options.json, setting.work)


def _measure(
    peer: Peer, setting: Setting, workload: Workload, place: dict[str, int]
) -> dict[str, Any]:
    rate = read_gb_per_s()
    measured: Measured = peer.measure(setting, workload)
    wrong = wrong_counts(workload.requests, measured.records)
    if wrong:
        raise RuntimeError(f"{len(wrong)} answers of a wrong length, first {wrong[0]}")
    summary = summarize(measured.records)
    point = point_of(workload.concurrency, summary) | place
    point |= {
        "read_gb_per_s": rate,
        "start_s": measured.start_s,
        "peak_rss_bytes": measured.memory.rss_bytes,
        "peak_pss_bytes": measured.memory.pss_bytes,
        "high_water_rss_bytes": measured.memory.high_water_bytes,
        "untouched_room_bytes": measured.untouched_room_bytes,
    }
    print(
        f"{place['repeat']}.{place['position']} {workload.name:9} {peer.name:14}"
        f" {summary.output_tokens_per_s:7.1f} tokens/s, {summary.num_errors} errors,"
        f" start {measured.start_s:.0f} s, pss {measured.memory.pss_bytes / 1e9:.1f} GB,"
        f" machine reads {rate:.0f} GB/s",
        file=sys.stderr,
        flush=True,
    )
    if summary.num_errors:
        raise RuntimeError(f"{summary.num_errors} requests failed: {summary.errors}")
    return point


def _installed(peer: Peer, setting: Setting, session: Session) -> bool:
    """Whether the peer can be measured; why not is kept."""
    try:
        peer.install(setting)
    except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
        traceback.print_exc()
        session.not_installed.append(_failure(peer, "install", error))
        return False
    return True


def _failure(peer: Peer, workload: str, error: Exception) -> dict[str, str]:
    reason = f"{type(error).__name__}: {error}"
    return {"peer": peer.name, "workload": workload, "reason": reason}


def _parse(names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure peers on this machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work", type=Path, default=DEFAULT_WORK, help="installs, models and logs are kept here")
    add("--peers", type=_some_of(names), default=list(names), help=",".join(names))
    add("--workloads", type=_some_of(list(KINDS)), default=list(KINDS), help=",".join(KINDS))
    add("--repeats", type=int, default=3)
    add("--size", default="qwen2.5-0.5b", help="dimensions, by benchmarks/random_swarm")
    add("--adapters", type=int, default=32)
    add("--ranks", default="8,16,32,64")
    add("--requests", type=int, default=96, help="of a workload; `single` has a twelfth")
    add("--prompt", default="128", help="tokens: a length or a distribution of `loraswarm bench`")
    add("--output", default="64", help="tokens, likewise")
    add("--threads", type=int, help="of each peer; default: physical cores")
    add("--seed", type=int, default=0)
    add("--json", type=_writable, help="written after each measurement")
    add("--install-only", action="store_true")
    help_text = "look for packages where torch's builds without CUDA are, too"
    boolean = argparse.BooleanOptionalAction
    add("--torch-index", action=boolean, default=True, help=help_text)
    return parser.parse_args()


def _some_of(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return names

    return parse


def _writable(text: str) -> Path:
    """Said before anything is measured; no file is made or changed."""
    try:
        check_outputs({"--json": text})
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
