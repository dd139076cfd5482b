"""An adapter's config as checked values: every key is read, inert, refused, or unknown and refused.

Shared by all methods. Knows what a value must look like, not what it means for an update.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from typing import Any

from loraswarm.adapters import module_selection
from loraswarm.adapters.expression_cost import MAX_LIST_WAYS, MAX_WAYS, num_ways
from loraswarm.adapters.module_selection import ModuleSelection, Patterns, Value
from loraswarm.adapters.printable import one_line, shortened
from loraswarm.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 1_000_000
MAX_ALPHA = 1e30
MAX_LAYER = 1_000_000
MAX_TOKEN_ID = 2**31 - 1
# Limits on what is looked at for every module: EVA has a pattern for each of about 560 linears of a
# model of 70B.
MAX_PATTERNS = 2000
MAX_NAMES = 1000
MAX_TARGETS = 10_000

SELECTION_KEYS = frozenset(
    {
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "target_modules",
    }
)
# Bookkeeping that every method's config has.
BOOKKEEPING_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)


class ConfigKeys:
    """The keys of one adapter_config.json. Absent keys have the default that the caller gives.

    Every method raises AdapterError naming the key, its value and what to do.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    @classmethod
    def parse(cls, text: bytes) -> ConfigKeys:
        """Decode a whole file; its values are not looked at yet."""
        try:
            values = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, json.JSONDecodeError) else "not UTF-8 JSON"
            raise AdapterError(f"{CONFIG_FILE} cannot be read as JSON: {reason}") from None
        if not isinstance(values, dict):
            raise AdapterError(f"{CONFIG_FILE} is not a JSON object")
        return cls(values)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands in the file."""
        return self.values.get(key, default)

    def check(self, read: Set[str], inert: Set[str], refused: Mapping[str, str]) -> None:
        """Refuse `refused` keys (key -> reason) that are on, and keys that nobody knows."""
        for key, reason in refused.items():
            value = self.values.get(key)
            if not (value is None or value is False or value == [] or value == ""):
                raise self.refusal(key, reason)
        known = read | inert | refused.keys() | BOOKKEEPING_KEYS
        for key in sorted(self.values.keys() - known):
            value = self.values[key]
            is_off = value is None or value is False or (value in ("", [], {}))
            if not is_off:
                raise self.refusal(
                    key, "this key is unknown and may change the result; set it to null if not"
                )

    def refusal(self, key: str, reason: str) -> AdapterError:
        """The error for a key whose value cannot be served."""
        return _refusal(key, self.values.get(key), reason)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(key, "it must be true or false")
        return default if value is None else value

    def rank(self, key: str, default: int) -> int:
        """A whole number from 1 on."""
        return _rank(key, self.values.get(key, default))

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return _number(key, self.values.get(key, default))

    def rank_patterns(self, key: str) -> Patterns[int]:
        """A map from module names to ranks."""
        return self._patterns(key, _rank)

    def number_patterns(self, key: str) -> Patterns[float]:
        """A map from module names to numbers."""
        return self._patterns(key, _number)

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """A list of token ids; None if the key is null or absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(
            type(token_id) is int and 0 <= token_id <= MAX_TOKEN_ID for token_id in value
        ):
            raise self.refusal(key, "it must be a list of token ids")
        return tuple(value)

    def nested(self, key: str) -> ConfigKeys | None:
        """The object at `key`, its keys named `key.name`; None if it is null, false or absent."""
        value = self.values.get(key)
        if value is None or value is False:
            return None
        if not isinstance(value, dict):
            raise self.refusal(key, "it must be an object")
        return ConfigKeys({f"{key}.{name}": inner for name, inner in value.items()})

    def name_list(self, key: str) -> tuple[str, ...]:
        """A list of (regular expressions of) module names, in file order."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refusal(key, "it must be a list of module names")
        _check_length(key, value, MAX_NAMES)
        _check_expressions(key, value, module_selection.replaced_expression)
        return tuple(value)

    def names(self, key: str) -> str | frozenset[str]:
        """A list of names, or one string: a regular expression."""
        value = self.values.get(key)
        if value is None:
            return frozenset()
        if isinstance(value, str):
            _check_expression(key, value)
            return value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refusal(key, "it must be a list of names or one regular expression")
        _check_length(key, value, MAX_TARGETS)
        return frozenset(value)

    def selection(self) -> ModuleSelection:
        """The modules that SELECTION_KEYS select; target_modules must be there."""
        targets = self.names("target_modules")
        layers = self._layers()
        patterns = self.names("layers_pattern")
        if not targets:
            raise self.refusal("target_modules", "name the adapted modules")
        for key in ("layers_to_transform", "layers_pattern"):
            if isinstance(targets, str) and self.values.get(key) is not None:
                raise self.refusal(key, "target_modules must then be a list")
        if patterns and self.values.get("layers_to_transform") is None:
            raise self.refusal("layers_pattern", "layers_to_transform is missing")
        listed = self.values.get("layers_pattern") or []
        ordered = (listed,) if isinstance(listed, str) else tuple(listed)
        _check_length("layers_pattern", ordered, MAX_NAMES)
        _check_expressions("layers_pattern", ordered, module_selection.layer_expression)
        excluded, replaced = self.names("exclude_modules"), self.name_list("modules_to_save")
        return ModuleSelection(targets, excluded, layers, ordered, replaced)

    def _layers(self) -> frozenset[int] | None:
        value = self.values.get("layers_to_transform")
        if value is None or value == []:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(type(layer) is int and abs(layer) <= MAX_LAYER for layer in layers):
            raise self.refusal("layers_to_transform", "it must be a layer index or a list of them")
        return frozenset(layers)

    def _patterns(self, key: str, number: Callable[[str, Any], Value]) -> Patterns[Value]:
        mapping = self.values.get(key)
        if mapping is None:
            return Patterns()
        if not isinstance(mapping, dict):
            raise self.refusal(key, "it must map module names to numbers")
        _check_length(key, mapping, MAX_PATTERNS)
        expressions = [name for name in mapping if not module_selection.is_literal(name)]
        _check_expressions(key, expressions, module_selection.key_expression)
        return Patterns(
            (name, number(f"{key}[{shortened(name)}]", value)) for name, value in mapping.items()
        )


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _refusal(key, value, f"it must be a whole number from 1 to {MAX_RANK}")
    return value


def _number(key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_ALPHA:
        raise _refusal(key, value, f"it must be a number between -{MAX_ALPHA:g} and {MAX_ALPHA:g}")
    return float(value)


def _check_length(key: str, values: Collection[Any], limit: int) -> None:
    if len(values) > limit:
        raise AdapterError(
            f"{CONFIG_FILE}: {key} has {len(values)} entries; at most {limit} are read: give one"
            " name or regular expression to modules that are alike"
        )


def _check_expressions(key: str, names: Iterable[str], expression: Callable[[str], str]) -> None:
    """Each by itself, and all together: each is matched with every module."""
    ways = 0
    for name in names:
        ways += _check_expression(f"{key}[{shortened(name)}]", expression(name))
        if ways > MAX_LIST_WAYS:
            raise AdapterError(
                f"{CONFIG_FILE}: {key} has regular expressions that together may take too long to"
                " match; give simpler ones, or names"
            )


def _check_expression(key: str, expression: str) -> int:
    """How many ways there are through a valid expression."""
    try:
        ways = num_ways(expression)
        if ways > MAX_WAYS:
            raise AdapterError(
                f"{CONFIG_FILE}: {key} is a regular expression that may take too long to match;"
                " give a simpler one, or a list of names"
            )
        module_selection.compiled(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{CONFIG_FILE}: {key} is not a valid regular expression: {one_line(str(error))}"
        ) from None
    return ways


def _refusal(key: str, value: Any, reason: str) -> AdapterError:
    return AdapterError(f"{CONFIG_FILE}: {one_line(key)} is {shortened(value)}: {reason}")
