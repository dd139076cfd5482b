"""Generates with transformers, and PEFT's mixed batches of adapters; run with their interpreter.

    python peft_worker.py MODEL NUM_THREADS [ADAPTER_DIRECTORY ...]

Says `{"ready": true}` on standard output when all is loaded. Then reads lines of JSON, each
`{"batch_size", "requests": [{"index", "adapter", "prompt", "max_tokens"}]}`, and answers each with
`{"answers": [{"index", "start_s", "response_s", "num_output"}]}`. Called by transformers_peft.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

BASE_ROW = "__base__"  # PEFT's name for rows without an adapter
PADDING_ID = 0


class TokenTimes(BaseStreamer):
    """When each position of a batch was there; `generate` first puts the prompts."""

    def __init__(self, begin_s: float) -> None:
        self.begin_s = begin_s
        self.num_puts = 0
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.num_puts += 1
        if self.num_puts > 1:
            self.times_s.append(time.perf_counter() - self.begin_s)

    def end(self) -> None:
        """Nothing is held back."""


def load(model_path: str, adapters: list[Path]) -> Any:
    """The model in bfloat16, with its adapters in the dtype of their files, as every other peer."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PADDING_ID
    if adapters:
        from peft import PeftModel

        first, *others = adapters
        options = {"autocast_adapter_dtype": False}
        model = PeftModel.from_pretrained(model, first, adapter_name=first.name, **options)
        for path in others:
            model.load_adapter(path, adapter_name=path.name, **options)
    return model.eval()


def answer_batch(
    model: Any, requests: list[dict[str, Any]], begin_s: float, has_adapters: bool
) -> list[dict[str, Any]]:
    """One static batch: it runs until its longest answer ends; times are since `begin_s`."""
    start_s = time.perf_counter() - begin_s
    width = max(len(request["prompt"]) for request in requests)
    tokens = torch.full((len(requests), width), PADDING_ID)
    mask = torch.zeros_like(tokens)
    for row, request in enumerate(requests):
        prompt = torch.tensor(request["prompt"])
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    arguments: dict[str, Any] = {}
    if has_adapters:
        arguments["adapter_names"] = [request["adapter"] or BASE_ROW for request in requests]
    times = TokenTimes(begin_s)
    longest = max(request["max_tokens"] for request in requests)
    out = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=longest,
        streamer=times,
        **arguments,
    )
    num_output = out.shape[1] - width
    if num_output != len(times.times_s):
        raise RuntimeError(f"{num_output} tokens came in {len(times.times_s)} parts")
    return [
        {
            "index": request["index"],
            "start_s": start_s,
            "response_s": times.times_s[: request["max_tokens"]],
            "num_output": min(num_output, request["max_tokens"]),
        }
        for request in requests
    ]


@torch.inference_mode()
def main() -> None:
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    torch.set_num_threads(int(sys.argv[2]))
    adapters = [Path(argument) for argument in sys.argv[3:]]
    model = load(sys.argv[1], adapters)
    print(json.dumps({"ready": True}), file=answers_to, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        begin_s = time.perf_counter()
        answers: list[dict[str, Any]] = []
        for first in range(0, len(job["requests"]), job["batch_size"]):
            batch = job["requests"][first : first + job["batch_size"]]
            answers += answer_batch(model, batch, begin_s, bool(adapters))
        print(json.dumps({"answers": answers}), file=answers_to, flush=True)


if __name__ == "__main__":
    main()
