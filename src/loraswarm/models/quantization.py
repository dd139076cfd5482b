"""How a base's matrices are kept as integers: by our option, or as the checkpoint already has them.

Reads `quantization_config` of config.json, as AutoGPTQ, GPTQModel, AutoAWQ and transformers write
it; knows no tensors. Called by engine/setup; the result says models/quantized what to do.

    option int8    linears and lm_head: 8 bits, one scale a row
    option int4    linears: 4 bits in groups of 128, 64 or 32 inputs; lm_head: 8 bits, because an
                   error there is an error of the logits
    gptq, awq      linears as stored; lm_head as floats, which such checkpoints keep it in

Embedding, norms and biases stay floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loraswarm.config import Quantize
from loraswarm.models.config_keys import ConfigKeys

SECTION = "quantization_config"
WHOLE_WIDTH = -1
GROUP_MULTIPLE = 32
GPTQ_FORMATS = ("gptq", "gptq_v2")

_SHARED_KEYS = {"quant_method", "bits", "group_size", "lm_head", "pack_dtype", "dynamic"}
_GPTQ_KEYS = _SHARED_KEYS | {
    "sym",
    "desc_act",
    "checkpoint_format",
    "format",
    "is_marlin_format",
    "modules_in_block_to_quantize",
}
_AWQ_KEYS = _SHARED_KEYS | {"version", "format", "zero_point", "modules_to_not_convert"}
# How the integers were found, and which kernels others run; the tensors mean the same.
_INERT_KEYS = {
    "act_group_aware",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "hyb_act",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_to_fuse",
    "mse",
    "pack_impl",
    "pad_token_id",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What the matrices are made from, and how.

    The other fields are those of stored integers: `group_size` inputs share a scale, WHOLE_WIDTH:
    all; `is_symmetric`: every zero point is the middle; `zeros_are_less_one`: zero points are
    stored less one, as in the first GPTQ format.
    """

    method: Literal["int8", "int4", "gptq", "awq"]
    bits: int = 0
    group_size: int = WHOLE_WIDTH
    is_symmetric: bool = False
    zeros_are_less_one: bool = False

    @property
    def is_stored(self) -> bool:
        """Whether the checkpoint holds integers."""
        return self.method in ("gptq", "awq")


def quantization_of(config: Mapping[str, Any], quantize: Quantize | None) -> Quantization | None:
    """What to do for this config.json and this option; None: keep floats.

    Raises    ConfigError naming the key, its value and what is allowed; also for the option with a
              checkpoint that is quantized already.
    """
    section = config.get(SECTION)
    if section is None:
        return None if quantize is None else Quantization(method=quantize)
    keys = ConfigKeys(config)
    if quantize is not None:
        raise keys.refusal(SECTION, section, f"absent with --quantize {quantize}")
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    if method not in ("gptq", "awq"):
        raise keys.refusal(SECTION, section, "absent, or have a quant_method of 'gptq' or 'awq'")
    return _gptq(section) if method == "gptq" else _awq(section)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model in floats, for those who read its sizes alone."""
    return {key: value for key, value in config.items() if key != SECTION}


def _gptq(section: Mapping[str, Any]) -> Quantization:
    keys = _shared(section, _GPTQ_KEYS)
    bits = keys.size("bits")
    if bits not in (4, 8):
        raise keys.refusal("bits", bits, "4 or 8")
    stored_as = section.get("checkpoint_format") or section.get("format") or GPTQ_FORMATS[0]
    if stored_as not in GPTQ_FORMATS:
        raise keys.refusal("checkpoint_format", stored_as, " or ".join(map(repr, GPTQ_FORMATS)))
    keys.require("is_marlin_format", False, default=False)
    keys.require("modules_in_block_to_quantize", None)
    keys.flag("desc_act")  # g_idx says what it means
    return Quantization(
        method="gptq",
        bits=bits,
        group_size=_group_size(section, keys),
        is_symmetric=keys.flag("sym"),
        zeros_are_less_one=stored_as == GPTQ_FORMATS[0],
    )


def _awq(section: Mapping[str, Any]) -> Quantization:
    keys = _shared(section, _AWQ_KEYS)
    keys.require("bits", 4)
    version = section.get("version") or section.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise keys.refusal("version", version, "'gemm'")
    keys.require("zero_point", True, default=True)
    if section.get("modules_to_not_convert"):
        keys.require("modules_to_not_convert", None)
    return Quantization(method="awq", bits=4, group_size=_group_size(section, keys))


def _shared(section: Mapping[str, Any], known: set[str]) -> ConfigKeys:
    """The section's keys, those that both methods have checked."""
    keys = ConfigKeys(section, f"{SECTION} of config.json")
    for key in sorted(section.keys() - known - _INERT_KEYS):
        raise keys.refusal(key, section[key], "absent; its meaning is not known")
    keys.require("lm_head", False, default=False)
    keys.require("pack_dtype", "int32", default="int32")
    if section.get("dynamic"):
        keys.require("dynamic", None)
    return keys


def _group_size(section: Mapping[str, Any], keys: ConfigKeys) -> int:
    value = section.get("group_size")
    if value == WHOLE_WIDTH and type(value) is int:
        return WHOLE_WIDTH
    size = keys.size("group_size")
    if size % GROUP_MULTIPLE:
        raise keys.refusal("group_size", size, f"-1 or a multiple of {GROUP_MULTIPLE}")
    return size
