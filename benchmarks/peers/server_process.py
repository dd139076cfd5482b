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

    `rss_bytes` counts a page once for each process that maps it, `pss_bytes` once in all. Both miss
    what is between samples. `high_water_bytes` misses nothing of the processes that are there at
    the end, and adds up the peak of each, whenever it was, with pages that are mapped twice counted
    twice: an upper bound.
    """

    rss_bytes: int = 0
    pss_bytes: int = 0
    high_water_bytes: int = 0
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

    def finish(self, pid: int) -> None:
        """Take the last sample, and the peaks that the system noted; `watch` returns."""
        self.sample(pid, takes_pss=True)
        self.high_water_bytes = sum(_high_water_bytes(process.pid) for process in _tree(pid))
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
        running.memory.finish(process.pid)
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


def untouched_bytes(running: Running, room_bytes: int) -> int:
    """Of the memory that the process reserved in mappings of `room_bytes` or more, what is unused.

    Raises RuntimeError if there is no such mapping: what was looked for is kept elsewhere.
    """
    found = []
    for process in _tree(running.process.pid):
        with contextlib.suppress(OSError):
            found += list(_reserved(Path(f"/proc/{process.pid}/smaps").read_text(), room_bytes))
    if not found:
        raise RuntimeError(f"no process has reserved {room_bytes} bytes in one mapping")
    return sum(found)


def _reserved(smaps: str, least_bytes: int) -> Iterator[int]:
    """Bytes not touched of each large writable mapping of no file."""
    is_memory, size = False, 0
    for line in smaps.splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = words[5] if len(words) > 5 else ""
            is_memory = words[1].startswith("rw") and name in ("", "/dev/zero")
        elif words[0] == "Size:":
            size = int(words[1]) << 10
        elif words[0] == "Rss:" and is_memory and size >= least_bytes:
            yield size - (int(words[1]) << 10)


def _high_water_bytes(pid: int) -> int:
    """The largest resident size the process had; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


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
