"""transformers, alone and with PEFT's mixed batches of adapters.

    python benchmarks/peers/transformers_peft.py --workloads base,uniform

They have no server: peft_worker takes requests in static batches, as many as would be in flight,
and what it tells becomes the records that a server's answers become. No time goes to HTTP.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import server_process
from peer import Measured, Peer, Setting
from server_process import Running
from venvs import TORCH, make_venv_once, versions
from workloads import Workload

from loraswarm.bench.records import PlannedRequest, RequestRecord

PACKAGES = ("transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0")
STEPS = (("install", TORCH), ("install", *PACKAGES))


class TransformersPeft(Peer):
    """Without adapters it is transformers alone: PEFT wraps no linear."""

    def __init__(self, has_adapters: bool) -> None:
        self.has_adapters = has_adapters
        self.name = "peft" if has_adapters else "transformers"

    def install(self, setting: Setting) -> None:
        make_venv_once(setting.work / "peft", STEPS, setting.uses_torch_index)

    def versions(self, setting: Setting) -> dict[str, str]:
        return versions(_python(setting), ("transformers", "peft", "torch"))

    def measure(self, setting: Setting, workload: Workload) -> Measured:
        swarm = setting.swarm
        script = Path(__file__).with_name("peft_worker.py")
        command = [str(_python(setting)), str(script), str(swarm.model), str(setting.num_threads)]
        if self.has_adapters:
            command += [str(swarm.adapters / name) for name in swarm.names]
        environment = {"HF_HUB_OFFLINE": "1"}
        begin_s = time.monotonic()
        with server_process.started(
            command, environment, self.log_path(setting), has_pipes=True
        ) as running:
            _read(running)
            start_s = time.monotonic() - begin_s
            _ask(running, self.warmup(workload), workload.concurrency)
            records = _ask(running, workload.requests, workload.concurrency)
        return Measured(records=records, memory=running.memory, start_s=start_s)


def _ask(
    running: Running, requests: Sequence[PlannedRequest], batch_size: int
) -> list[RequestRecord]:
    """Raises RuntimeError if the worker ends: nothing of the run is known then."""
    job = {
        "batch_size": batch_size,
        "requests": [
            {
                "index": request.index,
                "adapter": request.adapter,
                "prompt": request.prompt_token_ids,
                "max_tokens": request.max_tokens,
            }
            for request in requests
        ],
    }
    assert running.process.stdin is not None
    running.process.stdin.write(json.dumps(job) + "\n")
    running.process.stdin.flush()
    answers = _read(running)["answers"]
    return [_record(one, answer) for one, answer in zip(requests, answers, strict=True)]


def _record(request: PlannedRequest, answer: dict[str, Any]) -> RequestRecord:
    assert answer["index"] == request.index
    return RequestRecord(
        index=request.index,
        adapter=request.adapter,
        num_prompt=len(request.prompt_token_ids),
        max_tokens=request.max_tokens,
        start_s=answer["start_s"],
        response_s=tuple(answer["response_s"]),
        num_output=answer["num_output"],
    )


def _read(running: Running) -> dict[str, Any]:
    assert running.process.stdout is not None
    line = running.process.stdout.readline()
    if not line:
        raise RuntimeError(f"the worker ended:\n{running.log_tail()}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _python(setting: Setting) -> Path:
    return setting.work / "peft" / "bin" / "python"


if __name__ == "__main__":
    from session import main

    main([TransformersPeft(has_adapters=False), TransformersPeft(has_adapters=True)])
