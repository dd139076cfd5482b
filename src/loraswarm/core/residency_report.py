"""What an engine tells about the adapters and prefixes that it holds.

Plain data that crosses processes. Made by engine/reports, read by cluster/residency and
cluster/prefixes; the simulator makes its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

PAGE_ID_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyReport:
    """What has changed since the report before, or, if it `is_full`, all that is held.

    `epoch` differs between lives of an engine; `number` counts its reports from 0. `tiers` are of
    adapters by name, as new requests would find them: None is said of one that has left memory.
    Pages are those of cached prefixes, by the first PAGE_ID_BYTES of their hashes, joined.
    """

    epoch: int
    number: int
    is_full: bool = False
    tiers: Mapping[str, Literal["device", "host"] | None] = field(default_factory=dict)
    added_pages: bytes = b""
    removed_pages: bytes = b""


def join_pages(digests: Iterable[bytes]) -> bytes:
    """Hashes of pages as a report has them."""
    return b"".join(digest[:PAGE_ID_BYTES] for digest in digests)


def page_ids(joined: bytes) -> list[int]:
    """The pages of a report, as numbers. Raises ValueError if it is cut off within one."""
    ids = array("Q")
    ids.frombytes(joined)
    return ids.tolist()
