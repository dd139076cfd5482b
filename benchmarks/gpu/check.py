"""Tests on a CUDA device: each file in a process of its own, several at a time.

    PYTHONPATH=src python benchmarks/gpu/check.py [--processes N] [--logs FOLDER] [FILE ...]

A kernel that fails leaves nothing to the tests after it in its process, so other files have others;
what each compiles, it compiles beside the others. Needs torch with CUDA, Triton and pytest, no
network. Prints how every file ended, and the end of what those said that failed; the whole is in
FOLDER.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PYTEST = ("-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider", "-rfE", "--tb=short")
TESTS = Path(__file__).resolve().parent.parent.parent / "tests"
SLOW = ("served_methods", "prefix_serving", "engine", "look_ahead_engine", "triton_attention")
QUICK = (
    *(
        "decode_graphs",
        "transfer",
        "look_ahead",
        "page_copier",
        "staging",
        "image",
        "mixing",
        "churn",
    ),
    *("tiers", "merging", "merging_auto", "merging_memory", "merging_options", "merging_switches"),
    *("engine_migration", "engine_migration_states", "engine_migration_steps", "engine_reports"),
)
"""Of other tests than those of Triton's kernels, these run on a device too."""
NEEDED = ("torch", "triton", "pytest")
POLL_S = 0.1
SHOWN_LINES = 25


@dataclass
class Run:
    """The tests of one file: under way, or ended with `code`."""

    file: str
    log: Path
    process: subprocess.Popen[bytes]
    begin_s: float
    end_s: float = 0.0
    code: int | None = None

    def lines(self) -> list[str]:
        """What it has said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def line(self) -> str:
        """How it ended."""
        said = self.lines()
        told = said[-1].strip("= ") if said else "nothing said"
        if self.code == -signal.SIGKILL:
            told = f"ENDED BEFORE IT WAS DONE: {told}"
        elif self.code != 0:
            told = f"FAILED (exit code {self.code}): {told}"
        return f"{self.end_s - self.begin_s:6.0f} s  {self.file}  {told}"


def main() -> None:
    options = _options()
    fault = fault_here()
    if fault is not None:
        raise SystemExit(f"gpu-check cannot run: {fault}")
    os.environ["LORASWARM_TEST_DEVICE"] = "cuda"
    folder = Path(options.logs or tempfile.mkdtemp(prefix="gpu-check-"))
    folder.mkdir(parents=True, exist_ok=True)
    files = options.files or all_files()
    runs = run_files(files, folder, options.processes, options.limit_s)
    failed = [run for run in runs if run.code != 0]
    for run in failed:
        print(f"\n--- {run.file}, the end of {run.log}")
        print("\n".join(run.lines()[-SHOWN_LINES:]))
    num_passed = len(runs) - len(failed)
    print(f"\n{num_passed} of {len(files)} files passed; all they said is in {folder}")
    for run in runs:
        print(run.line())
    not_begun = set(files) - {run.file for run in runs}
    for file in sorted(not_begun):
        print(f"   NOT BEGUN  {file}")
    if failed or not_begun:
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="else all for a device")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--limit-s", type=float, default=460.0, help="seconds for all files")
    parser.add_argument("--logs", help="folder for what the tests say; else a new one")
    return parser.parse_args()


def all_files() -> list[str]:
    """What there is for a device; what takes longest comes first."""
    slow = [TESTS / f"test_{name}.py" for name in SLOW]
    quick = [TESTS / f"test_{name}.py" for name in QUICK]
    kernels = [path for path in sorted(TESTS.glob("test_triton_*.py")) if path not in slow]
    return [os.path.relpath(path) for path in (*slow, *kernels, *quick)]


def fault_here() -> str | None:
    """Why tests on a device cannot run with this Python, if they cannot."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def run_files(files: Iterable[str], folder: Path, processes: int, limit_s: float) -> list[Run]:
    """Run so many at a time, in their order; after `limit_s` seconds those under way are ended and
    no other begins. Prints a line for each that ends."""
    waiting, under_way, ended = list(files), [], []
    end_s = time.monotonic() + limit_s
    while (waiting or under_way) and time.monotonic() < end_s:
        while waiting and len(under_way) < processes:
            under_way.append(_start(waiting.pop(0), folder))
        time.sleep(POLL_S)
        for run in [run for run in under_way if run.process.poll() is not None]:
            under_way.remove(run)
            ended.append(_end(run))
    for run in under_way:
        run.process.kill()
        ended.append(_end(run))
    return ended


def _start(file: str, folder: Path) -> Run:
    log = folder / (Path(file).stem + ".log")
    with log.open("wb") as output:
        command = (sys.executable, *PYTEST, file)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    return Run(file, log, process, time.monotonic())


def _end(run: Run) -> Run:
    run.code = run.process.wait()
    run.end_s = time.monotonic()
    print(run.line(), flush=True)
    return run


if __name__ == "__main__":
    main()
