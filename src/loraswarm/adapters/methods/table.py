"""Every method of adaptation that we know of: how it is applied, or why it is refused.

The one source of what refusals say, of the table in the README and of what METHODS must hold. Read
by adapters/methods, and run to rewrite the README:

    python -m loraswarm.adapters.methods.table README.md
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from loraswarm.adapters.config_keys import CONFIG_FILE
from loraswarm.adapters.printable import shortened
from loraswarm.errors import AdapterError

_BEGIN, _END = "<!-- methods -->", "<!-- /methods -->"

MERGE, CONVERT, RETRAIN, SAVE_PLAIN, RENAME = "merge", "convert", "retrain", "save", "rename"
INSTEAD = {
    MERGE: "merge it into a base of its own with PEFT's merge_and_unload",
    CONVERT: "convert it to LoRA with PEFT's save_as_lora (its rank decides how close), or merge it"
    " into a base of its own with merge_and_unload",
    RETRAIN: "train LoRA instead",
    SAVE_PLAIN: "save it as plain LoRA with PEFT's save_pretrained(...,"
    " path_initial_model_for_weight_conversion=...)",
    RENAME: "convert it to MiSS with PEFT's scripts/convert-bone-to-miss.py",
}
"""What to do with an adapter that is refused, by the word for it in the README."""


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method: a `peft_type`, or a variant that `option` turns on within it.

    `note` says in one line how it is applied, or why it is not; `instead` is a key of INSTEAD then.
    """

    name: str
    peft_types: tuple[str, ...]
    is_served: bool
    note: str
    option: str = ""
    instead: str = ""


def _served(name: str, peft_type: str, note: str) -> MethodRow:
    return MethodRow(name, (peft_type,), True, note)


def _variant(name: str, option: str, note: str) -> MethodRow:
    return MethodRow(name, ("LORA",), True, note, option)


def _refused(name: str, peft_types: str, reason: str, instead: str) -> MethodRow:
    return MethodRow(name, tuple(peft_types.split()), False, reason, "", instead)


def _refused_variant(name: str, option: str, reason: str, instead: str) -> MethodRow:
    return MethodRow(name, ("LORA",), False, reason, option, instead)


