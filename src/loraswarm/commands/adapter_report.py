"""What `loraswarm adapters check` found, as a table for people or as JSON.

Knows descriptions of adapters, no files. Used by commands/adapters.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.base_shape import EMBEDDING, LM_HEAD, TARGETS, BaseShape

Verdict = Literal["ok", "refused", "needs --model"]
HEADINGS = ("name", "format", "method", "ranks", "targets", "bytes on device", "verdict")
GAP = "  "
MIN_WIDTH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a described adapter is, as far as a listing shows it.

    `ranks` are the smallest and the largest, None if no module has one. `num_layers` is set if only
    so many layers are adapted; `num_tokens` counts tokens with trained embeddings of their own.
    `shared_bytes` are those of matrices that other adapters may use as well.
    """

    file_format: str
    method: str
    ranks: tuple[int, int] | None
    targets: tuple[str, ...]
    num_layers: int | None
    num_tokens: int
    own_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedAdapter:
    """One adapter and the verdict on it; `base` is the model it was checked against."""

    name: str
    path: Path
    verdict: Verdict
    reason: str | None = None
    base: str | None = None
    facts: Facts | None = None

    @property
    def verdict_text(self) -> str:
        if self.verdict == "ok" and self.base is None:
            return "ok, not checked against a base"
        return self.verdict


def facts_of(info: AdapterInfo, shape: BaseShape, num_bytes: tuple[int, int]) -> Facts:
    """`num_bytes` on the device: of the adapter alone, and of matrices it shares."""
    linears = [module for module in info.modules if module.site < shape.num_linears]
    layers = {module.layer for module in linears}
    ranks = [module.rank for module in info.modules if module.rank > 0]
    return Facts(
        file_format=info.file_format,
        method=info.method,
        ranks=(min(ranks), max(ranks)) if ranks else None,
        targets=_targets(info, shape),
        num_layers=len(layers) if linears and len(layers) < shape.num_layers else None,
        num_tokens=max((len(overlay.token_ids or ()) for overlay in info.overlays), default=0),
        own_bytes=num_bytes[0],
        shared_bytes=num_bytes[1],
    )


def as_json(rows: Sequence[CheckedAdapter]) -> str:
    """A list of objects with all facts; what is not known is null."""
    return json.dumps([_as_object(row) for row in rows], indent=2)


def as_table(rows: Sequence[CheckedAdapter], width: int) -> str:
    """A line for each adapter, its reason below it; a paragraph each where `width` is too small."""
    cells = [_cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *cells, strict=True)]
    width = max(width, MIN_WIDTH)
    lines: list[str] = []
    if sum(widths) + len(GAP) * (len(widths) - 1) > width:
        for row, cell in zip(rows, cells, strict=True):
            lines += _paragraph(row, cell, width)
        return "\n".join(lines)
    lines.append(_padded(HEADINGS, widths))
    for row, cell in zip(rows, cells, strict=True):
        lines.append(_padded(cell, widths))
        lines += _reason(row, width)
    return "\n".join(lines)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    texts = (text.ljust(width) for text, width in zip(cells, widths, strict=True))
    return GAP.join(texts).rstrip()


def _targets(info: AdapterInfo, shape: BaseShape) -> tuple[str, ...]:
    """Names of linears in the order of TARGETS, then of all else that is adapted or replaced."""
    found = {module.target for module in info.modules if module.site < shape.num_linears}
    names = [TARGETS[target] for target in sorted(found)]
    others = [
        shape.site_path(module.site) for module in info.modules if module.site >= shape.num_linears
    ]
    for overlay in info.overlays:
        others += [path for path in overlay.paths if not path.startswith(EMBEDDING + ".")]
    known = {EMBEDDING: "embed_tokens", LM_HEAD: "lm_head"}
    names += sorted({known.get(path, "norms") for path in others})
    return tuple(names)


def _as_object(row: CheckedAdapter) -> dict[str, Any]:
    facts = row.facts
    return {
        "name": row.name,
        "path": str(row.path),
        "verdict": row.verdict.replace("needs --model", "needs_model"),
        "reason": row.reason,
        "checked_against": row.base,
        "format": facts and facts.file_format,
        "method": facts and facts.method,
        "min_rank": facts.ranks[0] if facts and facts.ranks else None,
        "max_rank": facts.ranks[1] if facts and facts.ranks else None,
        "targets": list(facts.targets) if facts else None,
        "num_layers": facts and facts.num_layers,
        "num_tokens": facts.num_tokens if facts else None,
        "bytes_on_device": facts.own_bytes if facts else None,
        "shared_bytes_on_device": facts.shared_bytes if facts else None,
    }


def _cells(row: CheckedAdapter) -> tuple[str, ...]:
    facts = row.facts
    if facts is None:
        return row.name, "-", "-", "-", "-", "-", row.verdict_text
    ranks = "-"
    if facts.ranks is not None:
        low, high = facts.ranks
        ranks = str(low) if low == high else f"{low}-{high}"
    num_bytes = _readable(facts.own_bytes)
    if facts.shared_bytes:
        num_bytes += f" + {_readable(facts.shared_bytes)} shared"
    method = facts.method
    return row.name, facts.file_format, method, ranks, _scope(facts), num_bytes, row.verdict_text


def _scope(facts: Facts) -> str:
    """`q,v (3 layers) +lm_head +5 tokens`"""
    linears = [name.removesuffix("_proj") for name in facts.targets if name in TARGETS]
    text = "all 7" if len(linears) == len(TARGETS) else ",".join(linears)
    if facts.num_layers is not None:
        text += f" ({facts.num_layers} layer{'s' * (facts.num_layers > 1)})"
    others = [f"+{name}" for name in facts.targets if name not in TARGETS]
    if facts.num_tokens:
        others.append(f"+{facts.num_tokens} token{'s' * (facts.num_tokens > 1)}")
    return " ".join([text, *others]).strip()


def _paragraph(row: CheckedAdapter, cells: tuple[str, ...], width: int) -> list[str]:
    lines = [f"{row.name}: {row.verdict_text}"]
    if row.facts is not None:
        _, file_format, method, ranks, scope, num_bytes, _ = cells
        line = f"{file_format} {method}, rank {ranks}, {scope}, {num_bytes}"
        lines += _indented(line, width)
    return lines + _reason(row, width)


def _reason(row: CheckedAdapter, width: int) -> list[str]:
    return [] if row.reason is None else _indented(row.reason, width)


def _indented(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _readable(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
