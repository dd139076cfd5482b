"""What stores hold and the catalog does not serve: it was unloaded, or its name is taken.

Owns these two tables; knows nothing of what is served instead. Used by the catalog.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from loraswarm.adapters.stores import Found, printable
from loraswarm.core.client import AdapterSummary

MAX_UNLOADED = 100_000
_logger = logging.getLogger(__name__)
_Place = tuple[str, str]
Log = Callable[[str, str, str], None]
"""Takes a name, a location and a reason."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is there and not served, and why."""

    name: str
    path: Path
    reason: str


class Unserved:
    """Finds by (name, location). Those shadowed have the name of one that goes first."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._shadowed: dict[_Place, Found] = {}
        self._unloaded: dict[str, dict[str, Found]] = {}

    def __iter__(self) -> Iterator[Found]:
        """Those that are shadowed."""
        return iter(tuple(self._shadowed.values()))

    def shadows_of(self, name: str) -> list[Found]:
        """What has that name beside the one that goes first."""
        return [found for found in self._shadowed.values() if found.name == name]

    def shadow(self, found: Found, owner: str) -> None:
        """`found` is not served since its name belongs to what is at `owner`."""
        if self.was_unloaded(found):
            return
        shadow = self._shadowed[_place(found)] = replace(found, shadowed_by=owner)
        self._log(found.name, found.location, shadow_refusal(shadow).reason)

    def unshadow(self, found: Found) -> bool:
        """It is no shadow from now on; whether it was one."""
        return self._shadowed.pop(_place(found), None) is not None

    def unload(self, served: Found) -> None:
        """Neither `served` nor what it shadows is to come back while its files are the same."""
        others = self.shadows_of(served.name)
        for found in others:
            self.unshadow(found)
        self._unloaded.pop(served.name, None)
        self._unloaded[served.name] = {found.location: found for found in (*others, served)}
        if len(self._unloaded) > MAX_UNLOADED:
            oldest = next(iter(self._unloaded))
            del self._unloaded[oldest]
            _logger.warning("unloading forgotten name=%r max_names=%d", oldest, MAX_UNLOADED)

    def unloaded_at(self, name: str, location: str) -> Found | None:
        """What was unloaded there."""
        return self._unloaded.get(name, {}).get(location)

    def was_unloaded(self, found: Found) -> bool:
        """Whether just that content was; it is remembered as it is found now."""
        known = self.unloaded_at(*_place(found))
        if known is None or known.stamp != found.stamp:
            return False
        self._unloaded[found.name][found.location] = found
        return True

    def last_unloaded(self, name: str) -> Found | None:
        """What was served as `name` before it was unloaded, or else has its name."""
        places = self._unloaded.get(name)
        return next(reversed(places.values())) if places else None

    def unloaded_names(self) -> list[str]:
        """Names whose files a scan would serve if they had not been unloaded."""
        return [
            name
            for name, places in self._unloaded.items()
            if any(not found.is_by_request for found in places.values())
        ]

    def reload(self, name: str) -> None:
        """The name is served again."""
        self._unloaded.pop(name, None)

    def leave(self, found: Found) -> None:
        """Its files are gone."""
        self.unshadow(found)
        places = self._unloaded.get(found.name, {})
        places.pop(found.location, None)
        if not places:
            self._unloaded.pop(found.name, None)


def shadow_refusal(found: Found) -> Refusal:
    """Why one that is shadowed is not served."""
    reason = f"adapter {found.name!r} is already named by {found.shadowed_by!r}; rename one of them"
    return Refusal(found.name, Path(found.location), reason)


def unserved_summary(found: Found, reason: str) -> AdapterSummary:
    """How listings show it."""
    return AdapterSummary(name=found.name, path=printable(found.location), refusal=reason)


def log_refusal(name: str, location: str, reason: str) -> None:
    """One line for what is there and not served."""
    _logger.warning("adapter refused name=%r path=%r reason=%r", name, printable(location), reason)


def no_log(name: str, location: str, reason: str) -> None:
    """Where another catalog logs the same."""


def _place(found: Found) -> _Place:
    return found.name, found.location
