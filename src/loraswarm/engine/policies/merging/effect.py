"""What merging an adapter does to the work of a step: the formula that policies reckon with.

Rows of the merged adapter have no LoRA work; every other row, of the base too, has its own tiles
and the merged one's with the sign reversed. Pure arithmetic on core/step_cost; used by the policies
to predict, and by the simulator as the truth.
"""

from __future__ import annotations

from dataclasses import replace

from loraswarm.core.step_cost import StepCosts, StepWork


def merged_work(work: StepWork, num_hot_tokens: int, merged_bytes: int) -> StepWork:
    """The work of a step with an adapter of `merged_bytes` merged into everything.

    `work` is that with nothing merged; `num_hot_tokens` of its tokens have that adapter.
    """
    others = work.num_tokens - num_hot_tokens
    if others == 0:
        return replace(work, num_adapters=0, num_adapted_tokens=0, tile_bytes=0, lora_products=0)
    is_there = num_hot_tokens > 0
    return replace(
        work,
        num_adapters=work.num_adapters + (not is_there),
        num_adapted_tokens=others,
        tile_bytes=work.tile_bytes + (0 if is_there else merged_bytes),
        lora_products=work.lora_products + (others - num_hot_tokens) * merged_bytes,
    )


def lora_s(costs: StepCosts, work: StepWork) -> float:
    """The part of a step's seconds that adapters cause."""
    return (
        costs.lora_s * (work.num_adapters > 0)
        + costs.adapter_s * work.num_adapters
        + costs.adapted_token_s * work.num_adapted_tokens
        + costs.tile_byte_s * work.tile_bytes
        + costs.lora_product_s * work.lora_products
    )


def shared_lora_s(costs: StepCosts, work: StepWork, merged: StepWork, merged_share: float) -> float:
    """The same with `merged_share` of all layers' bytes merged: a sum over layers is linear."""
    part = 0.0 if merged_share == 1.0 else (1.0 - merged_share) * lora_s(costs, work)
    return part + merged_share * lora_s(costs, merged)
