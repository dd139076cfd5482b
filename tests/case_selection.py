"""Which cases of a test are run, where running all takes long.

Knows the parameters of pytest's items, and no test. Called by conftest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import pytest

Value = tuple[tuple[str, int], ...]


def pairwise(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Of a test's cases so many that two values which any case has are together in one of these.

    Each in turn is the one that adds most pairs, the first of equals: the same in every run. With
    one parameter or two these are all.
    """
    pairs = [pairs_of(case) for case in cases]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(pairs[index] & missing))
        chosen.append(cases[best])
        missing -= pairs[best]
    return chosen


def pairs_of(case: pytest.Item) -> set[tuple[Value, Value]]:
    """Every two values of a case, and each with itself; what one list gives together is one."""
    params = case.callspec.params
    lists = [mark.args[0] for mark in case.iter_markers("parametrize")]
    groups = [re.findall(r"\w+", names) if isinstance(names, str) else names for names in lists]
    groups += [[name] for name in params.keys() - set(itertools.chain(*groups))]
    values = sorted(tuple((name, id(params[name])) for name in group) for group in groups)
    return set(itertools.combinations_with_replacement(values, 2))
