"""YAML that can neither run code nor grow: plain values without tags or aliases, bounded depth and
size.

Knows nothing about what the values mean. Called by adapters/nemo_config.
"""

from __future__ import annotations

from typing import Any

import yaml

from loraswarm.adapters.printable import one_line, quoted
from loraswarm.errors import AdapterError

try:
    from yaml import CSafeLoader as _SafeLoader
except ImportError:
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

MAX_YAML_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_EVENTS = 50_000
# A number in base 60 takes time with the square of its length.
MAX_PLAIN_CHARACTERS = 10_000
# What the constructors of values raise for text that only looks like a number or a date.
_ERRORS = (
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _StrictLoader(_SafeLoader):
    """Refuses a mapping that names a key twice, where YAML libraries take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.YAMLError(f"key {quoted(key.value)} stands there twice")
            names.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def read_yaml(text: bytes, label: str) -> dict[str, Any]:
    """The mapping that a whole YAML document is.

    Raises    AdapterError naming `label` and what is wrong.
    """
    if len(text) > MAX_YAML_BYTES:
        raise AdapterError(f"{label} has {len(text)} bytes; at most {MAX_YAML_BYTES}")
    try:
        _check_events(text)
        values = yaml.load(text, Loader=_StrictLoader)
    except _ERRORS as error:
        reason = one_line(" ".join(str(error).split()), 240)
        raise AdapterError(f"{label} cannot be read as YAML: {reason}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{label} is not a YAML mapping")
    return values


def _check_events(text: bytes) -> None:
    """Before anything is built: an alias may stand for a structure of exponential size."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read; write the values out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise yaml.YAMLError(f"the tag {quoted(tag)} is not read; write a plain value")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
            if len(event.value) > MAX_PLAIN_CHARACTERS:
                raise yaml.YAMLError(f"a value has more than {MAX_PLAIN_CHARACTERS} characters")
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH or count > MAX_EVENTS:
            raise yaml.YAMLError(f"it has more than {MAX_DEPTH} levels or {MAX_EVENTS} items")
