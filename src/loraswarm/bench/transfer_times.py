"""Times what it takes to bring adapters from their store to host memory, and from there to pages.

One adapter after the other, on an engine that does nothing else; times are the engine's own. Called
by bench/calibrate, in the engine's thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraswarm.core.client import AdapterSummary, TimeTotals
from loraswarm.core.request import Request, SamplingParams
from loraswarm.errors import ConfigError, LoRASwarmError

if TYPE_CHECKING:
    from loraswarm.engine.engine import Engine

LOAD_STAGES = ("fetch", "read", "pack")
NO_TIME = TimeTotals()


@dataclass(frozen=True, slots=True)
class Transfer:
    """An adapter of `num_bytes` packed bytes: seconds to host memory, and from there to pages."""

    adapter: str
    num_bytes: int
    load_s: float
    copy_s: float


def time_transfers(
    engine: Engine,
    adapters: Sequence[AdapterSummary],
    room_bytes: int,
    report: Callable[[str], None],
) -> list[Transfer]:
    """Bring each adapter to pages, where it stays, until `room_bytes` are taken. None may be there
    before.

    What cannot be loaded is reported and left out. Raises ConfigError if none can.
    """
    if not can_forget():
        report("adapters' files may be in memory already: loads may seem cheaper than they are")
    transfers: list[Transfer] = []
    for summary in adapters:
        if sum(each.num_bytes for each in transfers) >= room_bytes:
            report(f"left out from adapter={summary.name!r} on: {room_bytes} bytes are taken")
            break
        forget_files(Path(summary.path))
        transfer = _transfer(engine, summary.name, report)
        if transfer is not None:
            transfers.append(transfer)
    if not transfers:
        raise ConfigError("no adapter could be loaded; there is nothing to measure")
    return transfers


def can_forget() -> bool:
    """Whether the system can be told to read files anew."""
    return hasattr(os, "posix_fadvise")


def forget_files(path: Path) -> None:
    """Have what is at `path`, a file or a directory, read from its disk the next time.

    A hint: the system may keep it. Nothing is done for what is not there, such as a URL.
    """
    if not can_forget():
        return
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        with contextlib.suppress(PermissionError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # what has not been written yet cannot be forgotten
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _transfer(engine: Engine, adapter: str, report: Callable[[str], None]) -> Transfer | None:
    before = engine.stats().loads
    reason = _bring(engine, adapter)
    if reason is not None:
        report(f"left out adapter={adapter!r} reason={reason!r}")
        return None
    after = engine.stats().loads

    def passed(stage: str) -> tuple[float, int]:
        first, last = before.get(stage, NO_TIME), after.get(stage, NO_TIME)
        return last.seconds - first.seconds, last.num_bytes - first.num_bytes

    copy_s, num_bytes = passed("copy")
    load_s = sum(passed(stage)[0] for stage in LOAD_STAGES)
    return Transfer(adapter, num_bytes, load_s, copy_s)


def _bring(engine: Engine, adapter: str) -> str | None:
    """Answer one request for the adapter; returns why not, if it fails."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    request = Request(
        request_id=f"bring {adapter}", prompt_token_ids=(1,), params=params, adapter=adapter
    )
    try:
        engine.add(request)
    except LoRASwarmError as error:
        return str(error)
    events = []
    while engine.has_work:
        events += engine.step()
    errors = [event.error.message for event in events if event.error is not None]
    return errors[0] if errors else None
