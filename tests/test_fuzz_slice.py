"""A few hundred spoiled files of each kind; the scripts in tests/long run many more."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "long"))

from fuzz_adapters import Fuzzer
from fuzz_methods import MethodFuzzer

NUM_INPUTS = 1500
NUM_METHOD_INPUTS = 300
CASES = ("lora", "dora", "bias-all", "embeddings", "adalora", "vera", "vblora", "tied-lora")


def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path):
    fuzzer = Fuzzer(tmp_path)
    fuzzer.check_valid()
    outcomes: Counter[tuple[str, str]] = Counter()
    with warnings.catch_warnings():
        # Python warns of regular expressions that a later version will read otherwise.
        warnings.simplefilter("ignore", FutureWarning)
        for seed in range(NUM_INPUTS):
            outcomes[fuzzer.run(seed)] += 1
    refused = {kind for kind, outcome in outcomes if outcome == "refused"}
    assert refused == set(fuzzer.kinds)
    assert sum(count for (_, outcome), count in outcomes.items() if outcome == "read") > 50


def test_spoiled_adapters_of_every_kind_of_method_are_read_or_refused(tmp_path):
    fuzzer = MethodFuzzer(tmp_path, CASES)
    outcomes: Counter[tuple[str, str]] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for seed in range(NUM_METHOD_INPUTS):
            outcomes[fuzzer.run(seed)] += 1
    expected = {(case, outcome) for case in CASES for outcome in ("read", "refused")}
    assert outcomes.keys() == expected
