"""One adapter of every served method, saved by PEFT itself (Tied-LoRA by its reference module).

Configs are small and awkward; parameters are random, so that an adapter that is not applied, or
applied in part, shows. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_factory import peft_warnings_ignored
from general_form import save_peft
from tied_lora import save_random_tied_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = [17, 5]
Save = Callable[["PreTrainedModel", Path], None]


def _peft(config_name: str, **arguments: Any) -> Save:
    def save(model: PreTrainedModel, path: Path) -> None:
        import peft

        with peft_warnings_ignored():
            config = getattr(peft, config_name)(task_type="CAUSAL_LM", **arguments)
        save_peft(model, path, config, seed=len(path.name))

    return save


def _lora(**arguments: Any) -> Save:
    defaults = {"r": 5, "lora_alpha": 7, "target_modules": ALL}
    return _peft("LoraConfig", **(defaults | arguments))


def _bdlora(model: PreTrainedModel, path: Path) -> None:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(
        target_modules_bd_a=["o_proj", "down_proj"],
        target_modules_bd_b=["q_proj", "up_proj"],
        nblocks=2,
        match_strict=False,
    )
    _lora(r=4, use_bdlora=blocks, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"])(
        model, path
    )


METHOD_CASES: dict[str, Save] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True, rank_pattern={"up_proj": 9}, alpha_pattern={"q_proj": 3}),
    "lora-bias": _lora(lora_bias=True),
    "bias-lora-only": _lora(bias="lora_only", target_modules=["q_proj", "v_proj", "up_proj"]),
    "bias-all": _lora(bias="all", target_modules=["v_proj", "down_proj"]),
    "dora": _lora(use_dora=True),
    "dora-rslora": _lora(use_dora=True, use_rslora=True, rank_pattern={"k_proj": 17}),
    "qalora": _lora(use_qalora=True, qalora_group_size=4),
    "bdlora": _bdlora,
    "pissa": _lora(init_lora_weights="pissa", r=3),
    "olora": _lora(init_lora_weights="olora", r=3),
    "embeddings": _lora(target_modules=["embed_tokens", "q_proj"]),
    "lm-head": _lora(target_modules=["lm_head", "v_proj"], r=18),
    "embeddings-and-lm-head": _lora(target_modules=["embed_tokens", "lm_head"]),
    "saved-norms": _lora(modules_to_save=["norm"]),
    "saved-embeddings": _lora(modules_to_save=["embed_tokens"]),
    "saved-lm-head": _lora(modules_to_save=["lm_head"]),
    "trained-tokens": _lora(trainable_token_indices=[40, 3, 7, 132]),
    "alora": _lora(alora_invocation_tokens=INVOCATION),
    "only-tokens": _peft(
        "TrainableTokensConfig", token_indices=[9, 3, 17], target_modules=["embed_tokens"]
    ),
    "ln-tuning": _peft("LNTuningConfig", target_modules=["input_layernorm", "model.norm"]),
    "adalora": _peft(
        "AdaLoraConfig", init_r=6, target_r=3, lora_alpha=8, total_step=10, target_modules=ALL
    ),
    "vera": _peft("VeraConfig", r=19, target_modules=ALL, vera_dropout=0.1),
    "vera-regenerated": _peft(
        "VeraConfig", r=16, target_modules=["q_proj", "down_proj"], save_projection=False
    ),
    "vblora": _peft(
        "VBLoRAConfig",
        r=3,
        num_vectors=11,
        vector_length=4,
        topk=2,
        target_modules=["q_proj", "k_proj", "down_proj"],
        save_only_topk_weights=False,
    ),
    "miss": _peft("MissConfig", r=4, target_modules=ALL),
    "delora": _peft("DeloraConfig", r=5, delora_lambda=9, target_modules=ALL),
    "lokr": _peft("LoKrConfig", r=2, alpha=3, target_modules=["q_proj", "up_proj"]),
    "loha": _peft("LoHaConfig", r=3, alpha=5, target_modules=["o_proj", "down_proj"]),
    "ia3": _peft(
        "IA3Config",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "delora-saved-norm": _peft(
        "DeloraConfig", r=3, target_modules=["v_proj"], modules_to_save=["model.norm"]
    ),
    "adalora-saved-tables": _peft(
        "AdaLoraConfig",
        init_r=5,
        total_step=10,
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    ),
    "tied-lora": lambda model, path: save_random_tied_lora(model, path, rank=6, seed=5),
}
