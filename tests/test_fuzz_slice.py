"""A few hundred mutated files of each kind; tests/long/fuzz_adapters.py runs many more."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "long"))

from fuzz_adapters import Fuzzer

NUM_INPUTS = 1500


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
