"""A peer's process: started, waited for, its memory watched, ended with all its children.

Knows nothing about what the process serves. Used by peer for every peer alike.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

START_TIMEOUT_S = 1200.0
STOP_TIMEOUT_S = 30.0
HEALTH_TIMEOUT_S = 5.0
SAMPLE_S = 1.0
# A proportional size walks the page tables under a lock that page faults need: take it seldom.
SAMPLES_PER_PSS = 5
# What a shell has set for itself must not decide how many threads a peer has.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(slots=True)
class Memory:
    """The most that a process and all its descendants had at one time, sampled.

    `rss_bytes` counts a page once for each process that maps it, `pss_bytes` once in all.
    """

    rss_bytes: int = 0
    pss_bytes: int = 0
    num_samples: int = 0
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def watch(self, pid: int) -> None:
        """Sample until `stop`; run by a thread."""
        while not self._stop.is_set():
            self.sample(pid, self.num_samples % SAMPLES_PER_PSS == 0)
            self._stop.wait(SAMPLE_S)

    def sample(self, pid: int, takes_pss: bool) -> None:
        rss_bytes = pss_bytes = 0
        for process in _tree(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                rss_bytes += process.memory_info().rss
                pss_bytes += process.memory_full_info().pss if takes_pss else 0
        self.rss_bytes = max(self.rss_bytes, rss_bytes)
        self.pss_bytes = max(self.pss_bytes, pss_bytes)
        self.num_samples += 1

    def stop(self) -> None:
        self._stop.set()


@dataclass(slots=True)
class Running:
    """A started process; `stdin` and `stdout` are pipes where `start` was asked for them."""

    process: subprocess.Popen[str]
    memory: Memory
    log_path: Path

    def log_tail(self) -> str:
        return self.log_path.read_text(errors="replace")[-4000:]


@contextlib.contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], log_path: Path, has_pipes: bool = False
) -> Iterator[Running]:
    """Run `command` until the block ends; what it prints goes to `log_path`.

    `environment` is added to ours, less `THREAD_VARIABLES`. The process leads a session of its own;
    it is ended with all its descendants.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in THREAD_VARIABLES}
    with log_path.open("w") as log:
        process = subprocess.Popen(
            list(command),
            env={**inherited, **environment},
            stdin=subprocess.PIPE if has_pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if has_pipes else log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    running = Running(process, Memory(), log_path)
    watcher = threading.Thread(target=running.memory.watch, args=(process.pid,), daemon=True)
    watcher.start()
    try:
        yield running
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            running.memory.sample(process.pid, takes_pss=True)
        running.memory.stop()
        watcher.join()
        _end(process)


def wait_until_healthy(running: Running, url: str) -> None:
    """Until `url` answers with 200. Raises RuntimeError if the process ends or takes too long."""
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_s:
        if running.process.poll() is not None:
            raise RuntimeError(f"the server ended as it started:\n{running.log_tail()}")
        if _is_healthy(url):
            return
        time.sleep(0.25)
    raise RuntimeError(f"not ready within {START_TIMEOUT_S:g} s:\n{running.log_tail()}")


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end(process: subprocess.Popen[str]) -> None:
    """End the process, then whatever of its session is left."""
    family = _tree(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S if process.poll() is None else 5)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.send_signal(signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
