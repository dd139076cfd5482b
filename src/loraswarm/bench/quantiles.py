"""Lengths given by their quantiles: tables of published traces, and files of one's own.

Does not know what the lengths are of. Called by lengths.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loraswarm.bench.traces import MAX_TOKENS
from loraswarm.errors import ConfigError

HEADER = ["probability", "length"]

# The counts at 10 to 99 % are those of the conversation and code traces of the Azure LLM inference
# dataset 2023 (19,366 and 8,819 requests, CC-BY), whose means are 1155, 211, 2048 and 28 tokens.
# The ends are chosen here: 1 token at 0, and nothing above the count at 99 %.
_PROBABILITIES = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
TABLES = {
    "azure-conv-prompt": (1, 207, 396, 1020, 1189, 2735, 4083, 4142, 4142),
    "azure-conv-output": (1, 54, 85, 129, 395, 424, 451, 601, 601),
    "azure-code-prompt": (1, 147, 578, 1469, 2745, 5194, 7315, 7436, 7436),
    "azure-code-output": (1, 7, 9, 13, 24, 55, 90, 252, 252),
}


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Draws from a distribution function that is linear between the given points, rounded.

    `probabilities` ascend strictly from 0 to 1; `lengths` ascend.
    """

    probabilities: tuple[float, ...]
    lengths: tuple[float, ...]

    def draw(self, num: int, rng: np.random.Generator) -> NDArray[np.int64]:
        drawn = np.interp(rng.random(num), self.probabilities, self.lengths)
        return np.rint(drawn).astype(np.int64)


def table(name: str) -> Quantiles:
    """One of `TABLES`."""
    return Quantiles(_PROBABILITIES, tuple(float(length) for length in TABLES[name]))


def read_quantiles(path: Path) -> Quantiles:
    """A CSV file of `probability,length` rows, both ascending, from probability 0 to 1.

    A header of these two words may come first.

    Raises   ConfigError naming the file and what is wrong.
    """
    points = _read_points(path)
    probabilities = tuple(probability for probability, _ in points)
    lengths = tuple(length for _, length in points)
    if not points or probabilities[0] != 0.0 or probabilities[-1] != 1.0:
        raise ConfigError(f"quantiles {path}: probabilities must begin with 0 and end with 1")
    if not all(low < high for low, high in pairwise(probabilities)):
        raise ConfigError(f"quantiles {path}: each probability must be above the one before")
    if not all(low <= high for low, high in pairwise(lengths)):
        raise ConfigError(f"quantiles {path}: no length may be below the one before")
    if not (lengths[0] >= 1 and lengths[-1] <= MAX_TOKENS):
        raise ConfigError(f"quantiles {path}: lengths must be from 1 to {MAX_TOKENS:,}")
    return Quantiles(probabilities, lengths)


def _read_points(path: Path) -> list[tuple[float, float]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [[text.strip() for text in row] for row in csv.reader(file, strict=True)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"quantiles {path} cannot be read: {error}") from error
    return [_point(path, row) for row in rows[rows[:1] == [HEADER] :] if row]


def _point(path: Path, row: list[str]) -> tuple[float, float]:
    try:
        probability, length = map(float, row)
    except ValueError:
        raise ConfigError(f"quantiles {path}: {row} is not a probability and a length") from None
    return probability, length
