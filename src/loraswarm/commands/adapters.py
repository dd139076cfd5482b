"""`loraswarm adapters`: says what adapters are and whether they can be served; converts them.

An adapter is checked against the model that is given, else against the one it names if that is a
local directory, else against what its own tensors tell.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.adapters.config_keys import CONFIG_FILE, ConfigKeys
from loraswarm.adapters.methods import method_of
from loraswarm.adapters.reading import describe, read_adapter
from loraswarm.adapters.source import AdapterSource, errors_name, open_source
from loraswarm.commands.adapter_base import CheckedBase, WeightsNotAtHand
from loraswarm.commands.adapter_report import CheckedAdapter, as_json, as_table, facts_of
from loraswarm.config import DTYPES
from loraswarm.errors import AdapterError, ConfigError
from loraswarm.memory.geometry import page_geometry
from loraswarm.memory.tile_layout import adapter_bytes
from loraswarm.models.source import CONFIG_FILES, MODEL_FILES, resolve_model

ADAPTER_FILES = (CONFIG_FILE, "adapter_model.*", "*.nemo")
WIDTH_OF_FILES = 200  # columns where the output is no terminal
NEEDS_SHAPE = "its tensors do not tell what base it fits"
NEEDS_WEIGHTS = "its update depends on the weights of the base"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """`model` and `dtype` as on the command line; without `reads_weights`, headers only."""

    model: str | None = None
    dtype: str = "auto"
    reads_weights: bool = True


def check(paths: Sequence[str], options: CheckOptions, is_json: bool) -> int:
    """Print what was found under `paths`; the exit code is 1 if any adapter is refused.

    Raises    ConfigError for a path that holds no adapters, for the model and the dtype.
    """
    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype is {options.dtype!r}; it must be one of {', '.join(DTYPES)}")
    adapters = [adapter for path in paths for adapter in _adapters(Path(path))]
    with ExitStack() as closing:
        given = None
        if options.model is not None:
            files = MODEL_FILES if options.reads_weights else CONFIG_FILES
            base = CheckedBase.of_model(resolve_model(options.model, files), options.dtype)
            given = closing.enter_context(base)
        progress = tqdm(adapters, desc="checking", disable=None, leave=False)
        rows = [_check(path, given, options) for path in progress]
    width = shutil.get_terminal_size((WIDTH_OF_FILES, 0)).columns
    print(as_json(rows) if is_json else as_table(rows, width))
    return int(any(row.verdict == "refused" for row in rows))


def convert(source: str, out: str) -> None:
    """Write the adapter at `source`, of any format, as a directory that PEFT loads."""
    from loraswarm.adapters.convert import convert_to_peft

    if not os.path.exists(source):
        raise ConfigError(f"{source!r} does not exist; give an adapter's directory or .nemo file")
    convert_to_peft(Path(source), Path(out))
    print(f"wrote {out}")


def _adapters(path: Path) -> Iterator[Path]:
    """`path` itself if it is an adapter, else the directories in it, hidden ones left out."""
    if path.is_file() and path.suffix == ".nemo":
        yield path
        return
    if not path.is_dir():
        problem = "is neither a directory nor a .nemo file" if path.exists() else "does not exist"
        raise ConfigError(
            f"{str(path)!r} {problem}; give an adapter, or a directory that holds one directory"
            " per adapter"
        )
    try:
        items = sorted(path.iterdir())
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    if any(fnmatch(item.name, pattern) for item in items for pattern in ADAPTER_FILES):
        yield path
        return
    # A link that leads nowhere is among them, so that it is reported instead of being overlooked.
    found = [
        item
        for item in items
        if not item.name.startswith(".")
        and (item.is_dir() or (item.is_symlink() and not item.is_file()))
    ]
    if not found:
        raise ConfigError(f"{str(path)!r} holds no adapters")
    yield from found


def _check(path: Path, given: CheckedBase | None, options: CheckOptions) -> CheckedAdapter:
    """The verdict on one adapter, and what is known about it."""
    row = CheckedAdapter(name=_name(path), path=path, verdict="needs --model")
    try:
        with errors_name(row.name), open_source(path) as source:
            base = given or _base_of(source, options)
            if base is None:
                return replace(row, reason=NEEDS_SHAPE)
            info = describe(source, path, row.name, base.shape)
    except AdapterError as error:
        return replace(row, verdict="refused", reason=_reason(error, row.name))
    except ConfigError as error:
        return replace(row, reason=f"the base that it names: {error}")
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
    geometry = page_geometry(base.shape, 4 if base.dtype_name == "float32" else 2)
    facts = facts_of(info, base.shape, adapter_bytes(info, base.shape, geometry))
    label = None if base.path is None else str(base.path)
    row = replace(row, facts=facts, base=label)
    if options.reads_weights:
        # Imported here: headers are checked without torch.
        import torch

        try:
            read_adapter(info, base, getattr(torch, base.dtype_name))
        except AdapterError as error:
            return replace(row, verdict="refused", reason=_reason(error, row.name))
        except WeightsNotAtHand:
            return replace(row, reason=NEEDS_WEIGHTS)
    return replace(row, verdict="ok")


def _base_of(source: AdapterSource, options: CheckOptions) -> CheckedBase | None:
    method_of(ConfigKeys.parse(source.config))  # what no base can serve is refused without one
    return CheckedBase.of_adapter(source, options.dtype)


def _name(path: Path) -> str:
    """The name under which the adapter would be served, with what cannot be shown escaped."""
    absolute = Path(os.path.abspath(path))
    name = absolute.stem if path.is_file() else absolute.name
    return name if name.isprintable() else ascii(name)[1:-1]


def _reason(error: AdapterError, name: str) -> str:
    """The message without the adapter's name, which stands beside it."""
    return str(error).removeprefix(f"adapter {name!r}: ")
