"""All measurements of a CUDA device: ceilings, LoRA kernels, and steps of an 8B model.

    python benchmarks/gpu/run.py [--parts kernels,linears,decode,prefill] [--json FILE]

Needs about 65 GB of the device's memory, no files and no network. Every part is a process of its
own with a time limit; one that fails is named at the end, and the others run. Prints tables; --json
keeps every figure with the versions and the commit, and is written anew after each row.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from isolated import Row, run_isolated

from document import json_path, write_document

PARTS = ("kernels", "linears", "decode", "prefill")
LIMITS_S = {"ceilings": 40, "kernels": 150, "linears": 70, "decode": 150, "prefill": 60}
"""Seconds, starts of processes and compilations included: less than 8 minutes together."""
TITLES = {
    "ceilings": "ceilings",
    "kernels": "LoRA kernels, 4096 to 4096",
    "linears": "linears of a prefill chunk",
    "decode": "decode of an 8B model",
    "prefill": "prefill of an 8B model",
}


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA device")
    report = Report(options)
    report.measure("ceilings", None)
    if not report.found["ceilings"]:
        raise SystemExit("nothing is a share of unknown ceilings; no other part was measured")
    ceilings = report.found["ceilings"][0]
    for part in options.parts.split(","):
        report.measure(part, ceilings)
    if report.faults:
        raise SystemExit("not measured to the end: " + ", ".join(report.faults))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts has {sorted(unknown)}; it may have {', '.join(PARTS)}")
    return options


def rows_of(part: str, ceilings: Row | None) -> Iterator[Row]:
    """What a part's process does; `ceilings` is the row of the part of that name."""
    from ceilings import Ceilings, measure_ceilings

    device = torch.device("cuda", torch.cuda.current_device())
    if part == "ceilings":
        yield asdict(measure_ceilings(device))
        return
    assert ceilings is not None
    known = Ceilings(**ceilings)
    if part == "kernels":
        from lora_kernels import measure_kernels

        yield from measure_kernels(known, device)
    elif part == "linears":
        from prefill_linears import measure_prefill_linears

        yield from measure_prefill_linears(known, device)
    else:
        from steps import LLAMA_3_8B, Machine, measure_decode, measure_prefill

        measure = measure_decode if part == "decode" else measure_prefill
        yield from measure(Machine(device, LLAMA_3_8B), known)


class Report:
    """The rows of all parts so far: printed, and in the JSON file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._begin_s = time.monotonic()
        self.found: dict[str, list[Row]] = {}
        self.faults: dict[str, str] = {}

    def measure(self, part: str, ceilings: Row | None) -> None:
        """Run a part and take its rows; a fault is kept and said."""
        self.found[part] = []
        print(f"\n{TITLES[part]} (after {time.monotonic() - self._begin_s:.0f} s)", flush=True)
        fault = run_isolated(
            rows_of, (part, ceilings), LIMITS_S[part], lambda row: self._take(part, row)
        )
        if fault is not None:
            self.faults[part] = fault
            print(f"{part}: {fault}", flush=True)
            self._write()

    def _take(self, part: str, row: Row) -> None:
        if not self.found[part]:
            print(" ".join(f"{name:>9}" for name in row))
        self.found[part].append({name: _finite(value) for name, value in row.items()})
        shown = (f"{_shown(value):>{max(9, len(name))}}" for name, value in row.items())
        print(" ".join(shown), flush=True)
        self._write()

    def _write(self) -> None:
        """The whole file or, if this is interrupted, the one before."""
        path = self._options.json
        if path is not None:
            part = path.with_name(path.name + ".part")
            write_document(part, self._options, {**self.found, "faults": self.faults})
            os.replace(part, path)


def _finite(value: Any) -> Any:
    """None in the place of what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