_LORA = (
    _served("LoRA", "LORA", "A and B of any rank on any linear, the embedding and the lm_head"),
    _variant("rsLoRA", "use_rslora", "scale alpha / sqrt(r)"),
    _variant("DoRA", "use_dora", "a gain per output, from the base's weight once at load"),
    _variant("QALoRA", "use_qalora", "A spread over its groups of inputs"),
    _variant("BD-LoRA", "use_bdlora", "the blocks laid out in whole A and B"),
    _variant("PiSSA", 'init_lora_weights "pissa"', "converted or not: the split is recomputed"),
    _variant("OLoRA", 'init_lora_weights "olora"', "converted or not: the split is recomputed"),
    _variant(
        "EVA, orthogonal, Gaussian and MiCA inits", "init_lora_weights", "plain LoRA once trained"
    ),
    _variant("VeLoRA", "velora_config", "plain LoRA once trained"),
    _variant("MonteCLoRA", "monteclora_config", "plain LoRA once trained"),
    _variant("Activated LoRA", "alora_invocation_tokens", "from the last invocation on"),
    _variant("Biases in B", "lora_bias", "a vector per output"),
    _variant(
        "Trained biases", 'bias "lora_only", "all"', "stand in for the base's; with LoRA only"
    ),
    _variant(
        "Trained modules",
        "modules_to_save",
        "norms, embedding, lm_head: stand in; with every method but Tied-LoRA and trainable tokens",
    ),
    _variant(
        "Trained tokens",
        "trainable_token_indices",
        "rows stand in for the embedding's; with LoRA only",
    ),
    _variant("Tied embeddings", "ensure_weight_tying", "embedding and lm_head change alike"),
)
_OTHERS_SERVED = (
    _served("VeRA", "VERA", "A and B, saved or drawn, kept once for all modules and adapters"),
    _served("Tied-LoRA", "TIED_LORA", "A and B kept once for all layers (docs/tied_lora.md)"),
    _served("AdaLoRA", "ADALORA", "E folded in; each module has the rank it kept"),
    _served("VB-LoRA", "VBLORA", "A and B from the vector bank, where that is no larger"),
    _served("IA3", "IA3", "a gain per output; inputs of down_proj as gains of up_proj"),
    _served("DeLoRA", "DELORA", "norms and bound folded into A and B"),
    _served("MiSS", "MISS", "the A that sums inputs kept once; mini where that is no larger"),
    _served("LoHa", "LOHA", "as LoRA of rank r * r, where that is no larger than the weight"),
    _served("LoKr", "LOKR", "as LoRA of its factors' rank, where that is no larger"),
    _served("GraLoRA", "GRALORA", "as LoRA of rank k * r, where that is no larger"),
    _served("BEFT", "BEFT", "a bias per adapted linear"),
    _served("LN tuning", "LN_TUNING", "norms stand in for the base's"),
    _served("Trainable tokens", "TRAINABLE_TOKENS", "rows stand in for the embedding's"),
    MethodRow("NeMo LoRA", (), True, "fused and unfused layers, sharded or not"),
)
_LORA_REFUSED = (
    _refused_variant(
        "CorDA, unconverted",
        'init_lora_weights "corda"',
        "the base was changed by data that is not in the file",
        SAVE_PLAIN,
    ),
    _refused_variant(
        "LoRA-GA, unconverted",
        'init_lora_weights "lora_ga"',
        "the base was changed by data that is not in the file",
        SAVE_PLAIN,
    ),
    _refused_variant(
        "PiSSA by fast SVD, unconverted",
        'init_lora_weights "pissa_niter_16"',
        "the base was changed by a decomposition that is not repeatable",
        SAVE_PLAIN,
    ),
    _refused_variant(
        "LoftQ", 'init_lora_weights "loftq"', "it belongs to a quantised base", RETRAIN
    ),
    _refused_variant("KaSA", "kasa_config", "it truncates the base's weights", MERGE),
    _refused_variant("Arrow", "arrow_config", "it routes tokens between adapters", RETRAIN),
    _refused_variant(
        "Layer replication", "layer_replication", "it changes the depth of the base", RETRAIN
    ),
    _refused_variant(
        "Target parameters", "target_parameters", "it adapts what is no linear module", MERGE
    ),
    _refused_variant("Megatron", "megatron_config", "it adapts Megatron's own layers", RETRAIN),
    MethodRow(
        "MiSS bat",
        ("MISS",),
        False,
        "multiplies the weight block by block: full rank",
        'init_weights "bat"',
        MERGE,
    ),
)
_REFUSED = (
    _refused(
        "Soft prompts",
        "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING CPT",
        "trained vectors stand before the prompt; the base's weights do not change",
        RETRAIN,
    ),
    _refused(
        "Prefix tuning, Cartridge",
        "PREFIX_TUNING CARTRIDGE",
        "trained keys and values stand before the prompt; the base's weights do not change",
        RETRAIN,
    ),
    _refused("Adaption prompt", "ADAPTION_PROMPT", "attention to trained prompts", RETRAIN),
    _refused("X-LoRA", "XLORA", "a classifier mixes adapters for every token", RETRAIN),
    _refused("Poly, MHR", "POLY", "a router mixes adapters by task", RETRAIN),
    _refused("Lily", "LILY", "a router mixes B from the tokens of a whole batch", RETRAIN),
    _refused("Shadow", "SHADOW", "a network of its own runs beside the base", RETRAIN),
    _refused("OFT, BOFT", "OFT BOFT", "a rotation of the weight's inputs, of full rank", MERGE),
    _refused("HRA", "HRA", "reflects the weight's inputs: an update made of W, not read", MERGE),
    _refused("RoAd", "ROAD", "rotates pairs of outputs, which a gain per output cannot", MERGE),
    _refused("SHiRA", "SHIRA", "a sparse change of full rank", MERGE),
    _refused("Super-Tuning", "SUPERTUNING", "a sparse change of full rank", MERGE),
    _refused("FourierFT", "FOURIERFT", "a dense change, by inverse Fourier transform", CONVERT),
    _refused("WaveFT", "WAVEFT", "a dense change, by inverse wavelet transform", CONVERT),
    _refused("C3A", "C3A", "circular convolutions by block, of full rank", CONVERT),
    _refused("RandLoRA", "RANDLORA", "a sum of random bases of full rank", CONVERT),
    _refused("HiRA", "HIRA", "multiplies the weight elementwise: full rank", MERGE),
    _refused("GLoRA", "GLORA", "multiplies the weight elementwise: full rank", MERGE),
    _refused("PEANuT", "PEANUT", "a network maps the base's weight to a change of it", MERGE),
    _refused("FRoD", "FROD", "replaces the weight by a joint decomposition", MERGE),
    _refused("OSF", "OSF", "trains the weight's lower singular directions, half by default", MERGE),
    _refused("AdaMSS", "ADAMSS", "trains in clusters of W's singular directions, not read", MERGE),
    _refused("DEFT", "DEFT", "projects the weight's outputs: an update made of W, not read", MERGE),
    _refused("PVeRA", "PVERA", "a VeRA of means and variances, which are not read", MERGE),
    _refused(
        "PSOFT", "PSOFT", "rotates in the singular directions of W, which are not saved", CONVERT
    ),
    _refused(
        "TinyLoRA",
        "TINYLORA",
        "mixes singular directions of W by seeded projections, not read",
        CONVERT,
    ),
    _refused(
        "Uni-LoRA", "UNILORA", "fills A and B by indices drawn from a seed, not read", CONVERT
    ),
    _refused(
        "Bone",
        "BONE",
        "PEFT calls it MiSS now and no longer reads it",
        RENAME,
    ),
)
ROWS = (*_LORA, *_OTHERS_SERVED, *_LORA_REFUSED, *_REFUSED)


