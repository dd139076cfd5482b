"""Whether counts were drawn with given probabilities: Pearson's test, without scipy."""

from __future__ import annotations

import math

import numpy as np

# Of true hypotheses one in a thousand would be rejected; tests draw from fixed seeds, so that one
# that passes goes on passing.
SIGNIFICANCE = 0.001


def survival(distance: float, num_freedoms: int) -> float:
    """The probability that chi-square exceeds `distance`.

    Two degrees of freedom more add one term of the incomplete gamma function; it begins with erfc
    for one and with the exponential for two.
    """
    half = distance / 2
    is_odd = num_freedoms % 2
    probability = math.erfc(math.sqrt(half)) if is_odd else math.exp(-half)
    for freedoms in range(2 - is_odd, num_freedoms, 2):
        probability += math.exp(
            freedoms / 2 * math.log(half) - half - math.lgamma(freedoms / 2 + 1)
        )
    return probability


def fits(counts, probabilities) -> bool:
    """Whether counts of cells agree with the cells' probabilities; all cells must be likely."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    assert len(counts) == len(probabilities) > 1
    assert abs(probabilities.sum() - 1.0) < 1e-9
    expected = probabilities * counts.sum()
    assert expected.min() >= 5.0, "too few draws for a cell this unlikely"
    distance = float(((counts - expected) ** 2 / expected).sum())
    return distance == 0.0 or survival(distance, len(counts) - 1) >= SIGNIFICANCE
