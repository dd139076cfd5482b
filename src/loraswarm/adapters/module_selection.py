"""Which modules of the base a PEFT config selects, by PEFT's own matching rules.

Knows module paths only (`model.layers.0.self_attn.q_proj`), no tensors and no files. Built by
adapters/config_keys, asked by adapters/methods.
Source    peft 0.21: tuners/tuners_utils.check_target_module_exists, utils/other.get_pattern_key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from loraswarm.core.base_shape import TARGETS

ALL_LINEAR = "all-linear"
Value = TypeVar("Value", int, float)
_LITERAL = re.compile(r"[A-Za-z0-9_.]*")
_FIRST_NUMBERED = r".*?\.[^.]*\.(?P<idx>\d+)\."


@dataclass(frozen=True, slots=True)
class ModuleSelection:
    """`targets` and `excluded`: a regular expression for whole paths, or names that paths end with.

    `layers` restricts names (not regular expressions, and not names that are whole paths) to layer
    indices; `layer_patterns` says what precedes the index, any word if empty. `replaced` are the
    names of modules_to_save: what is replaced, or lies inside of it, is not adapted as well.
    """

    targets: str | frozenset[str]
    excluded: str | frozenset[str] = frozenset()
    layers: frozenset[int] | None = None
    layer_patterns: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()

    def selects(self, path: str) -> bool:
        """Whether the module at `path` is adapted."""
        if self._excludes(path):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == ALL_LINEAR:
                return path.rpartition(".")[2] in TARGETS
            return compiled(self.targets).fullmatch(path) is not None
        if path in self.targets:
            return True
        return _ends_with_any(path, self.targets) and self._is_in_layers(path)

    def _excludes(self, path: str) -> bool:
        if any(compiled(replaced_expression(name)).match(path) for name in self.replaced):
            return True
        if isinstance(self.excluded, str):
            return bool(self.excluded) and compiled(self.excluded).fullmatch(path) is not None
        return path in self.excluded or _ends_with_any(path, self.excluded)

    def _is_in_layers(self, path: str) -> bool:
        if self.layers is None:
            return True
        expressions = [layer_expression(pattern) for pattern in self.layer_patterns]
        for expression in expressions or [_FIRST_NUMBERED]:
            match = compiled(expression).match(path)
            if match is not None:
                return int(match["idx"]) in self.layers
        return False


class Patterns(Generic[Value]):
    """A rank_pattern or alpha_pattern: the first key that applies to a path gives its value.

    Compares and hashes as its (key, value) pairs, in file order. Looks for each path once.
    """

    __slots__ = ("_found", "_hash", "_matchers", "_pairs")

    def __init__(self, pairs: Iterable[tuple[str, Value]] = ()) -> None:
        self._pairs: tuple[tuple[str, Value], ...] = tuple(pairs)
        self._hash: int = hash(self._pairs)
        self._found: dict[str, tuple[str, Value] | None] = {}
        # Most keys are names, whose ends are compared in a tenth of the time of an expression.
        self._matchers = [
            None if is_literal(key) else compiled(key_expression(key)) for key, _ in self._pairs
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and self._pairs == other._pairs

    def __hash__(self) -> int:
        return self._hash

    def find(self, path: str) -> tuple[str, Value] | None:
        """The key that applies to `path`, and its value; None if none does."""
        if path not in self._found:
            self._found[path] = self._search(path)
        return self._found[path]

    def _search(self, path: str) -> tuple[str, Value] | None:
        for pair, matcher in zip(self._pairs, self._matchers, strict=True):
            if _ends_with(path, pair[0]) if matcher is None else matcher.match(path):
                return pair
        return None


def is_literal(pattern: str) -> bool:
    """Whether a pattern is a name, with nothing special in it but dots."""
    return _LITERAL.fullmatch(pattern) is not None


def key_expression(pattern: str) -> str:
    """A key applies to a path that ends with it, from the start of a word on."""
    return rf"(.*\.)?({pattern})$"


def replaced_expression(name: str) -> str:
    """A name of modules_to_save covers the paths that have it as one of their parts."""
    return rf"(^|.*\.){name}($|\..*)"


def layer_expression(pattern: str) -> str:
    """Finds the first layer index that follows `pattern` in a path."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


@lru_cache(maxsize=4096)
def compiled(expression: str) -> re.Pattern[str]:
    """Raises re.error for a malformed expression."""
    return re.compile(expression)


def _ends_with_any(path: str, names: frozenset[str]) -> bool:
    return any(ending in names for ending in _endings(path))


def _endings(path: str) -> Iterator[str]:
    """`a.b.c` -> `b.c`, `c`."""
    while "." in path:
        path = path.partition(".")[2]
        yield path


def _ends_with(path: str, name: str) -> bool:
    """What `key_expression` of a name matches: a dot in it stands for any character."""
    start = len(path) - len(name)
    if start < 0 or (start > 0 and path[start - 1] != "."):
        return False
    end = path[start:]
    return end == name or all(char in (".", found) for char, found in zip(name, end, strict=True))
