"""Reads single keys of a checkpoint's config.json, each with its type, its default and its refusal.

Knows both spellings of transformers (4: `rope_theta`, `rope_scaling`, `torch_dtype`; 5:
`rope_parameters`, `dtype`) and no family. Used by models/families.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loraswarm.errors import ConfigError
from loraswarm.models.config import Llama3Scaling

DTYPE_NAMES = ("float32", "bfloat16", "float16")
DEFAULT_ROPE_THETA = 10_000.0
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"

_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LLAMA3_KEYS = {
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}
_REQUIRED = object()


class ConfigKeys:
    """One config.json, read key by key.

    A key that is absent takes the default given, or is refused without one. A null counts as a
    value: it is accepted only where a method says so.

    Raises    ConfigError naming the key, its value and what is allowed; from every method.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self._config = config
        self._where = where

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number >= 1."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(key, value, "a whole number >= 1")
        return value

    def count(self, key: str, default: int) -> int:
        """A whole number >= 0."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.refusal(key, value, "a whole number >= 0")
        return value

    def optional_size(self, key: str, default: int | None) -> int | None:
        """A whole number >= 1, or null."""
        if self._get(key, default) is None:
            return None
        return self.size(key, default)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number > 0."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refusal(key, value, "a number > 0")
        if not math.isfinite(value) or value <= 0:
            raise self.refusal(key, value, "a number > 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def require(self, key: str, expected: Any, default: Any = None) -> None:
        """Refuse any value but the one we compute with; null and absent count as `default`."""
        value = self._config.get(key)
        if value is None:
            value = default
        if value != expected:
            raise self.refusal(key, value, "absent" if expected is None else repr(expected))

    def layer_types(self, num_layers: int) -> list[str] | None:
        """One attention type a layer, or None where the checkpoint leaves it to other keys."""
        names = self._config.get("layer_types")
        if names is None:
            return None
        known = (FULL_ATTENTION, SLIDING_ATTENTION)
        if not isinstance(names, list) or any(name not in known for name in names):
            raise self.refusal("layer_types", names, f"a list of {' and '.join(known)}")
        if len(names) != num_layers:
            raise self.refusal("layer_types", names, f"a list of {num_layers} names")
        return names

    def rope(self) -> tuple[float, Llama3Scaling | None]:
        """Base of the rope frequencies and their scaling.

        `rope_scaling` wins over `rope_parameters`, and a `rope_theta` inside either over the one
        beside it, as in transformers.
        """
        self.require("partial_rotary_factor", 1.0, default=1.0)
        section = "rope_scaling" if self._config.get("rope_scaling") else "rope_parameters"
        values = self._config.get(section) or {}
        if not isinstance(values, Mapping):
            raise self.refusal(section, values, "an object or null")
        keys = ConfigKeys(values, f"{section} of {self._where}")
        rope_type = values.get("rope_type", values.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise keys.refusal("rope_type", rope_type, "'default' or 'llama3'")
        keys.require("partial_rotary_factor", 1.0, default=1.0)
        known = _ROPE_KEYS if rope_type == "default" else _ROPE_KEYS | _LLAMA3_KEYS
        for key in sorted(set(values) - known):
            raise keys.refusal(key, values[key], f"absent for rope_type {rope_type!r}")
        theta = keys.number("rope_theta", self.number("rope_theta", DEFAULT_ROPE_THETA))
        return theta, keys._llama3() if rope_type == "llama3" else None

    def dtype_name(self) -> str | None:
        """Name of the dtype the checkpoint was saved in; None if config.json does not say."""
        key = "dtype" if self._config.get("dtype") is not None else "torch_dtype"
        name = self._config.get(key)
        if name is not None and name not in DTYPE_NAMES:
            raise self.refusal(key, name, f"one of {', '.join(DTYPE_NAMES)}")
        return name

    def refusal(self, key: str, value: object, allowed: str) -> ConfigError:
        """The error for a value we do not compute with."""
        shown = "null" if value is None else repr(value)
        return ConfigError(f"{key} is {shown} in {self._where}; it must be {allowed}")

    def _llama3(self) -> Llama3Scaling:
        low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
        if high <= low:
            raise self.refusal("high_freq_factor", high, f"more than low_freq_factor, {low:g}")
        return Llama3Scaling(
            factor=self.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=self.size("original_max_position_embeddings"),
        )

    def _get(self, key: str, default: Any) -> Any:
        value = self._config.get(key, default)
        if value is _REQUIRED:
            raise ConfigError(f"{self._where} has no {key!r}; a checkpoint of this kind needs it")
        return value
