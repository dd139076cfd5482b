"""Whether a regular expression can make matching a module's path slow, told from its structure.

Python's `re` tries alternatives one after the other and cannot be interrupted. An adapter's config
may hold any expression, so those that could try too many are refused. Called by
adapters/config_keys.
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import Any

MAX_EXPRESSION_CHARACTERS = 10_000
MAX_WAYS = 300_000
# Of all expressions of a list.
MAX_LIST_WAYS = 10_000_000
# No module's path is longer: model.layers.1000.self_attn.down_proj.
PATH_CHARACTERS = 40
_parser = importlib.import_module("re._parser")


@lru_cache(maxsize=4096)
def num_ways(expression: str) -> int:
    """The most ways through the expression that matching may take; above MAX_WAYS, any number.

    Semantics  counts ways to match a text of PATH_CHARACTERS: k unbounded repeats of one character
               in a row split it in (characters + k choose k) ways; alternatives that can begin
               alike add up; what is repeated multiplies, if it has more than one way or length.
    Raises     re.error for a malformed expression.
    """
    if len(expression) > MAX_EXPRESSION_CHARACTERS:
        return MAX_WAYS + 1
    ways, num_repeats = _count(_parser.parse(expression))
    return ways * math.comb(PATH_CHARACTERS + num_repeats, num_repeats)


def _count(pattern: Any) -> tuple[int, int]:
    """Ways besides those of repeats of one character, and how many such repeats follow each other.

    Both are bounds from above for any single path through the alternatives.
    """
    ways, num_repeats = 1, 0
    for operator, argument in pattern:
        item_ways, item_repeats = _count_item(str(operator), argument)
        ways = min(ways * item_ways, MAX_WAYS + 1)
        num_repeats = min(num_repeats + item_repeats, PATH_CHARACTERS)
    return ways, num_repeats


def _count_item(operator: str, argument: Any) -> tuple[int, int]:
    match operator:
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            return _count_repeat(*argument)
        case "SUBPATTERN":
            return _count(argument[-1])
        case "ATOMIC_GROUP":
            return _count(argument)
        case "ASSERT" | "ASSERT_NOT":
            return _count(argument[1])
        case "GROUPREF_EXISTS":
            return _count_branches([branch for branch in argument[1:] if branch is not None])
        case "BRANCH":
            return _count_branches(argument[1])
        case _:
            return 1, 0


def _count_branches(branches: list[Any]) -> tuple[int, int]:
    counts = [_count(branch) for branch in branches]
    num_repeats = max(count for _, count in counts)
    if all(_is_literal(branch) for branch in branches) and num_repeats == 0:
        return _most_alike([[char for _, char in branch] for branch in branches]), 0
    return sum(ways for ways, _ in counts), num_repeats


def _count_repeat(least: Any, most: Any, body: Any) -> tuple[int, int]:
    ways, num_repeats = _count(body)
    times = min(int(most), PATH_CHARACTERS)
    if num_repeats == 0 and ways == 1:
        low, high = body.getwidth()
        if low == high > 0:
            return (1, 0) if int(most) == int(least) else (1, 1)
    if times <= 1:
        return ways + 1, num_repeats
    # Each round may take any of the ways, and end at any character.
    return min((ways * (PATH_CHARACTERS if num_repeats else 2)) ** times, MAX_WAYS + 1), num_repeats


def _is_literal(branch: Any) -> bool:
    return all(str(operator) == "LITERAL" for operator, _ in branch)


def _most_alike(texts: list[list[int]]) -> int:
    """The most alternatives that match at one place: those that begin each other."""
    return max(sum(text[: len(other)] == other for other in texts) for text in texts)
