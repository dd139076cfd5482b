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
from typing import TypeVar

from loraswarm.core.base_shape import TARGETS

ALL_LINEAR = "all-linear"
Value = TypeVar("Value", int, float)
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


def find_pattern(patterns: Iterable[tuple[str, Value]], path: str) -> tuple[str, Value] | None:
    """The first (key, value) of a rank_pattern or alpha_pattern that applies to `path`, if any."""
    for key, value in patterns:
        if compiled(key_expression(key)).match(path):
            return key, value
    return None


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
    while path:
        path = path.partition(".")[2]
        yield path
