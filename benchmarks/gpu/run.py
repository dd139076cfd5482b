"""All measurements of a CUDA device: ceilings, LoRA kernels, and steps of an 8B model.

    python benchmarks/gpu/run.py [--parts kernels,linears,decode,prefill] [--json FILE]

Needs about 60 GB of the device's memory, no files and no network. Prints tables; --json keeps every
figure with the versions and the commit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from ceilings import Ceilings, measure_ceilings
from lora_kernels import measure_kernels
from prefill_linears import measure_prefill_linears
from steps import Machine, measure_decode, measure_prefill

from document import json_path, write_document
from loraswarm.models.config import DecoderConfig

PARTS = ("kernels", "linears", "decode", "prefill")
LLAMA_3_8B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    max_position=8192,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    windows=(None,) * 32,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts has {sorted(unknown)}; it may have {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measure_ceilings(device)
    found: dict[str, Any] = {"ceilings": asdict(ceilings)}
    print(
        f"{ceilings.device}: copies {ceilings.copy_gb_per_s:.0f} GB/s, reads"
        f" {ceilings.read_gb_per_s:.0f} GB/s, {ceilings.tflop_per_s:.0f} TFLOP/s in bfloat16"
    )
    try:
        _measure(options.parts.split(","), ceilings, device, found)
    finally:
        if options.json:
            write_document(options.json, options, found)


def _measure(
    parts: Sequence[str], ceilings: Ceilings, device: torch.device, found: dict[str, Any]
) -> None:
    """Fill `found` part by part, so that what ends early has shown what it measured."""
    begin_s = time.monotonic()
    if "kernels" in parts:
        found["kernels"] = measure_kernels(ceilings, device)
        _show("LoRA kernels, 4096 to 4096", found["kernels"], begin_s)
    if "linears" in parts:
        found["linears"] = measure_prefill_linears(ceilings, device)
        _show("linears of a prefill chunk", found["linears"], begin_s)
    if "decode" in parts or "prefill" in parts:
        machine = Machine(device, LLAMA_3_8B)
        for part, measure in (("decode", measure_decode), ("prefill", measure_prefill)):
            if part in parts:
                found[part] = measure(machine, ceilings)
                _show(f"{part} of an 8B model", found[part], begin_s)


def _show(title: str, rows: Sequence[dict[str, Any]], begin_s: float) -> None:
    print(f"\n{title} (after {time.monotonic() - begin_s:.0f} s)")
    names = list(rows[0])
    print(" ".join(f"{name:>14}" for name in names))
    for row in rows:
        print(" ".join(f"{_shown(row[name]):>14}" for name in names), flush=True)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
