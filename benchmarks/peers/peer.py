"""What a peer is: something that can be installed and measured; and one that speaks HTTP.

A measurement starts the peer anew, warms it up, sends one workload and ends it, so that no peer
lives off what an earlier workload left and each peak of memory belongs to one workload. Knows no
peer by name. Used by session.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import server_process
from server_process import Memory
from swarm_files import Swarm
from workloads import Workload

from loraswarm.bench.http_target import HttpTarget
from loraswarm.bench.records import PlannedRequest, RequestRecord
from loraswarm.bench.runner import is_complete, run

BASE_NAME = "base"
KV_BYTES = 4 << 30
REQUEST_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all peers share: where they are installed, what they serve, with how many threads."""

    work: Path
    swarm: Swarm
    num_threads: int
    uses_torch_index: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One workload on one freshly started peer; `start_s` is until it was ready.

    `untouched_room_bytes` are those of the room for K/V that were never written: they are in no
    peak of memory, and will be once the room is used.
    """

    records: Sequence[RequestRecord]
    memory: Memory
    start_s: float
    untouched_room_bytes: int = 0


class Peer(ABC):
    """`has_adapters` says if it is started with them; one without is asked for the base alone.

    `lazy_room_bytes` is the room for K/V of a peer that reserves it in one mapping and touches it
    as it is used, 0 for one that fills its room at the start or has none.
    """

    name: str
    has_adapters = True
    lazy_room_bytes = 0

    @abstractmethod
    def install(self, setting: Setting) -> None:
        """Install it and make its files, unless that is done."""

    @abstractmethod
    def versions(self, setting: Setting) -> dict[str, str]:
        """What is installed, by package."""

    @abstractmethod
    def measure(self, setting: Setting, workload: Workload) -> Measured:
        """Start it, send `workload`, end it. Raises RuntimeError if it does not start or ends."""

    def warmup(self, workload: Workload) -> list[PlannedRequest]:
        """Of the workload's, what this peer can be asked."""
        return [one for one in workload.warmup if self.has_adapters or one.adapter is None]

    def log_path(self, setting: Setting) -> Path:
        """What its last process printed."""
        path = setting.work / "log"
        path.mkdir(exist_ok=True)
        return path / f"{self.name}.log"


class HttpPeer(Peer):
    """A peer with an OpenAI-compatible server."""

    @abstractmethod
    def command(self, setting: Setting, workload: Workload, port: int) -> list[str]: ...

    def environment(self, setting: Setting) -> Mapping[str, str]:
        """Variables added to ours."""
        return {}

    def target(self, url: str, setting: Setting) -> HttpTarget:
        return HttpTarget(url, BASE_NAME, timeout_s=REQUEST_TIMEOUT_S)

    def measure(self, setting: Setting, workload: Workload) -> Measured:
        port = server_process.free_port()
        url = f"http://127.0.0.1:{port}"
        command = self.command(setting, workload, port)
        begin_s = time.monotonic()
        with server_process.started(
            command, self.environment(setting), self.log_path(setting)
        ) as running:
            server_process.wait_until_healthy(running, f"{url}/health")
            start_s = time.monotonic() - begin_s
            warmup = self.warmup(workload)
            records = asyncio.run(_send(self.target(url, setting), warmup, workload))
            if running.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{running.log_tail()}")
            untouched_bytes = 0
            if self.lazy_room_bytes:
                untouched_bytes = server_process.untouched_bytes(running, self.lazy_room_bytes)
        return Measured(
            records=records,
            memory=running.memory,
            start_s=start_s,
            untouched_room_bytes=untouched_bytes,
        )


async def _send(
    target: HttpTarget, warmup: Sequence[PlannedRequest], workload: Workload
) -> list[RequestRecord]:
    """Raises RuntimeError if the warm-up fails: what follows would not be comparable."""
    try:
        warm = await _complete(target, warmup, workload.concurrency)
        failed = [record for record in warm if record.error is not None]
        if failed:
            raise RuntimeError(f"warm-up of {failed[0].adapter or BASE_NAME}: {failed[0].error}")
        return await _complete(target, workload.requests, workload.concurrency)
    finally:
        await target.close()


async def _complete(
    target: HttpTarget, requests: Sequence[PlannedRequest], concurrency: int
) -> list[RequestRecord]:
    """Raises KeyboardInterrupt, which `run` takes as the wish to see what there is."""
    records = await run(target, requests, concurrency=concurrency)
    if not is_complete(requests, records):
        raise KeyboardInterrupt
    return records


def wrong_counts(requests: Sequence[PlannedRequest], records: Sequence[RequestRecord]) -> list[str]:
    """Answers that have not the tokens that were asked for: their rates would mean nothing."""
    wrong = []
    for request, record in zip(requests, records, strict=True):
        asked = (len(request.prompt_token_ids), request.max_tokens)
        got = (record.num_prompt, record.num_output)
        if record.error is None and got != asked:
            wrong.append(f"request {request.index}: prompt and output {got}, asked {asked}")
    return wrong
