"""A server process to measure: `loraswarm serve` on a free port, and a client that times tokens.

Used by benchmarks/tiers. The server is ended when its block ends, its lines carry the time at
which they came.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import httpx

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 120.0


@dataclass
class Served:
    """A running server. `log` has (monotonic seconds, line) of what it wrote to standard error."""

    process: subprocess.Popen[str]
    url: str = ""
    ready_s: float = 0.0
    log: list[tuple[float, str]] = field(default_factory=list)

    def time_of(self, pattern: str) -> float:
        """When the first line came that matches. Raises LookupError if none did."""
        for time_s, line in self.log:
            if re.search(pattern, line):
                return time_s
        raise LookupError(f"no line of the server matches {pattern!r}:\n{self.text()}")

    def text(self) -> str:
        return "".join(line for _, line in self.log)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=REQUEST_TIMEOUT_S).raise_for_status()

    def post(self, path: str, body: object = None) -> httpx.Response:
        response = httpx.post(self.url + path, json=body, timeout=REQUEST_TIMEOUT_S)
        if response.is_error:
            raise RuntimeError(f"POST {path} {body}: {response.status_code} {response.text}")
        return response

    def adapter(self, name: str) -> dict[str, object]:
        """The adapter's row of /v1/adapters."""
        row: dict[str, object] = self.get(f"/v1/adapters/{name}").json()
        return row

    def load(self, name: str, path: str) -> None:
        """Serve what is at `path` as `name`; it is in host memory then, and not on the device."""
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels as they are written there."""
        lines = self.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@contextlib.contextmanager
def served(model: str, adapters: str, *options: str) -> Iterator[Served]:
    """Run `loraswarm serve` until the block ends."""
    command = [sys.executable, "-m", "loraswarm", "serve", model, "--adapters", adapters]
    process = subprocess.Popen(
        [*command, *options, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    server = Served(process)
    reader = threading.Thread(target=_read_log, args=(server,), daemon=True)
    reader.start()
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        server.ready_s = time.monotonic()
        watchdog.cancel()
        found = re.search(r"ready url=(\S+)", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line!r}\n{server.text()}")
        server.url = found[1]
        yield server
    finally:
        watchdog.cancel()
        _stop(process)
        reader.join(STOP_TIMEOUT_S)


async def stream_times(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], max_tokens: int
) -> AsyncIterator[float]:
    """Monotonic seconds at which each event of a streamed completion came: one a token, but for
    tokens whose text is held back.

    Raises   RuntimeError with what the server answered, if that was an error.
    """
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "return_token_ids": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            text = (await response.aread()).decode()
            raise RuntimeError(f"completion by {model}: {response.status_code} {text}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"completion by {model}: {event['error']}")
            if event["choices"]:
                yield time.monotonic()


def _read_log(server: Served) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.log.append((time.monotonic(), line))


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert process.stdout is not None
    process.stdout.close()
