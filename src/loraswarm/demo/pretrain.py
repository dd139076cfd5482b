"""Trains the demo's base model from scratch on the generated corpus and saves it in bfloat16.

Knows nothing of the adapters. Matrices are trained with Muon, which learns to copy from the prompt
in fewer tokens than AdamW; loss is taken on what the assistant says and on plain documents. It
computes in bfloat16 under autocast: twice as fast on a CPU with AVX512-BF16. Called by `train`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraswarm.demo.corpus import BOS, EOS, PAD, draw_documents
from loraswarm.demo.progress import Progress

MAX_POSITIONS = 1024
HIDDEN_SIZE = 256
IGNORED = -100


@dataclass(frozen=True)
class PretrainSettings:
    """How long and how fast the base model is trained."""

    num_steps: int = 2600
    num_rows: int = 20
    row_tokens: int = 192
    long_row_tokens: int = 768
    long_row_every: int = 10
    muon_learning_rate: float = 3e-3
    adamw_learning_rate: float = 2e-3
    warmup_steps: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows of tokens. Shapes  ids [S, T] int64; labels [S, T] int64, the next token or IGNORED."""

    ids: torch.Tensor
    labels: torch.Tensor


def learning_rate_at(step: int, num_steps: int, warmup_steps: int) -> float:
    """Share of the full learning rate: a linear rise, then a cosine down to a fiftieth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama of about 5 million weights; its embedding is also its output layer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=HIDDEN_SIZE**-0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, config.bos_token_id],
        pad_token_id=config.pad_token_id,
    )
    return model


def mask_labels(ids: list[int], opening_ids: set[int], answering_id: int) -> list[int]:
    """Next-token labels of one document, IGNORED where a user or the system speaks."""
    labels, is_learned = [], True
    for current, following in zip(ids, [*ids[1:], None], strict=True):
        is_learned = current == answering_id or (is_learned and current not in opening_ids)
        learned = is_learned and following is not None and following not in opening_ids
        labels.append(following if learned and following is not None else IGNORED)
    return labels


def pad_rows(rows: list[list[int]], padding: int) -> torch.Tensor:
    """Rows of unequal length as one tensor, padded on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=float(padding))


def draw_batches(
    tokenizer: PreTrainedTokenizerFast, excluded: frozenset[str], settings: PretrainSettings
) -> Iterator[Batch]:
    """Endless batches of documents of like length; now and then one long row of many."""
    documents = draw_documents(f"pretrain/{settings.seed}", excluded)
    random = Random(settings.seed)
    opening_ids = set(tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>"]))
    answering_id = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert tokenizer.pad_token_id is not None
    num_rows, length = settings.num_rows, settings.row_tokens
    while True:
        texts = list(islice(documents, num_rows * 32))
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [(ids, mask_labels(ids, opening_ids, answering_id)) for ids in encoded]
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), num_rows))
        random.shuffle(starts)
        for index, start in enumerate(starts):
            group = rows[start : start + num_rows]
            if index % settings.long_row_every == 0:
                group, length = [_join(random.sample(rows, num_rows))], settings.long_row_tokens
            ids = pad_rows([ids[:length] for ids, _ in group], tokenizer.pad_token_id)
            yield Batch(ids, pad_rows([labels[:length] for _, labels in group], IGNORED))
            length = settings.row_tokens


def _join(rows: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    ids = [token for ids, _ in rows for token in ids]
    return ids, [label for _, labels in rows for label in labels]


def build_optimizers(
    model: LlamaForCausalLM, settings: PretrainSettings
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the layers' matrices, AdamW for embedding and norms, each with its learning rate."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    muon = torch.optim.Muon(
        matrices, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [(muon, settings.muon_learning_rate), (adamw, settings.adamw_learning_rate)]


def compute_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the labelled tokens; logits are computed for those only."""
    kept = batch.labels != IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch.ids).last_hidden_state
        logits = model.lm_head(hidden[kept])
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits.float(), batch.labels[kept])
    return loss


def pretrain(
    tokenizer: PreTrainedTokenizerFast, excluded: frozenset[str], settings: PretrainSettings
) -> LlamaForCausalLM:
    """Train a fresh model for `settings.num_steps` steps and return it in float32."""
    torch.manual_seed(settings.seed)
    model = build_model(tokenizer).train()
    optimizers = build_optimizers(model, settings)
    batches = draw_batches(tokenizer, excluded, settings)
    progress = Progress("base", settings.num_steps)
    for step in range(settings.num_steps):
        scale = learning_rate_at(step, settings.num_steps, settings.warmup_steps)
        loss = compute_loss(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, learning_rate in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate * scale
            optimizer.step()
            optimizer.zero_grad()
        progress.advance(f"loss={loss.item():.3f}")
    return model.eval()


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer as a Hugging Face directory."""
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path, save_jinja_files=False)
