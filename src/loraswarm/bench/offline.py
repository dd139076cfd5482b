"""An engine in this process as a target: no HTTP, no tokenizer, no second process.

Imports no torch itself; `set_engine_environment` must come before the engine is made, which does.
Driven by bench/runner.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, Self

from loraswarm.bench.engine_thread import EngineThread, OpenRequest, Report
from loraswarm.bench.records import Clock, PlannedRequest, RequestRecord
from loraswarm.config import EngineConfig
from loraswarm.core.client import EngineInfo
from loraswarm.core.request import Request, SamplingParams
from loraswarm.engine.engine_process import ENGINE_ENVIRONMENT

log = logging.getLogger(__name__)


def set_engine_environment() -> None:
    """Give this process what an engine's process has in its environment; the user's own settings
    win. Call before anything imports torch, whose libraries read it once."""
    missing = [name for name in ENGINE_ENVIRONMENT if name not in os.environ]
    for name in missing:
        os.environ[name] = ENGINE_ENVIRONMENT[name]
    if missing and "torch" in sys.modules:
        log.warning("torch is loaded already and does not see %s", " ".join(missing))


class OfflineTarget:
    """An engine of `model` with the stores `adapters`; made when this is, freed by `close`.

    `options` are the fields of EngineConfig; `report` gets the lines of the start.
    Raises   ConfigError for an option or a model that cannot work.
    """

    def __init__(
        self,
        model: str,
        adapters: Sequence[str] = (),
        report: Report | None = None,
        **options: Any,
    ) -> None:
        config = EngineConfig.from_options({"model": model, "adapters": tuple(adapters), **options})
        self._ids = itertools.count()
        self._thread = EngineThread(config, report or log.info)
        self._thread.start()
        try:
            self.info: EngineInfo = self._thread.wait_ready()
        except BaseException:
            self._thread.stop()
            raise

    @property
    def name(self) -> str:
        return f"offline {self.info.model}"

    def adapter_names(self) -> tuple[str, ...]:
        """What was served when the engine was ready, sorted."""
        return self._thread.adapter_names

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def send(self, request: PlannedRequest, clock: Clock) -> RequestRecord:
        """See `Target`; a request that is given up is aborted in the engine."""
        loop = asyncio.get_running_loop()
        entry = OpenRequest(
            planned=request,
            request=_engine_request(request, f"bench-{next(self._ids)}"),
            clock=clock,
            loop=loop,
            done=loop.create_future(),
            start_s=clock(),
        )
        self._thread.submit(entry)
        try:
            return await entry.done
        except asyncio.CancelledError:
            self._thread.abort(entry)
            raise

    async def close(self) -> None:
        """See `Target`; what is open then ends with an error."""
        self._thread.stop()
        await asyncio.to_thread(self._thread.join)


def _engine_request(planned: PlannedRequest, request_id: str) -> Request:
    params = SamplingParams(max_tokens=planned.max_tokens, temperature=0.0, ignore_eos=True)
    return Request(
        request_id=request_id,
        prompt_token_ids=planned.prompt_token_ids,
        params=params,
        adapter=planned.adapter,
    )
