"""Every peer that can be installed, and ours, on the same workloads: one table of ratios.

    python benchmarks/peers/run_all.py --json benchmarks/results/peers-zen5-4cores.json

Takes hours: the slowest peer needs minutes for a workload. Nothing else should run meanwhile.
"""

from __future__ import annotations

from llama_cpp import LlamaCpp
from ours import Ours
from session import main
from transformers_peft import TransformersPeft
from vllm_cpu import VllmCpu

if __name__ == "__main__":
    main(
        [
            Ours(),
            VllmCpu(has_adapters=False),
            VllmCpu(has_adapters=True),
            TransformersPeft(has_adapters=False),
            TransformersPeft(has_adapters=True),
            LlamaCpp(),
        ]
    )
