"""A cost model for tests whose figures are known."""

from __future__ import annotations

import dataclasses
import json

from loraswarm.core.cost_model import CostFigures
from loraswarm.core.step_cost import StepCosts

BRACKETS = (0, 4, 16, 64)
KNOWN = StepCosts(
    fixed_s=0.02,
    brackets=BRACKETS,
    token_s=(1e-5, 2e-4, 9e-4, 7e-4),
    logit_row_s=3e-4,
    lora_s=7e-4,
    adapter_s=5e-5,
    adapted_token_s=3e-5,
    tile_byte_s=3e-11,
    lora_product_s=2e-12,
    kv_byte_s=4e-11,
    attention_pair_s=2e-8,
)
KV_TOKEN_BYTES = 12_288


def figures(**changes: object) -> CostFigures:
    document = {
        "model": "tiny",
        "dtype": "float32",
        "quantize": None,
        "num_threads": 2,
        "weight_bytes": 7,
        "kv_token_bytes": KV_TOKEN_BYTES,
        "step": dataclasses.asdict(KNOWN),
        "load": {"fixed_s": 0.01, "byte_s": 1e-9},
        "copy": {"fixed_s": 0.001, "byte_s": 1e-10},
        "merge_s": 0.3,
        "machine": {
            "read_bytes_per_s": 3e10,
            "copy_bytes_per_s": 1e10,
            "gemm": [{"linear": "o_proj", "num_rows": 1, "operations_per_s": 1e11}],
        },
        "fitted": {"num_points": 3, "median_error": 0.01, "worst_error": 0.2},
        "checked": {"num_points": 1, "median_error": 0.02, "worst_error": 0.02},
        "created": "2025-01-01T00:00:00+00:00",
        "environment": {"cpu": None, "num_cores": 4},
        **changes,
    }
    document |= {"format": "loraswarm-cost-model", "format_version": 1}
    return CostFigures.from_document(json.loads(json.dumps(document)))
