"""Makes the demo swarm: held-out sets, tokenizer, base model, eight adapters, a table of scores.

Run as `python -m loraswarm.demo.train --out DIR`; needs the extra `train` (peft).
Owns the order of the steps and the files' places; every seed is fixed.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loraswarm.demo import Example
from loraswarm.demo.evaluate import Score, load_model, score
from loraswarm.demo.finetune import ADAPTERS, finetune, save_adapter
from loraswarm.demo.pretrain import PretrainSettings, pretrain, save_base
from loraswarm.demo.tasks import TASKS, draw_examples
from loraswarm.demo.tokenizer import train_tokenizer

NUM_HELDOUT = 120
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loraswarm.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--keep-base", action="store_true", help="reuse the base model in --out")
    parser.add_argument("--adapters", nargs="*", choices=sorted(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--steps-scale", type=float, default=1.0, help="below 1 for a trial run")
    return parser.parse_args()


def write_heldout(path: Path) -> dict[str, list[Example]]:
    """Draw every task's held-out set and write one JSON line an example."""
    path.mkdir(parents=True, exist_ok=True)
    heldout = {}
    for task in TASKS:
        heldout[task] = draw_examples(task, NUM_HELDOUT, "heldout")
        lines = [json.dumps(asdict(example)) + "\n" for example in heldout[task]]
        (path / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return heldout


def make_base(path: Path, excluded: frozenset[str], steps_scale: float) -> None:
    settings = PretrainSettings()
    settings = replace(settings, num_steps=max(1, round(settings.num_steps * steps_scale)))
    tokenizer = train_tokenizer("tokenizer", excluded)
    save_base(pretrain(tokenizer, excluded, settings), tokenizer, path)


def print_score(name: str, adapter: Score, base: Score, dtype_name: str) -> None:
    print(
        f"score adapter={name} dtype={dtype_name} exact={adapter.exact_share:.3f} "
        f"margin={adapter.smallest_margin:.3f} base_exact={base.exact_share:.3f}",
        flush=True,
    )


def print_samples(examples: list[Example], adapter: Score, base: Score) -> None:
    wrong = [i for i, example in enumerate(examples) if adapter.answers[i] != example.answer]
    for index in [0, *wrong[:3]]:
        print(f"  prompt  {examples[index].prompt!r}")
        print(f"  wanted  {examples[index].answer!r}")
        print(f"  adapter {adapter.answers[index]!r}")
        print(f"  base    {base.answers[index]!r}", flush=True)


def evaluate_adapter(
    out: Path, name: str, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> dict[str, dict[str, float]]:
    """Scores of one adapter and of the base on its held-out set, for each dtype."""
    results = {}
    for dtype_name, dtype in DTYPES.items():
        base = score(load_model(out / "base", None, dtype), tokenizer, examples)
        model = load_model(out / "base", out / "adapters" / name, dtype)
        adapter = score(model, tokenizer, examples)
        print_score(name, adapter, base, dtype_name)
        if dtype is torch.float32:
            print_samples(examples, adapter, base)
        results[dtype_name] = {
            "adapter_exact": round(adapter.exact_share, 4),
            "base_exact": round(base.exact_share, 4),
            "smallest_margin": round(adapter.smallest_margin, 4),
        }
    return results


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    torch.set_num_threads(arguments.threads)
    started_s = time.monotonic()
    heldout = write_heldout(out / "heldout")
    excluded = frozenset(example.prompt for examples in heldout.values() for example in examples)
    if not (arguments.keep_base and (out / "base" / "config.json").exists()):
        make_base(out / "base", excluded, arguments.steps_scale)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    scores_path = out / "scores.json"
    scores = json.loads(scores_path.read_text()) if scores_path.exists() else {}
    for name in arguments.adapters:
        settings = ADAPTERS[name]
        num_steps = max(1, round(settings.num_steps * arguments.steps_scale))
        settings = replace(settings, num_steps=num_steps)
        model = finetune(name, out / "base", tokenizer, excluded, settings)
        save_adapter(model, out / "adapters" / name, settings.dtype)
        scores[name] = evaluate_adapter(out, name, tokenizer, heldout[name])
        scores_path.write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n")
    print(f"done elapsed_s={time.monotonic() - started_s:.0f}", flush=True)


if __name__ == "__main__":
    main()
