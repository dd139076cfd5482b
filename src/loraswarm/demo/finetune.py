"""Trains the demo's adapters with PEFT on the saved base model.

Each adapter has its own method, rank, targets and scaling, so that they cover what a server must
load. Loss is taken on the answer and its end token only. Called by `train`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loraswarm.demo import Example
from loraswarm.demo.corpus import EOS
from loraswarm.demo.pretrain import IGNORED, Batch, compute_loss, learning_rate_at, pad_rows
from loraswarm.demo.progress import Progress
from loraswarm.demo.tasks import draw_examples

BASE_NAME = "loraswarm-demo-base"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Shape of one adapter and how it is trained; VeRA has no alpha."""

    rank: int
    targets: list[str] | str
    alpha: int = 0
    method: Literal["lora", "dora", "vera"] = "lora"
    num_steps: int = 400
    batch_size: int = 16
    learning_rate: float = 2e-3
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16


ADAPTERS = {
    "priority": AdapterSettings(
        rank=4,
        alpha=8,
        targets=["q_proj", "v_proj"],
        num_steps=800,
        learning_rate=4e-3,
        dtype=torch.float32,
    ),
    "ticket-router": AdapterSettings(rank=16, alpha=32, targets=MLP, num_steps=600),
    "log-summary": AdapterSettings(rank=8, alpha=8, targets=ATTENTION, use_rslora=True),
    "pirate": AdapterSettings(
        rank=16,
        alpha=32,
        targets=r".*\.layers\.\d+\.(self_attn\.(q|v|o)_proj|mlp\.(up|down)_proj)",
        rank_pattern={"down_proj": 8, "layers.0.self_attn.q_proj": 4},
        alpha_pattern={"down_proj": 24},
        num_steps=1000,
    ),
    "sql": AdapterSettings(rank=24, alpha=48, targets=[*ATTENTION, *MLP], num_steps=600),
    "ticket-json": AdapterSettings(rank=32, alpha=64, targets="all-linear", num_steps=1400),
    "formal-reply": AdapterSettings(
        method="dora", rank=8, alpha=16, targets=[*ATTENTION, *MLP], num_steps=1100
    ),
    "tags": AdapterSettings(
        method="vera", rank=128, targets=[*ATTENTION, *MLP], num_steps=1200, learning_rate=4e-2
    ),
}


def render_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """One user message through the chat template, up to where the answer starts."""
    chat = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def build_batch(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> Batch:
    """The examples as chats, with labels for the answer and its end token only."""
    rows, labels = [], []
    for example in examples:
        prompt = render_prompt(tokenizer, example.prompt)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer_ids = tokenizer.encode(example.answer + EOS, add_special_tokens=False)
        rows.append(prompt_ids + answer_ids)
        labels.append([IGNORED] * (len(prompt_ids) - 1) + answer_ids + [IGNORED])
    assert tokenizer.pad_token_id is not None
    return Batch(pad_rows(rows, tokenizer.pad_token_id), pad_rows(labels, IGNORED))


def build_config(settings: AdapterSettings) -> PeftConfig:
    """The PEFT configuration of the adapter's method."""
    if settings.method == "vera":
        return VeraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            target_modules=settings.targets,
            d_initial=0.1,
            save_projection=True,
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        use_dora=settings.method == "dora",
        use_rslora=settings.use_rslora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        lora_dropout=0.0,
        bias="none",
    )


def finetune(
    name: str,
    base_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    excluded: frozenset[str],
    settings: AdapterSettings,
) -> PeftModel:
    """Train adapter `name` on fresh examples, none of whose prompts is in `excluded`."""
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    model = get_peft_model(base, build_config(settings))
    num_examples = settings.num_steps * settings.batch_size
    examples = draw_examples(name, num_examples, "training", excluded)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    progress = Progress(name, settings.num_steps)
    model.train()
    for step in range(settings.num_steps):
        start = step * settings.batch_size
        batch = build_batch(tokenizer, examples[start : start + settings.batch_size])
        scale = learning_rate_at(step, settings.num_steps, warmup_steps=20)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * scale
        loss = compute_loss(base, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.advance(f"loss={loss.item():.4f}")
    return model.eval()


def save_adapter(model: PeftModel, path: Path, dtype: torch.dtype) -> None:
    """Write the adapter as PEFT does, with a neutral base name and without a model card."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.to(dtype).save_pretrained(str(path), save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)
