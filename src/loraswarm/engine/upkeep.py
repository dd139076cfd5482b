"""Looks at the stores by the clock, and into adapters that nobody has asked for yet.

Owns when the next scan is due and which descriptions are under way; the loader does the work and
the catalog keeps what it finds. Called by the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from loraswarm.adapters.catalog import Catalog
from loraswarm.adapters.stores import Found
from loraswarm.core.admin import ScanReport
from loraswarm.engine.loader import Loader
from loraswarm.engine.loader_jobs import JobFailed, Result, ScanDone, ScanJob, Surveyed, SurveyJob

SECOND_LOOK_S = 0.6
MIN_SCAN_INTERVAL_S = 30.0  # of scans that failures ask for
SURVEY_SIZE = 64
log = logging.getLogger(__name__)


class Upkeep:
    """Scans and surveys of one engine."""

    def __init__(
        self,
        catalog: Catalog,
        loader: Loader,
        next_job_id: Callable[[], int],
        refresh_interval_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._loader = loader
        self._next_job_id = next_job_id
        self._refresh_interval_s = refresh_interval_s
        self._clock = clock
        self._scan_due_s: float | None = None
        self._last_scan_s = -MIN_SCAN_INTERVAL_S
        self._scan_id: int | None = None
        self._survey_id: int | None = None
        self._to_survey: deque[Found] = deque()
        self._surveyed: set[Found] = set()
        self._failures: set[str] = set()
        self._find_undescribed()
        self._plan_scan(bool(catalog.pending))

    def note_failures(self, failures: Iterable[str]) -> None:
        """The scan at start could not list some stores."""
        self._failures = set(failures)
        if self._failures:
            self.look_again()

    def next_due_s(self) -> float | None:
        """When `tick` has something to do, by the clock; None: not before more news."""
        return self._scan_due_s

    def tick(self) -> None:
        """Start what is due."""
        if self._scan_due_s is not None and self._clock() >= self._scan_due_s:
            self._scan_due_s = None
            self._last_scan_s = self._clock()
            self._scan_id = self._next_job_id()
            self._loader.submit(ScanJob(self._scan_id))
        if self._survey_id is None and self._to_survey:
            count = min(SURVEY_SIZE, len(self._to_survey))
            found = tuple(self._to_survey.popleft() for _ in range(count))
            self._survey_id = self._next_job_id()
            self._loader.submit(SurveyJob(self._survey_id, found))

    def look_again(self) -> None:
        """A store has failed, or its files have changed since they were found: scan before long."""
        due_s = max(self._clock() + SECOND_LOOK_S, self._last_scan_s + MIN_SCAN_INTERVAL_S)
        if self._scan_due_s is None or due_s < self._scan_due_s:
            self._scan_due_s = due_s

    def take(self, result: Result) -> ScanReport | None:
        """Enter a scan's or a survey's result into the catalog; what a scan has changed."""
        if result.job_id == self._survey_id:
            self._survey_id = None
            if isinstance(result, JobFailed):  # the next scan finds them undescribed again
                self._surveyed.clear()
        if isinstance(result, Surveyed):
            for found, row in result.rows:
                self._catalog.surveyed(found, row)
        if isinstance(result, ScanDone):
            report = self._catalog.apply(result.change)
            self._log(report)
            self._find_undescribed()
            if report.failures:
                self.look_again()
            if result.job_id == self._scan_id or report.pending:
                self._plan_scan(bool(report.pending))
            return report
        if isinstance(result, JobFailed) and result.job_id == self._scan_id:
            log.error("scan failed reason=%r", result.error.message)
            self._plan_scan(False)
        return None

    def _plan_scan(self, has_pending: bool) -> None:
        wait_s = self._refresh_interval_s
        if has_pending:
            wait_s = SECOND_LOOK_S if wait_s is None else min(wait_s, SECOND_LOOK_S)
        if wait_s is not None:
            due_s = self._clock() + wait_s
            self._scan_due_s = due_s if self._scan_due_s is None else min(due_s, self._scan_due_s)

    def _find_undescribed(self) -> None:
        """What to survey next; each content is looked into once."""
        undescribed = [entry.found for entry in self._catalog.undescribed()]
        self._to_survey = deque(found for found in undescribed if found not in self._surveyed)
        self._surveyed = set(undescribed)

    def _log(self, report: ScanReport) -> None:
        """What has changed; a store that goes on failing is reported once."""
        for failure in sorted(set(report.failures) - self._failures):
            log.error("store not listed reason=%r", failure)
        if self._failures and not report.failures:
            log.info("all stores are listed again")
        self._failures = set(report.failures)
        if not (report.added or report.changed or report.removed):
            return
        log.info(
            "adapters scanned added=%d changed=%d removed=%d pending=%d elapsed_s=%.2f",
            len(report.added),
            len(report.changed),
            len(report.removed),
            len(report.pending),
            report.elapsed_s,
        )
