"""Fills a catalog at once: looks at every store and describes what it finds.

Knows files only through adapters/reading; whatever describing an adapter raises refuses that
adapter alone. For those who do not serve meanwhile: commands, an engine's start, tests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from loraswarm.adapters.catalog import Catalog, Entry
from loraswarm.adapters.printable import quoted
from loraswarm.adapters.reading import read_adapter_info, stamped
from loraswarm.adapters.scanner import Scanner
from loraswarm.adapters.stores import open_store, scheme_of
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError, ConfigError

_logger = logging.getLogger(__name__)


def find_now(
    roots: Sequence[str], model_name: str | None = None, is_logged: bool = True
) -> Catalog:
    """A catalog of what is in the stores now, settled or not; nothing is described.

    Raises    ConfigError for a store that cannot be opened or listed.
    """
    change = Scanner([open_store(root) for root in roots], settle_s=0).scan()
    if change.failures:
        raise ConfigError(f"--adapters: {change.failures[0]}")
    catalog = Catalog(model_name, is_logged)
    catalog.apply(change)
    return catalog


def scan_now(roots: Sequence[str], shape: BaseShape, model_name: str | None = None) -> Catalog:
    """`find_now`, with everything described that is not remote.

    Cost      the headers of all adapters, no weights.
    """
    start_s = time.perf_counter()
    catalog = find_now(roots, model_name)
    describe_entries(catalog, catalog.undescribed(), shape)
    _logger.info(
        "adapters scanned served=%d refused=%d elapsed_ms=%.1f",
        sum(row.refusal is None for row in catalog.summaries()),
        len(catalog.refusals),
        (time.perf_counter() - start_s) * 1e3,
    )
    return catalog


def describe_entries(
    catalog: Catalog, entries: Iterable[Entry], shape: BaseShape, budget_s: float | None = None
) -> int:
    """Describe local adapters, or refuse them, until `budget_s` is spent; returns how many.

    Remote ones are passed over: their files are not here.
    """
    start_s = time.perf_counter()
    num_described = 0
    for entry in entries:
        if budget_s is not None and time.perf_counter() - start_s >= budget_s:
            break
        if scheme_of(entry.location) is not None:
            continue
        num_described += 1
        try:
            info = read_adapter_info(Path(entry.location), entry.name, shape)
        except Exception as error:  # whatever is in a file, it must harm its own adapter only
            catalog.refused(entry, refusal_reason(entry.name, error))
        else:
            catalog.learned(entry, stamped(info, entry.stamp))
    return num_described


def refusal_reason(name: str, error: Exception) -> str:
    """Why adapter `name` is refused if reading it raised `error`; a bug of ours goes to the log."""
    if isinstance(error, AdapterError):
        return str(error)
    _logger.error("adapter not described name=%r", name, exc_info=error)
    return f"adapter {quoted(name)} could not be read: {type(error).__name__} (see the log)"