def served_types() -> frozenset[str]:
    """Each `peft_type` that a `Method` must exist for."""
    rows = (row for row in ROWS if row.is_served and not row.option)
    return frozenset(peft_type for row in rows for peft_type in row.peft_types)


def refusal_of(peft_type: object) -> AdapterError:
    """The error for a `peft_type` that no method serves."""
    label = f"{CONFIG_FILE}: peft_type is {shortened(peft_type)}"
    for row in ROWS:
        if not row.is_served and not row.option and peft_type in row.peft_types:
            return AdapterError(
                f"{label}: {row.name} is not served: {row.note}; {INSTEAD[row.instead]}"
            )
    served = ", ".join(sorted(served_types()))
    return AdapterError(f"{label}: unknown; it must be one of {served}")


def readme_table() -> str:
    """Both tables as Markdown, markers included."""
    served = [f"| {row.name} | {_place(row)} | {row.note} |" for row in ROWS if row.is_served]
    refused = [
        f"| {row.name} | {_place(row)} | {row.note} | {row.instead} |"
        for row in ROWS
        if not row.is_served
    ]
    lines = (
        _BEGIN,
        "| served | in the config | how it is applied |",
        "|---|---|---|",
        *served,
        "",
        "| refused | in the config | why | instead |",
        "|---|---|---|---|",
        *refused,
        "",
        *(f"- **{word}:** {advice}." for word, advice in INSTEAD.items()),
        _END,
    )
    return "\n".join(lines)


def _place(row: MethodRow) -> str:
    """Where a config says it: its peft_type, or the option of a type, or (NeMo) neither."""
    if row.option:
        types = "" if row.peft_types == ("LORA",) else f"`{row.peft_types[0]}`, "
        return f"{types}`{row.option}`"
    return ", ".join(f"`{peft_type}`" for peft_type in row.peft_types) or "a `.nemo` file"


def with_table(readme: str) -> str:
    """A README whose part between the markers is `readme_table`.

    Raises    ValueError if a marker is missing.
    """
    begin, end = readme.index(_BEGIN), readme.index(_END)
    return readme[:begin] + readme_table() + readme[end + len(_END) :]


if __name__ == "__main__":
    readme_path = Path(sys.argv[1])
    readme_path.write_text(with_table(readme_path.read_text(encoding="utf-8")), encoding="utf-8")
