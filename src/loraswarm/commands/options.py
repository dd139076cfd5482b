"""Values that people write on a command line, read into what the options mean."""

from __future__ import annotations

import re

from loraswarm.errors import ConfigError

UNITS = {
    "": 1,
    "B": 1,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}


def parse_bytes(name: str, text: str | None) -> int | None:
    """`4GiB`, `512MB`, `2G` (2 GiB) or a plain number of bytes; None stays None.

    Raises   ConfigError naming the option.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{name} is {text!r}; give bytes, as in 4000000000, 512MB or 4GiB")
    return int(float(match[1]) * unit)
