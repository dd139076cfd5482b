"""A virtual environment for each peer, made once and kept.

Knows nothing about what is installed. Used by the peers.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from functools import cache
from pathlib import Path

TORCH = "torch==2.13.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
INDEX_TIMEOUT_S = 10.0


def make_venv_once(path: Path, steps: Sequence[Sequence[str]], uses_torch_index: bool) -> Path:
    """A venv in which each of `steps` (arguments of pip) was run; returns its python.

    One that was made by the same steps is kept; a half-made one, or one of other steps, is made
    anew. With `uses_torch_index` pip also looks where torch's builds without CUDA are, if that can
    be reached; otherwise torch is what the configured index has.
    Raises   subprocess.CalledProcessError with pip's output on the terminal.
    """
    python = path / "bin" / "python"
    stamp = path / "installed.json"
    wanted = json.dumps(list(map(list, steps)))
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing into {path}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(path)], check=True)
    extra = ["--extra-index-url", TORCH_INDEX] if uses_torch_index and _is_reachable() else []
    for step in steps:
        arguments = [*step, *(extra if step[0] == "install" else [])]
        run_pip(python, arguments)
    stamp.write_text(wanted)
    return python


@cache
def _is_reachable() -> bool:
    """Whether the index of torch answers. pip would try again for minutes, for each package."""
    try:
        with urllib.request.urlopen(f"{TORCH_INDEX}/torch/", timeout=INDEX_TIMEOUT_S):
            return True
    except (OSError, http.client.HTTPException) as error:
        print(
            f"{TORCH_INDEX} cannot be reached ({error}): torch comes from the configured index,"
            " perhaps with CUDA, which is gigabytes",
            file=sys.stderr,
            flush=True,
        )
        return False


def run_pip(python: Path, arguments: Sequence[str]) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Installed versions by package. Raises subprocess.CalledProcessError if one is missing."""
    program = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    )
    command = [str(python), "-c", program, *packages]
    found: dict[str, str] = json.loads(subprocess.check_output(command, text=True))
    return found
