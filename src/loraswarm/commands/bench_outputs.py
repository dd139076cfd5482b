"""The files that `loraswarm bench` and its commands write: seen to beforehand, written at the end.

A run may take hours, so that what cannot be written is found before it, and a file that fails
nevertheless does not take the others along. Knows nothing about what is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from loraswarm.errors import ConfigError, LoRASwarmError


def check_outputs(paths: Mapping[str, str | None]) -> None:
    """See that each path can be written and that no two are one file; by option, None: not given.

    Files that are there keep their contents, others are not left behind.
    Raises   ConfigError naming the option.
    """
    option_of: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        if not os.path.isdir(Path(path).absolute().parent) or os.path.isdir(path):
            raise ConfigError(f"{name} is {path!r}; it must be a file in a directory that exists")
        file = Path(os.path.realpath(path))
        earlier = option_of.setdefault(file, name)
        if earlier != name:
            raise ConfigError(
                f"{earlier} and {name} are both {path!r}; give each a file of its own"
            )
        problem = _problem(file)
        if problem is not None:
            raise ConfigError(f"{name} is {path!r}, which cannot be written: {problem}")


def _problem(file: Path) -> str | None:
    """Why a file cannot be written."""
    try:
        was_there = file.exists()
        if was_there and not file.is_file():  # opening a pipe would wait for its reader
            return None if os.access(file, os.W_OK) else "Permission denied"
        file.open("ab").close()
        if not was_there:
            file.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def write_each(writes: Iterable[tuple[str, str, Callable[[str], None]]]) -> None:
    """Call each (option, path, write), also after one that failed.

    Raises   LoRASwarmError naming all that failed.
    """
    problems = []
    for name, path, write in writes:
        try:
            write(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            problems.append(f"{name} {path!r}: {reason}")
    if problems:
        raise LoRASwarmError(f"not written: {'; '.join(problems)}")
