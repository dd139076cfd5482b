"""LoRASwarm: serve a swarm of LoRA adapters from one base model, in one batch.

    from loraswarm import LLM, SamplingParams

Importing this package is cheap: LLM brings torch only when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraswarm.core.request import SamplingParams
from loraswarm.errors import (
    AdapterError,
    ConfigError,
    EngineError,
    InvalidRequest,
    LoRASwarmError,
    Overloaded,
    UnknownAdapter,
)

if TYPE_CHECKING:
    from loraswarm.llm import LLM, GenerationOutput

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AdapterError",
    "ConfigError",
    "EngineError",
    "GenerationOutput",
    "InvalidRequest",
    "LoRASwarmError",
    "Overloaded",
    "SamplingParams",
    "UnknownAdapter",
]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "GenerationOutput"):
        from loraswarm import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
