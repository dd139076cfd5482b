"""Milliseconds to sample one token for each of a batch of rows, by kind of request.

    python benchmarks/sampling.py [--rows 32] [--vocab 151936] [--threads 1]

Two kinds of logits, rounded as a bfloat16 model's are: peaked ones, as of a language model, where
few tokens are likely, and flat ones, where truncation must sort.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from document import json_path, write_document
from loraswarm.core.request import Request, SamplingParams
from loraswarm.core.sequence import Sequence
from loraswarm.engine.sampler import sample

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 128
NUM_TRIES = 7
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_k top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
}


def make_sequence(number: int, vocab_size: int, params: dict[str, Any]) -> Sequence:
    """A sequence in the middle of its answer."""
    generator = torch.Generator().manual_seed(number)
    shape = (PROMPT_TOKENS + OUTPUT_TOKENS,)
    ids = torch.randint(vocab_size, shape, generator=generator).tolist()
    request = Request(
        request_id=str(number),
        prompt_token_ids=tuple(ids[:PROMPT_TOKENS]),
        params=SamplingParams(max_tokens=2 * OUTPUT_TOKENS, **params),
    )
    sequence = Sequence(request, (), number, 2 * OUTPUT_TOKENS, frozenset())
    sequence.token_ids += ids[PROMPT_TOKENS:]
    return sequence


def make_logits(num_rows: int, vocab_size: int, is_peaked: bool) -> Tensor:
    """[Z, V] float32."""
    generator = torch.Generator().manual_seed(0)
    logits_ZV = 2.0 * torch.randn(num_rows, vocab_size, generator=generator)
    if is_peaked:
        logits_ZV += 2.0 * torch.empty_like(logits_ZV).exponential_(generator=generator)
    return logits_ZV.bfloat16().float()


@torch.inference_mode()
def least_ms(logits_ZV: Tensor, sequences: list[Sequence]) -> float:
    """The fastest of some calls."""
    times = []
    for _ in range(NUM_TRIES):
        used_ZV = logits_ZV.clone()
        start = time.perf_counter()
        sample(used_ZV, sequences)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=json_path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'':14}{'peaked':>10}{'flat':>10}   ms for {options.rows} rows")
    rows = [make_logits(options.rows, options.vocab, is_peaked) for is_peaked in (True, False)]
    found = []
    for name, params in KINDS.items():
        sequences = [make_sequence(i, options.vocab, params) for i in range(options.rows)]
        peaked_ms, flat_ms = (least_ms(logits_ZV, sequences) for logits_ZV in rows)
        print(f"{name:14}{peaked_ms:10.2f}{flat_ms:10.2f}", flush=True)
        found.append({"kind": name, "peaked_ms": peaked_ms, "flat_ms": flat_ms})
    if options.json:
        write_document(options.json, options, found)


if __name__ == "__main__":
    main()
