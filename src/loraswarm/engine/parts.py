"""What an engine is put together from. Made by engine/setup, owned and closed by the engine."""

from __future__ import annotations

from dataclasses import dataclass

from loraswarm.adapters.catalog import Catalog
from loraswarm.engine.loader import Loader
from loraswarm.engine.merging import Merger
from loraswarm.engine.model_runner import ModelRunner
from loraswarm.engine.residency import Residency
from loraswarm.engine.scheduler import Scheduler
from loraswarm.engine.wakeup import Wakeup
from loraswarm.memory.host_cache import HostCache
from loraswarm.memory.memory import Memory
from loraswarm.memory.page_copier import PageCopier


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine is put together from; it owns and closes them."""

    catalog: Catalog
    loader: Loader
    host: HostCache
    copier: PageCopier
    wakeup: Wakeup
    runner: ModelRunner
    memory: Memory
    residency: Residency
    scheduler: Scheduler
    store_failures: tuple[str, ...] = ()
    merger: Merger | None = None

    def close(self) -> None:
        """End every thread and process, and give back the memory of merged weights."""
        if self.merger is not None:
            self.merger.close()
        self.loader.close()
        self.copier.close()
        self.wakeup.close()
