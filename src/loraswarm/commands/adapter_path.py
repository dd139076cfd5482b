"""Where the one adapter is that a command was told to read.

Knows paths, nothing of what is in them. Used by commands/adapters, generate and merge.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from loraswarm.adapters.source import NEMO_SUFFIX
from loraswarm.errors import ConfigError


def adapter_path(text: str, wanted: str = f"a directory or a {NEMO_SUFFIX} file") -> Path:
    """`text` as the path of a directory or of a .nemo file; `wanted` is what messages ask for.

    Raises    ConfigError saying what it is instead.
    """
    try:
        mode = os.stat(text).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no possible name
        raise ConfigError(
            f"adapter {text!r} does not exist; give {wanted} (of an adapter on the hub,"
            " the directory where `hf download` put it)"
        ) from None
    except OSError as error:
        raise ConfigError(f"adapter {text!r} cannot be read: {error.strerror or error}") from error
    is_nemo = text.endswith(NEMO_SUFFIX)
    if stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and is_nemo):
        return Path(text)
    kind = "a file" if stat.S_ISREG(mode) else "no directory and no regular file"
    raise ConfigError(f"adapter {text!r} is {kind}; give the directory that holds it")
