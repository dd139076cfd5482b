"""Scores the demo's base model and adapters on held-out examples by greedy decoding.

Reads only saved files, as a user would; returns numbers and samples, prints nothing.
Called by `train`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loraswarm.demo import Example
from loraswarm.demo.finetune import render_prompt

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Score:
    """How a model did on one held-out set.

    `smallest_margin` is the least gap between the best two logits over all generated tokens.
    """

    exact_share: float
    smallest_margin: float
    answers: list[str]


def load_model(base_path: Path, adapter_path: Path | None, dtype: torch.dtype) -> torch.nn.Module:
    """The base model, with the adapter on it if one is given, computing in `dtype`."""
    model: torch.nn.Module = LlamaForCausalLM.from_pretrained(base_path, dtype=dtype)
    if adapter_path is not None:
        model = PeftModel.from_pretrained(model, str(adapter_path), autocast_adapter_dtype=False)
    return model.to(dtype).eval()


@torch.inference_mode()
def score(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> Score:
    """Answer every example greedily, in one batch, and compare with the expected text."""
    prompts = [render_prompt(tokenizer, example.prompt) for example in examples]
    batch = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    output = model.generate(  # type: ignore[operator]
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new_ids = output.sequences[:, batch["input_ids"].shape[1] :]
    answers = [str(text) for text in tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
    best = torch.stack(output.logits, dim=1).float().topk(2, dim=-1).values
    written = new_ids != tokenizer.pad_token_id
    margins = (best[..., 0] - best[..., 1])[written]
    num_exact = sum(
        answer == example.answer for answer, example in zip(answers, examples, strict=True)
    )
    return Score(num_exact / len(examples), float(margins.min()), answers)
