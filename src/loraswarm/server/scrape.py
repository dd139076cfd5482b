"""GET /metrics: the server's own series and the engine's, as Prometheus reads them.

Gateways scrape twenty times a second, and thousands of series take tens of milliseconds to write.
So the server's series and those of single adapters are written in a thread, and again only when
that takes a small share of the time; the engine's, which gateways read, are few and always fresh.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from fastapi import Request
from fastapi.responses import Response
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import (
    CONTENT_TYPE_PLAIN_0_0_4,
    choose_encoder,
    generate_latest,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from loraswarm.core.admin import AdapterState
from loraswarm.core.client import EngineClient, EngineStats
from loraswarm.errors import LoRASwarmError
from loraswarm.server.engine_metrics import adapter_families, engine_families, vllm_families
from loraswarm.server.metrics import RequestMetrics

ENGINE_TIMEOUT_S = 2.0
STATES_AGE_S = 10.0
MAX_WRITING_SHARE = 0.02
OPEN_METRICS = "application/openmetrics-text"
OPEN_METRICS_END = b"# EOF\n"
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Page:
    """A format, and what was last written in it of the series that are many."""

    content_type: str
    encode: Callable[[Collector], bytes]
    text: bytes = b""
    until_s: float = 0.0


class Scraper:
    """Answers scrapes, one after the other."""

    def __init__(self, client: EngineClient, metrics: RequestMetrics) -> None:
        self._client = client
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self._states: tuple[AdapterState, ...] = ()
        self._states_until_s = 0.0
        self._is_answering = True
        self._plain = Page(CONTENT_TYPE_PLAIN_0_0_4, generate_latest)
        # Without UTF-8 the library replaces the colon of vLLM's names, which no format forbids.
        self._open = Page(
            openmetrics.CONTENT_TYPE_LATEST,
            partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8),
        )

    async def answer(self, request: Request) -> Response:
        """All series, as OpenMetrics 1.0 if the library would choose it for the client, else as
        plain text 0.0.4, which every client reads."""
        _, preferred = choose_encoder(request.headers.get("accept", ""))
        page = self._open if preferred.startswith(OPEN_METRICS) else self._plain
        async with self._lock:
            stats = await self._stats()
            if stats is not None:
                await self._refresh_states()
            fresh = page.encode(_Families(self._fresh_families(stats)))
            await self._refresh(page)
            body = fresh.removesuffix(OPEN_METRICS_END) + page.text
        return Response(body, headers={"Content-Type": page.content_type})

    async def _stats(self) -> EngineStats | None:
        """None if the engine is gone or does not answer: the server's own series remain."""
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                stats = await self._client.stats()
        except (LoRASwarmError, TimeoutError) as error:
            if self._is_answering:
                log.warning("scrapes without the engine reason=%r", error)
            self._is_answering = False
            return None
        self._is_answering = True
        return stats

    async def _refresh_states(self) -> None:
        """All adapters of the catalog, thousands of rows: asked for now and then only."""
        if time.monotonic() < self._states_until_s:
            return
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                self._states = await self._client.adapter_states()
        except (LoRASwarmError, TimeoutError) as error:
            log.warning("scrape without the adapters' states reason=%r", error)
        self._states_until_s = time.monotonic() + STATES_AGE_S

    def _fresh_families(self, stats: EngineStats | None) -> list[Metric]:
        text = "1 if the engine answers."
        families: list[Metric] = [
            GaugeMetricFamily("loraswarm_engine_up", text, value=float(stats is not None))
        ]
        if stats is not None:
            info = self._client.info
            families += engine_families(info, stats)
            families += vllm_families(info, stats, self._resident())
        return families

    def _resident(self) -> list[str]:
        known = self._client.adapters
        return [s.name for s in self._states if s.tier == "device" and s.name in known]

    async def _refresh(self, page: Page) -> None:
        if time.monotonic() < page.until_s:
            return
        metrics, states, own = self._metrics, self._states, self._metrics.own_labels

        def write() -> bytes:
            families = [*metrics.registry.collect(), *adapter_families(states, own)]
            return page.encode(_Families(families))

        started_s = time.monotonic()
        page.text = await asyncio.to_thread(write)
        ended_s = time.monotonic()
        page.until_s = ended_s + (ended_s - started_s) * (1 / MAX_WRITING_SHARE - 1)


class _Families(Collector):
    """Families that are there already, in the form that encoders take."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
