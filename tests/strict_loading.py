"""What strict loading refuses: adapters with something changed, and the message they meet.

Knows files, no methods.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from adapter_factory import CONFIG_FILE, WEIGHTS_FILE, shape_of, write_adapter
from loraswarm.adapters.reading import read_adapter_info
from loraswarm.errors import AdapterError


def changed(
    source: Path,
    out: Path,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], object] | None = None,
) -> Path:
    """A copy of an adapter with other values for some keys, and its tensors edited in place."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    values = json.loads((out / CONFIG_FILE).read_text()) | (config or {})
    weights = load_file(out / WEIGHTS_FILE)
    if tensors is not None:
        tensors(weights)
    return write_adapter(out, values, weights)


def refusal(model: PreTrainedModel, path: Path) -> str:
    """What describing the adapter is refused with: one line of bounded length."""
    with pytest.raises(AdapterError) as caught:
        read_adapter_info(path, "a", shape_of(model))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message
