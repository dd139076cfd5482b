"""Directories that may not be entered, also where the tests run as root, whom no mode stops."""

from __future__ import annotations

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest


def lock(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let every look into directory `path`, and at what is below, fail with PermissionError."""

    def locked(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(place: Any = ".", *arguments: Any, **options: Any) -> Any:
            is_path = isinstance(place, str | os.PathLike)
            if is_path and Path(os.path.abspath(place)).is_relative_to(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(place))
            return original(place, *arguments, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("stat", "lstat", "scandir", "listdir", "open", "mkdir"):
        locked(os, name)
    locked(builtins, "open")
    locked(io, "open")
