"""Costs to decide by where no machine was measured: of the right order, no more.

The same figures that memory/costs begins with. Used where no --cost-model is given.
"""

from __future__ import annotations

from loraswarm.core.client import EngineInfo
from loraswarm.core.cost_model import CostFigures, MachineRates, Residuals, TransferCosts
from loraswarm.core.step_cost import StepCosts

STEP_S = 0.05
PREFILL_TOKEN_S = 1e-3
READ_BYTE_S = 2e-9
COPY_BYTE_S = 2e-10
MEMORY_BYTE_S = 1e-10
UNKNOWN = Residuals(num_points=0, median_error=0.0, worst_error=0.0)


def plausible_costs(info: EngineInfo) -> CostFigures:
    """500 MB/s from a store, 5 GB/s into pages and between replicas, 10 GB/s of memory, 1,000
    prefill tokens a second, 50 ms a step."""
    step = StepCosts(
        fixed_s=STEP_S,
        brackets=(0,),
        token_s=(PREFILL_TOKEN_S,),
        logit_row_s=0.0,
        lora_s=0.0,
        adapter_s=0.0,
        adapted_token_s=0.0,
        tile_byte_s=MEMORY_BYTE_S,
        lora_product_s=0.0,
        kv_byte_s=MEMORY_BYTE_S,
        attention_pair_s=0.0,
    )
    return CostFigures(
        model=info.model,
        dtype="",
        quantize=None,
        num_threads=1,
        weight_bytes=info.weight_bytes,
        kv_token_bytes=info.page_bytes // info.page_tokens,
        step=step,
        load=TransferCosts(fixed_s=0.0, byte_s=READ_BYTE_S),
        copy=TransferCosts(fixed_s=0.0, byte_s=COPY_BYTE_S),
        merge_s=None,
        machine=MachineRates(
            read_bytes_per_s=1 / MEMORY_BYTE_S, copy_bytes_per_s=1 / COPY_BYTE_S, gemm=()
        ),
        fitted=UNKNOWN,
        checked=UNKNOWN,
        created="",
        environment={},
    )
