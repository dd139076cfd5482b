"""Trains the demo's base model from scratch on packed corpus text and saves it in bfloat16.

Knows nothing of the adapters. Documents are laid end to end in rows; it computes in bfloat16 under
autocast with float32 weights, which is about twice as fast on a CPU with AVX512-BF16.
Called by `train`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraswarm.demo.corpus import BOS, EOS, PAD, draw_documents
from loraswarm.demo.progress import Progress

MAX_POSITIONS = 1024
NUM_DOCUMENTS_PER_READ = 1000


@dataclass(frozen=True)
class PretrainSettings:
    """How long and how fast the base model is trained."""

    num_steps: int = 1500
    row_tokens: int = 192
    num_rows: int = 24
    long_row_tokens: int = 768
    long_row_every: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    seed: int = 0


def learning_rate_at(step: int, num_steps: int, warmup_steps: int) -> float:
    """Share of the full learning rate: a linear rise, then a cosine down to a twentieth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama of about 5.8 million weights; its embedding is also its output layer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, config.bos_token_id],
        pad_token_id=config.pad_token_id,
    )
    return model


def draw_tokens(
    tokenizer: PreTrainedTokenizerFast, seed: str, excluded: frozenset[str]
) -> Iterator[int]:
    """The corpus as one endless row of token ids."""
    documents = draw_documents(seed, excluded)
    while True:
        texts = list(islice(documents, NUM_DOCUMENTS_PER_READ))
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            yield from ids


def build_optimizer(
    parameters: Iterator[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def pretrain(
    tokenizer: PreTrainedTokenizerFast, excluded: frozenset[str], settings: PretrainSettings
) -> LlamaForCausalLM:
    """Train a fresh model for `settings.num_steps` steps and return it in float32."""
    torch.manual_seed(settings.seed)
    model = build_model(tokenizer)
    tokens = draw_tokens(tokenizer, f"pretrain/{settings.seed}", excluded)
    optimizer = build_optimizer(model.parameters(), settings.learning_rate, weight_decay=0.05)
    progress = Progress("base", settings.num_steps)
    batch_tokens = settings.row_tokens * settings.num_rows
    model.train()
    for step in range(settings.num_steps):
        is_long = step % settings.long_row_every == settings.long_row_every - 1
        row_tokens = settings.long_row_tokens if is_long else settings.row_tokens
        rows = torch.tensor(list(islice(tokens, batch_tokens))).view(-1, row_tokens)
        scale = learning_rate_at(step, settings.num_steps, settings.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.advance(f"loss={loss.item():.3f}")
    return model.eval()


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer as a Hugging Face directory."""
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
