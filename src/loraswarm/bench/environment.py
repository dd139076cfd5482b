"""What the figures were measured on: machine, versions, commit.

Describes the machine that the benchmark itself runs on, which is the server's only if they share
it. Imports no torch: versions come from what pip has noted.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

import loraswarm

GIT_TIMEOUT_S = 10.0
PACKAGE = Path(loraswarm.__file__).parent


def environment() -> dict[str, Any]:
    """Plain values for a JSON document; what cannot be found out is None.

    `num_cores` are physical cores, `num_usable_cpus` what this process may run on. `commit` is that
    of the source tree, None outside of one; `has_local_changes` says if files of the package
    differ from it.
    """
    return {
        "cpu": cpu_name(),
        "num_cores": psutil.cpu_count(logical=False),
        "num_usable_cpus": _num_usable_cpus(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "loraswarm": loraswarm.__version__,
        "torch": _version_of("torch"),
        **source_tree(),
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The CPU's model as the system names it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or None


def _num_usable_cpus() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_tree(package: Path = PACKAGE) -> dict[str, Any]:
    """`commit` and `has_local_changes` of the tree that holds the package.

    Both are None unless the package's files are tracked there: one that is installed below some
    other project's directory must not be given that one's commit.
    """
    commit = None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(package, "rev-parse", "HEAD")
    changes = None if commit is None else _git(package, "status", "--porcelain", ".")
    return {"commit": commit, "has_local_changes": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None without git, outside a repository or if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
