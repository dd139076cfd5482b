"""The command line as a user runs it: in a process of its own, or in this one.

A process takes seconds to import torch; here that is done already. What only a process shows (the
end by a signal, what is imported, lines of the log on standard error) is tested with one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest

from loraswarm.__main__ import main

TIMEOUT_S = 600


def run_process(*arguments: object, columns: int = 100) -> subprocess.CompletedProcess[str]:
    """`loraswarm ARGUMENTS`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "loraswarm", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | {"COLUMNS": str(columns)},
        check=False,
    )


def run_here(
    capfd: pytest.CaptureFixture[str], *arguments: object, columns: int = 100
) -> subprocess.CompletedProcess[str]:
    """What `run_process` finds, in this process; an exception that `main` lets out gets out here.

    What processes that it starts print is captured too; lines of the log are not. The environment
    is as before afterwards.
    """
    capfd.readouterr()
    command = ["loraswarm", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, {"COLUMNS": str(columns)}),
        pytest.raises(SystemExit) as exited,
    ):
        main()
    printed = capfd.readouterr()
    assert isinstance(exited.value.code, int)
    return subprocess.CompletedProcess(command, exited.value.code, printed.out, printed.err)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what a user has done wrong."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = (text for text in done.stderr.splitlines() if text.startswith("loraswarm: error:"))
    return line
