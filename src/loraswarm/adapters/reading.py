"""An adapter's files to an adapter: first its description from headers, later its weights.

Owns the rule that a described file is the file that is read. Knows formats only through
adapters/source and methods only through adapters/methods. Called by the catalog and by whoever
loads weights.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraswarm.adapters.adapter import Adapter, AdapterInfo, BaseWeights
from loraswarm.adapters.config_keys import ConfigKeys
from loraswarm.adapters.methods import method_of
from loraswarm.adapters.plan import check_tensors
from loraswarm.adapters.source import AdapterSource, errors_name, open_source
from loraswarm.core.base_shape import BaseShape
from loraswarm.errors import AdapterError

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger(__name__)


def read_adapter_info(path: Path, name: str, shape: BaseShape) -> AdapterInfo:
    """Describe the adapter in directory `path`, from its config and the header of its weights.

    Cost      two small reads; no torch; under a millisecond for 336 tensors of a known recipe.
    Raises    AdapterError naming the adapter and the key, tensor or file that is wrong.
    """
    with errors_name(name), open_source(path) as source:
        return describe(source, path, name, shape)


def describe(source: AdapterSource, path: Path, name: str, shape: BaseShape) -> AdapterInfo:
    """`read_adapter_info` of files that are open already; errors do not name the adapter."""
    keys = ConfigKeys.parse(source.config)
    plan = method_of(keys).plan(keys, shape, source)
    check_tensors(plan, source.label, source.tensors)
    return AdapterInfo(
        name=name,
        path=path,
        digest=source.digest(),
        method=plan.method,
        modules=plan.modules,
        num_bytes=source.num_bytes,
        overlays=plan.overlays,
        invocation_tokens=plan.invocation_tokens,
        file_format=source.file_format,
        plan=plan,
    )


def read_adapter(info: AdapterInfo, base: BaseWeights, dtype: torch.dtype) -> Adapter:
    """Read the weights of a described adapter into host memory of our own, in `dtype`.

    The file may be replaced or overwritten at any time: weights are copied, never mapped, and are
    those that `info` describes, or none.

    Raises    AdapterError naming the adapter and the tensor, for NaN, infinity or a value that
              `dtype` cannot hold, and for files that have changed since they were described.
    """
    # Imported here: describing adapters must not need torch.
    from loraswarm.adapters.tensors import TensorReader

    with errors_name(info.name), open_source(info.path) as source:
        _require_unchanged(info, source)
        keys, plan = ConfigKeys.parse(source.config), info.plan
        assert plan is not None, "the info was not made by describe"
        if plan.advice:
            _logger.warning("adapter loads slowly name=%r advice=%r", info.name, plan.advice)
        weights = method_of(keys).read(plan, keys, TensorReader(source, dtype), base)
        _require_unchanged(info, source)
        return Adapter(info, weights.modules, weights.overlays, weights.shared)


def stamped(info: AdapterInfo, stamp: str) -> AdapterInfo:
    """The description of what a store found with `stamp`, as the identity of a generation.

    Files that were replaced have another stamp even if header, size and times are the same.
    `read_adapter` takes the description as it was before.
    """
    digest = hashlib.blake2b(f"{info.digest} {stamp}".encode(), digest_size=16)
    return replace(info, digest=digest.hexdigest())


def _require_unchanged(info: AdapterInfo, source: AdapterSource) -> None:
    if source.digest() != info.digest:
        raise AdapterError("its files have changed since the adapter was described; scan again")
