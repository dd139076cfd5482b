"""`loraswarm adapters`: says what adapters are and whether they can be served; converts them.

An adapter is checked against the model that is given, else against the one it names if that is a
local directory, else against what its own tensors tell.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.adapters.config_keys import ConfigKeys
from loraswarm.adapters.describing import refusal_reason
from loraswarm.adapters.local_store import adapter_paths, check_entry
from loraswarm.adapters.methods import method_of
from loraswarm.adapters.printable import quoted
from loraswarm.adapters.reading import describe, read_adapter
from loraswarm.adapters.source import NEMO_SUFFIX, AdapterSource, errors_name, open_source
from loraswarm.adapters.stores import printable
from loraswarm.commands.adapter_base import CheckedBase, WeightsNotAtHand
from loraswarm.commands.adapter_path import adapter_path
from loraswarm.commands.adapter_report import CheckedAdapter, as_json, as_table, facts_of
from loraswarm.config import DTYPES
from loraswarm.errors import ConfigError
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.tile_layout import adapter_bytes
from loraswarm.models.source import CONFIG_FILES, MODEL_FILES, resolve_model

WIDTH_OF_FILES = 200  # columns where the output is no terminal
NEEDS_SHAPE = "its tensors do not tell what base it fits"
NEEDS_WEIGHTS = "its update depends on the weights of the base"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """`model` and `dtype` as on the command line; without `reads_weights`, headers only."""

    model: str | None = None
    dtype: str = "auto"
    reads_weights: bool = True


class _Found(NamedTuple):
    """An absolute path; `is_given` if it is a .nemo file that was named itself."""

    path: Path
    is_given: bool


def check(paths: Sequence[str], options: CheckOptions, is_json: bool) -> int:
    """Print what was found under `paths`; the exit code is 1 if any adapter is refused.

    Raises    ConfigError for a path that holds no adapters, for the model and the dtype.
    """
    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype is {options.dtype!r}; it must be one of {', '.join(DTYPES)}")
    adapters = [adapter for path in paths for adapter in _adapters(path)]
    with ExitStack() as closing:
        given = None
        if options.model is not None:
            files = MODEL_FILES if options.reads_weights else CONFIG_FILES
            base = CheckedBase.of_model(resolve_model(options.model, files), options.dtype)
            given = closing.enter_context(base)
        progress = tqdm(adapters, desc="checking", disable=None, leave=False)
        rows = [_check(found, given, options) for found in progress]
    width = shutil.get_terminal_size((WIDTH_OF_FILES, 0)).columns
    print(as_json(rows) if is_json else as_table(rows, width))
    return int(any(row.verdict == "refused" for row in rows))


def convert(source: str, out: str) -> None:
    """Write the adapter at `source`, of any format, as a directory that PEFT loads."""
    from loraswarm.adapters.convert import convert_to_peft

    convert_to_peft(adapter_path(source), Path(out))
    print(f"wrote {printable(out)}")


def _adapters(path: str) -> list[_Found]:
    """`path` itself if it is a .nemo file, else what the server would find there."""
    if path.endswith(NEMO_SUFFIX) and os.path.isfile(path):
        return [_Found(Path(os.path.abspath(path)), True)]
    found = [_Found(item, False) for item in adapter_paths(path)]
    if not found:
        raise ConfigError(f"{path!r} holds no adapters")
    return found


def _check(found: _Found, given: CheckedBase | None, options: CheckOptions) -> CheckedAdapter:
    """The verdict on one adapter, and what is known about it."""
    path = found.path
    name = printable(path.stem if found.is_given else path.name)
    row = CheckedAdapter(name=name, path=path, verdict="needs --model")
    try:
        if not found.is_given:
            check_entry(path)
        with errors_name(row.name), open_source(path) as source:
            base = given or _base_of(source, options)
            if base is None:
                return replace(row, reason=NEEDS_SHAPE)
            info = describe(source, path, row.name, base.shape)
    except ConfigError as error:
        return replace(row, reason=f"the base that it names: {error}")
    except Exception as error:  # whatever is in a file, it must harm its own adapter only
        return _refused(row, error)
    if base is given:
        return _check_weights(row, info, base, options)
    try:
        with base:
            return _check_weights(row, info, base, options)
    except ConfigError as error:
        return replace(row, reason=f"the base that it names: {error}")


def _check_weights(
    row: CheckedAdapter, info: AdapterInfo, base: CheckedBase, options: CheckOptions
) -> CheckedAdapter:
    """The verdict on an adapter whose headers are right."""
    row = replace(row, base=None if base.path is None else str(base.path))
    try:
        geometry = page_geometry(base.shape, 4 if base.dtype_name == "float32" else 2)
        num_bytes = adapter_bytes(info, base.shape, geometry)
        row = replace(row, facts=facts_of(info, base.shape, num_bytes))
        if options.reads_weights:
            # Imported here: headers are checked without torch.
            import torch

            read_adapter(info, base, getattr(torch, base.dtype_name))
    except WeightsNotAtHand:
        return replace(row, reason=NEEDS_WEIGHTS)
    except ConfigError:
        raise  # the base is at fault
    except Exception as error:  # as above
        return _refused(row, error)
    return replace(row, verdict="ok")


def _base_of(source: AdapterSource, options: CheckOptions) -> CheckedBase | None:
    method_of(ConfigKeys.parse(source.config))  # what no base can serve is refused without one
    return CheckedBase.of_adapter(source, options.dtype)


def _refused(row: CheckedAdapter, error: Exception) -> CheckedAdapter:
    """Refused with the message, without the adapter's name, which stands beside it."""
    reason = refusal_reason(row.name, error).removeprefix(f"adapter {quoted(row.name)}: ")
    return replace(row, verdict="refused", reason=reason)
