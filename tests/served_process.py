"""`loraswarm serve` as a user runs it: a process, found by the line that says ready."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0


@dataclass
class ServedProcess:
    """A running server; `log` grows with its standard error."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def interrupt(self) -> int:
        """Ctrl-C, then wait; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[ServedProcess]:
    """Run `loraswarm serve ARGUMENTS --port 0` until the block ends."""
    command = [sys.executable, "-m", "loraswarm", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    running = ServedProcess(process)
    assert process.stdout is not None
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: running.log.extend(process.stderr), daemon=True)
    reader.start()
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        found = re.search(r"ready url=(\S+)", line)
        assert found, f"no ready line, got {line!r}:\n{''.join(running.log)}"
        watchdog.cancel()
        running.url = found[1]
        yield running
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(STOP_TIMEOUT_S)
        process.stdout.close()
        process.stderr.close()
