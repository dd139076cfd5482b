"""Keeps a cluster's view and its index of prefixes true to what replicas report, and to that only.

Knows the numbers of reports, not how they travel. Told by the front, which asks a replica for a
full report when it is told to; nothing is ever concluded from traffic.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from loraswarm.cluster.prefixes import PrefixIndex
from loraswarm.cluster.view import ClusterView
from loraswarm.core.residency_report import ResidencyReport

ASK_AGAIN_S = 1.0
Outcome = Literal["applied", "ignored", "ask"]
"""What became of a report; "ask": it is of no use without one that is missing, so ask for a full
one."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Line:
    """Reports of one replica: the life they are of, and the number that comes next. None: only a
    full report will do, which was asked for at `asked_s` if it was."""

    epoch: int = 0
    next_number: int | None = None
    asked_s: float | None = None


class ResidencyBook:
    """Reports of all replicas, entered in order.

        full                    entered, whatever was known, unless a later one has been
        the next in number      entered
        one of before           ignored: it is in what has been entered
        any other               useless: one is missing, or the engine is another one now

    Until the full report is here, the view keeps what was known: a stale place costs a load, not a
    wrong answer.
    """

    def __init__(self, view: ClusterView, prefixes: PrefixIndex) -> None:
        self._view = view
        self._prefixes = prefixes
        self._lines: dict[str, _Line] = {}

    def apply(self, replica_id: str, report: ResidencyReport) -> Outcome:
        """Enter a report. One of a replica that the view does not have is ignored."""
        if replica_id not in self._view.replicas:
            return "ignored"
        line = self._lines.setdefault(replica_id, _Line())
        is_same_life = line.next_number is not None and report.epoch == line.epoch
        if is_same_life and line.next_number is not None and report.number < line.next_number:
            return "ignored"
        if not report.is_full and not (is_same_life and report.number == line.next_number):
            return self._ask(replica_id, line)
        if report.is_full:
            self._forget_adapters(replica_id, report)
        for adapter, tier in report.tiers.items():
            self._view.set_tier(replica_id, adapter, tier)
        self._prefixes.apply(replica_id, report)
        line.epoch, line.next_number, line.asked_s = report.epoch, report.number + 1, None
        return "applied"

    def forget(self, replica_id: str) -> None:
        """The replica is gone: its prefixes leave the index (the view forgets its adapters itself);
        one that comes with its name begins anew."""
        self._lines.pop(replica_id, None)
        self._prefixes.forget(replica_id)

    def _ask(self, replica_id: str, line: _Line) -> Outcome:
        """Once, and again if nothing has come for a while."""
        now_s = self._view.now_s
        line.next_number = None
        if line.asked_s is not None and now_s - line.asked_s < ASK_AGAIN_S:
            return "ignored"
        line.asked_s = now_s
        log.info("residency reports missing replica=%s", replica_id)
        return "ask"

    def _forget_adapters(self, replica_id: str, report: ResidencyReport) -> None:
        """Those that a full report no longer has."""
        for adapter in tuple(self._view.replicas[replica_id].tiers):
            if adapter not in report.tiers:
                self._view.set_tier(replica_id, adapter, None)
