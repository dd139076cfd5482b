"""Mutates configs and tensors of one adapter of every method: each is read whole, or refused.

    python tests/long/fuzz_methods.py [--inputs 20000] [--seed 0]

Files stay well-formed (tests/long/fuzz_adapters.py breaks those): what is spoiled is what they
say. Any other exception than AdapterError, or values that are not finite, are a failure and print
the seed of the input; `--seed THAT --inputs 1` repeats it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fuzz_adapters import MAX_SECONDS, random_value
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_factory import CONFIG_FILE, WEIGHTS_FILE, tiny_llama
from general_form import ModelBase
from loraswarm.adapters.printable import MAX_MESSAGE_CHARACTERS
from loraswarm.adapters.reading import read_adapter, read_adapter_info
from loraswarm.errors import AdapterError
from method_cases import METHOD_CASES


class MethodFuzzer:
    """Valid adapters of the methods in `cases`, and ways to spoil what they say."""

    def __init__(self, directory: Path, cases: Iterable[str] = tuple(METHOD_CASES)) -> None:
        self._directory = directory
        model = tiny_llama(num_layers=1)
        self._base = ModelBase(model)
        self._adapters: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
        for case in cases:
            path = directory / case
            METHOD_CASES[case](model, path)
            config = json.loads((path / CONFIG_FILE).read_text())
            self._adapters[case] = (config, load_file(path / WEIGHTS_FILE))
            assert self._outcome(*self._adapters[case]) == "read", case

    def run(self, seed: int) -> tuple[str, str]:
        """Case and outcome ("read" or "refused") of one input.

        Raises    whatever is a failure.
        """
        rng = random.Random(seed)
        case = rng.choice(list(self._adapters))
        config, tensors = self._adapters[case]
        config, tensors = json.loads(json.dumps(config)), dict(tensors)
        if rng.random() < 0.6:
            config[rng.choice(list(config))] = random_value(rng)
        else:
            _spoil_tensors(tensors, rng)
        start_s = time.perf_counter()
        outcome = self._outcome(config, tensors)
        elapsed_s = time.perf_counter() - start_s
        assert elapsed_s < MAX_SECONDS, f"{elapsed_s:.1f} s"
        return case, outcome

    def _outcome(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
        path = self._directory / "spoiled"
        path.mkdir(exist_ok=True)
        (path / CONFIG_FILE).write_text(json.dumps(config))
        save_file(tensors, path / WEIGHTS_FILE)
        try:
            info = read_adapter_info(path, "a", self._base.shape)
            adapter = read_adapter(info, self._base, torch.float32)
        except AdapterError as error:
            message = str(error)
        else:
            values = [*adapter.overlays, *adapter.shared.values()]
            for module in adapter.modules:
                values += [module.a_RI, module.bt_RO, *module.vectors.values()]
            assert all(value.isfinite().all() for value in values if value is not None)
            return "read"
        assert message.isprintable(), "a message of several lines, or with terminal escapes"
        assert len(message) <= MAX_MESSAGE_CHARACTERS, "a long message"
        return "refused"


def _spoil_tensors(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    match rng.randrange(7):
        case 0:
            del tensors[name]
        case 1:
            tensors[rng.choice([name + "x", name.replace("0", "9"), "x"])] = tensors.pop(name)
        case 2:
            tensors[name] = tensor.T.contiguous() if tensor.dim() == 2 else tensor[None]
        case 3:
            tensors[name] = tensor.to(rng.choice([torch.int32, torch.float64, torch.float16]))
        case 4:
            tensors[name] = tensor[: rng.randrange(len(tensor))].clone() if tensor.dim() else tensor
        case 5:
            tensors[name] = torch.full_like(tensor, rng.choice([0, -1, 3, 1000]))
        case _:
            if tensor.is_floating_point() and tensor.numel():
                tensors[name] = tensor.clone()
                values = [float("nan"), float("inf"), 1e38, -1e38, 0.0]
                tensors[name].view(-1)[rng.randrange(tensor.numel())] = rng.choice(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    outcomes: Counter[tuple[str, str]] = Counter()
    failures = 0
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        fuzzer = MethodFuzzer(Path(directory))
        for seed in range(options.seed, options.seed + options.inputs):
            try:
                outcomes[fuzzer.run(seed)] += 1
            except Exception as error:
                failures += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                print(
                    f"seed {seed}: {type(error).__name__}: {str(error)[:200]} in"
                    f" {Path(place.filename).name}:{place.lineno}",
                    flush=True,
                )
    for (case, outcome), count in sorted(outcomes.items()):
        print(f"{case:24} {outcome:8} {count:7}")
    elapsed_s = time.perf_counter() - start_s
    print(f"{options.inputs} inputs, {failures} failures, {elapsed_s:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
