"""What serving costs on one machine with one base model, as measured.

Plain numbers and the file of `loraswarm bench calibrate` that holds them; no torch. Read by
engine/setup for memory/costs, and by whoever predicts steps without taking them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from loraswarm.core.step_cost import StepCosts, StepWork
from loraswarm.core.typed_json import from_json, refuse
from loraswarm.errors import ConfigError

FORMAT = "loraswarm-cost-model"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCosts:
    """Seconds to bring an adapter of some bytes from one tier to the next."""

    fixed_s: float
    byte_s: float

    def seconds_for(self, num_bytes: float) -> float:
        return self.fixed_s + self.byte_s * num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmRate:
    """Products of `num_rows` rows by every matrix of one kind in turn, as the model has them.

    A multiplication and an addition are two operations.
    """

    linear: str
    num_rows: int
    operations_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """Of all threads: summing a large array; copying one, whose bytes count once; products."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    gemm: tuple[GemmRate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """How far `step_s` is from what was measured, as shares of it, over `num_points` steps."""

    num_points: int
    median_error: float
    worst_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFigures:
    """One machine, one base model, one number of threads.

    `load` brings an adapter of so many packed bytes from its store to host memory, `copy` from
    there to its pages. `merge_s` are the seconds to merge one into all linears; None if none
    can be: integers, no memory for copies, updates that are too large. `kv_token_bytes` are K and
    V of a token. `fitted` are the residuals of the steps that the figures were fitted to, `checked`
    of others.
    """

    model: str
    dtype: str
    quantize: str | None
    num_threads: int
    weight_bytes: int
    kv_token_bytes: int
    step: StepCosts
    load: TransferCosts
    copy: TransferCosts
    merge_s: float | None
    machine: MachineRates
    fitted: Residuals
    checked: Residuals
    created: str
    environment: Mapping[str, Any]

    def step_s(self, work: StepWork) -> float:
        """Seconds of a step; what they are the sum of: `StepCosts`."""
        return self.step.step_s(work)

    def load_s(self, num_bytes: float) -> float:
        """Seconds from the store to host memory, for an adapter of so many packed bytes."""
        return self.load.seconds_for(num_bytes)

    def copy_s(self, num_bytes: float) -> float:
        """Seconds from host memory into pages, for an adapter of so many packed bytes."""
        return self.copy.seconds_for(num_bytes)

    def write(self, path: str | Path) -> None:
        """Write the file that `read` reads. Raises ConfigError if it cannot be written."""
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        try:
            text = json.dumps(document, indent=2, allow_nan=False) + "\n"
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {str(path)!r}: {error.strerror or error}") from None

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The figures in a file of `loraswarm bench calibrate`.

        Raises   ConfigError naming the file and the field: another format, a field that is missing
                 or unknown, a figure that is negative or no finite number.
        """
        try:
            return cls.from_document(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{str(path)!r} is no cost model of `loraswarm bench calibrate`: {error}"
            ) from None

    @classmethod
    def from_document(cls, document: object) -> Self:
        """From the plain values of a file. Raises ValueError naming the field."""
        figures = from_json(cls, _without_format(document))
        _check_step(figures.step)
        return figures


def _without_format(document: object) -> dict[str, Any]:
    if not isinstance(document, dict):
        refuse("the document", document, "an object")
    found = dict(document)
    if (name := found.pop("format", None)) != FORMAT:
        refuse("format", name, repr(FORMAT))
    if (version := found.pop("format_version", None)) != FORMAT_VERSION:
        refuse("format_version", version, str(FORMAT_VERSION))
    return found


def _check_step(step: StepCosts) -> None:
    is_ascending = list(step.brackets) == sorted(set(step.brackets))
    if not step.brackets or step.brackets[0] != 0 or not is_ascending:
        refuse("step.brackets", step.brackets, "ascending from 0")
    if len(step.token_s) != len(step.brackets):
        refuse("step.token_s", step.token_s, f"{len(step.brackets)} figures, one per bracket")
    if step.step_s(StepWork(num_tokens=1, num_logit_rows=0)) <= 0.0:
        refuse("step.fixed_s", step.fixed_s, "above 0 where a token takes no time")
