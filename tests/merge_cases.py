"""Views of an engine for merge policies, made up: who is there, and what is merged."""

from __future__ import annotations

from loraswarm.core.step_cost import StepCosts, StepWork
from loraswarm.engine.policies.merging import MergeCosts, MergeView, OpenRequest, StepSeen

MEGABYTE = 1_000_000
STEP_S = 0.05
COSTS = StepCosts(
    fixed_s=0.03,
    brackets=(0,),
    token_s=(0.001,),
    logit_row_s=0.0,
    lora_s=0.001,
    adapter_s=0.0005,
    adapted_token_s=0.0001,
    tile_byte_s=1e-10,
    lora_product_s=1e-11,
    kv_byte_s=0.0,
    attention_pair_s=0.0,
)
MEASURED = MergeCosts(step=COSTS, merge_s=0.1)


def key(name: str) -> tuple[str, str]:
    return name, "0"


def requests_of(names, outputs=100, prefill=0, num_running=10**6) -> tuple[OpenRequest, ...]:
    """One request for each letter, the oldest first; `.` is for the base."""
    return tuple(
        OpenRequest(
            request_id=f"{name}{place}",
            adapter=None if name == "." else key(name),
            is_running=place < num_running,
            prefill_tokens=prefill,
            output_tokens=outputs,
            waited_s=1.0,
        )
        for place, name in enumerate(names)
    )


def view_of(names, now_s=0.0, mergeable="abcdefgh", **others) -> MergeView:
    """Requests as letters; all adapters may be merged unless `mergeable` says which."""
    requests = others.pop("requests", None)
    fields = {
        "now_s": now_s,
        "requests": requests_of(names) if requests is None else requests,
        "mergeable": {key(name): 20 * MEGABYTE for name in mergeable},
        "num_seats": 32,
        "max_step_tokens": 256,
    }
    return MergeView(**(fields | others))


def seen(work: StepWork, seconds: float, **others) -> StepSeen:
    return StepSeen(work=work, seconds=seconds, **others)
