"""Fills a decoder's weights from a safetensors checkpoint: all of them, exactly, or not at all.

Checks names, shapes and dtypes of every tensor before the first is read. Each tensor is copied from
the mapped file straight into its slice of the fused weight, so the peak is one copy of the weights.
Called by engine/setup; models/quantized/loading takes its checks for integers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from loraswarm.errors import ConfigError
from loraswarm.models.checkpoint import StoredTensor, open_tensors, stored_tensors
from loraswarm.models.config import DecoderConfig
from loraswarm.models.config_keys import DTYPE_NAMES, ConfigKeys
from loraswarm.models.decoder import Decoder
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.weight import can_pack

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_logger = logging.getLogger(__name__)
Report = Callable[[str], None]


def load_decoder(
    path: Path, config: DecoderConfig, backend: Backend, report: Report = _logger.info
) -> Decoder:
    """A decoder with the weights of the checkpoint in directory `path`.

    Any float dtype is converted to the backend's. On a terminal a bar shows the progress; elsewhere
    `report` gets one line a file. Only `rotary_emb.inv_freq` of old checkpoints, which config.json
    determines, is left out.

    Cost      memory: the weights once, and one of them twice while it is packed; time: reading the
              files once.
    Raises    ConfigError naming the tensor or file: missing, unexpected, of another shape, not of a
              float dtype, too large for float16; or a tied model's lm_head.weight that differs.
    """
    decoder = Decoder(backend, config)
    _fill(decoder, path, report)
    if backend.device.type == "cuda" or can_pack(backend.dtype, backend.device):
        # Either all: what torch computes and what kernels record must not alternate, since memory
        # of torch's own is not kept for what is recorded.
        is_even = all(weight.rows.shape[1] % 2 == 0 for weight in decoder.matrices())
        is_kernels_own = is_even or backend.device.type == "cuda"
        for weight in tqdm(decoder.matrices(), desc="packing", disable=None):
            weight.pack_(backend.kernels if is_kernels_own else None)
    decoder.share_head()
    return decoder


def checkpoint_dtype(path: Path, config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that `--dtype auto` means: config.json's, else that of the stored embeddings.

    Raises    ConfigError naming the dtype, if it is none of float32, bfloat16 and float16.
    """
    name = ConfigKeys(config).dtype_name()
    if name is not None:
        return _named_dtype(name)
    stored = stored_tensors(path).get(EMBEDDING)
    if stored is None:
        raise ConfigError(f"{path} has no tensor {EMBEDDING!r}")
    dtype = FLOAT_DTYPES.get(stored.dtype)
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise ConfigError(
            f"tensor {EMBEDDING!r} is {stored.dtype} and config.json names no dtype; "
            f"choose one with --dtype: {', '.join(DTYPE_NAMES)}"
        )
    return _named_dtype(name)


def stored_weights(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint that a decoder may have a place for, by name."""
    return {
        name: tensor
        for name, tensor in stored_tensors(path).items()
        if not name.endswith("rotary_emb.inv_freq")
    }


def _fill(decoder: Decoder, path: Path, report: Report) -> None:
    stored = stored_weights(path)
    targets = dict(decoder.weights())
    is_tied = decoder.config.ties_embeddings
    check_names(path, stored.keys(), targets.keys(), is_tied)
    for name, target in targets.items():
        check_tensor(name, stored[name], target)
    if is_tied and LM_HEAD in stored:
        check_tied(stored)
    copy_tensors(stored, targets, report)


def _named_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_names(path: Path, stored: Set[str], expected: Set[str], ties_embeddings: bool) -> None:
    """Raise ConfigError for a name of one set that is not in the other; a tied lm_head may be."""
    missing = sorted(expected - stored)
    if missing:
        advice = ""
        if missing == [LM_HEAD]:
            advice = "; set tie_word_embeddings in config.json if it shares the embeddings"
        raise ConfigError(f"{path} lacks tensor {_first_of(missing)}{advice}")
    allowed = expected | {LM_HEAD} if ties_embeddings else expected
    unexpected = sorted(stored - allowed)
    if unexpected:
        raise ConfigError(
            f"{path} holds tensor {_first_of(unexpected)}, which config.json has no place for"
        )


def _first_of(names: list[str]) -> str:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{others}"


def check_tensor(name: str, stored: StoredTensor, target: Tensor) -> None:
    """Raise ConfigError unless `stored` holds floats of the shape of `target`."""
    if stored.dtype not in FLOAT_DTYPES:
        raise ConfigError(
            f"tensor {name!r} is {stored.dtype}; weights must be one of {', '.join(FLOAT_DTYPES)} "
            "(integers are served where quantization_config in config.json says what they mean)"
        )
    if stored.shape != tuple(target.shape):
        raise ConfigError(
            f"tensor {name!r} has shape {list(stored.shape)}; config.json calls for "
            f"{list(target.shape)}"
        )


def check_tied(stored: Mapping[str, StoredTensor]) -> None:
    """Raise ConfigError unless the stored lm_head and embedding are equal."""
    with (
        open_tensors(stored[LM_HEAD].file) as head_reader,
        open_tensors(stored[EMBEDDING].file) as embedding_reader,
    ):
        head, embedding = head_reader.get_tensor(LM_HEAD), embedding_reader.get_tensor(EMBEDDING)
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise ConfigError(
                f"tie_word_embeddings is true in config.json, but {LM_HEAD!r} differs from "
                f"{EMBEDDING!r}; set it to false if the model was trained with both"
            )


def copy_tensors(
    stored: Mapping[str, StoredTensor], targets: Mapping[str, Tensor], report: Report
) -> None:
    """Copy the tensors of these names to their targets, file by file, with a bar or lines."""
    names = sorted(targets, key=lambda name: stored[name].file)
    total = sum(target.nbytes for target in targets.values())
    with tqdm(desc="weights", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for file, group in groupby(names, key=lambda name: stored[name].file):
            num_bytes = 0
            with open_tensors(file) as reader:
                for name in group:
                    copy_tensor(name, reader.get_tensor(name), targets[name])
                    num_bytes += targets[name].nbytes
                    bar.update(targets[name].nbytes)
            if bar.disable:
                report(f"loaded file={file.name} bytes={num_bytes} total_bytes={total}")


def copy_tensor(name: str, source: Tensor, target: Tensor) -> None:
    """Copy and convert. Raises ConfigError for what float16 cannot hold."""
    target.copy_(source)
    if target.dtype == torch.float16 and not bool(target.isfinite().all()):
        raise ConfigError(
            f"tensor {name!r} has values that float16 cannot hold (limit 65504); "
            "use --dtype bfloat16 or float32"
        )
