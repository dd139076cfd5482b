"""What serving each adapter takes of replicas, by the cost model, and what bringing it there costs.

Arrays with a row an adapter; names stay outside. Made by the planner for one plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraswarm.cluster.placement.forecast import Floats, Rates
from loraswarm.cluster.routing.costs import DecodeRows, StepEstimates
from loraswarm.cluster.view import ClusterView, ReplicaLimits

TYPICAL_CONTEXT = 512


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """Loads are shares of a replica's time: 1 keeps one replica busy.

    `work` is what an adapter's tokens take wherever they are computed. `rows` is how many rows of a
    step are its own, on the mean, if one replica has all of them, and `present` what a step loses
    by reading its tiles, as a share of the step. `churn` is what bringing it to a replica takes,
    spread over the time for which a plan is made.
    """

    num_bytes: Floats
    work: Floats
    rows: Floats
    present: Floats
    churn: Floats

    @classmethod
    def of(cls, rates: Rates, view: ClusterView, limits: ReplicaLimits, horizon_s: float) -> Demand:
        """From rates, for replicas of these limits; a step has half of its seats taken."""
        known = view.adapter_bytes
        num_bytes = np.array([known.get(name, 0) for name in rates.names], dtype=np.float64)
        steps, step = StepEstimates(view.costs), view.costs.step
        num_rows = max(1, limits.num_seats // 2)
        mean_bytes = float(num_bytes.mean()) if len(num_bytes) else 0.0
        contexts = num_rows * TYPICAL_CONTEXT
        step_s = steps.decode_s(DecodeRows(num_rows, contexts, num_rows, mean_bytes))
        plain_s = steps.decode_s(DecodeRows(num_rows, contexts, 0, 0.0)) / num_rows
        own_s = step.adapted_token_s + step.lora_product_s * num_bytes
        prompt_s = steps.queued_prefill_s(1, limits.max_step_tokens) + own_s
        work = rates.prompt_rates * prompt_s + rates.output_rates * (plain_s + own_s)
        distinct_s = step.adapter_s + step.tile_byte_s * num_bytes
        load, copy = view.costs.load, view.costs.copy
        bring_s = load.fixed_s + copy.fixed_s + (load.byte_s + copy.byte_s) * num_bytes
        return cls(
            num_bytes=num_bytes,
            work=work,
            rows=rates.output_rates * step_s,
            present=distinct_s / step_s,
            churn=bring_s / horizon_s,
        )

    def copy_loads(self, num_copies: Floats) -> Floats:
        """Load of one of so many equal copies of each adapter.

        work / k + present * (1 - e^(-rows / k)): the rows of a step are taken to be independent, so
        that a step has none of the adapter's with probability e^(-rows / k). Splitting an adapter
        costs reading its tiles in more steps.
        """
        num_copies = np.maximum(num_copies, 1.0)
        return self.work / num_copies + self.present * -np.expm1(-self.rows / num_copies)
