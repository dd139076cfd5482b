"""What calibrate has measured and fitted, as lines for people. Called by bench/calibrate."""

from __future__ import annotations

from collections.abc import Sequence

from loraswarm.bench.cost_fit import TimedStep, relative_error
from loraswarm.core.cost_model import CostFigures, MachineRates, Residuals, TransferCosts
from loraswarm.core.step_cost import StepCosts

BILLION = 1e9
DOUBTFUL_ERROR = 0.15


def rate_lines(machine: MachineRates) -> list[str]:
    """Bandwidths, and operations per second by linear and rows."""
    linears = list(dict.fromkeys(rate.linear for rate in machine.gemm))
    rows = sorted({rate.num_rows for rate in machine.gemm})
    found = {(rate.linear, rate.num_rows): rate.operations_per_s for rate in machine.gemm}
    lines = [
        f"memory: read {machine.read_bytes_per_s / BILLION:.1f} GB/s, "
        f"copied {machine.copy_bytes_per_s / BILLION:.1f} GB/s",
        f"{'GFLOP/s at rows':16}" + "".join(f"{count:>8}" for count in rows),
    ]
    for linear in linears:
        values = (found[linear, count] / BILLION for count in rows)
        lines.append(f"{linear:16}" + "".join(f"{value:8.0f}" for value in values))
    return lines


def step_lines(
    costs: StepCosts, fitted: Sequence[TimedStep], checked: Sequence[TimedStep]
) -> list[str]:
    """Every timed step beside what the costs predict."""
    lines = []
    for title, steps in (("fitted", fitted), ("not fitted", checked)):
        lines.append(f"{title:48}{'ms':>10}{'predicted':>11}{'error':>8}")
        for step in steps:
            predicted_ms = costs.step_s(step.work) * 1e3
            lines.append(
                f"  {step.label:46}{step.seconds * 1e3:10.3f}{predicted_ms:11.3f}"
                f"{relative_error(costs, step):+8.0%}"
            )
    return lines


def cost_lines(figures: CostFigures) -> list[str]:
    """The figures of the cost model in units that people can compare."""
    step = figures.step
    tokens = ", ".join(
        f"{seconds * 1e6:.1f} (from {begin})"
        for begin, seconds in zip(step.brackets, step.token_s, strict=True)
    )
    lines = [
        f"a step            {step.fixed_s * 1e3:.3f} ms",
        f"a token           {tokens} us",
        f"a row of logits   {step.logit_row_s * 1e6:.1f} us",
        f"any adapter       {step.lora_s * 1e6:.1f} us",
        f"each adapter      {step.adapter_s * 1e6:.1f} us",
        f"an adapted token  {step.adapted_token_s * 1e6:.1f} us",
        f"adapter bytes     {_ms_per_mb(step.tile_byte_s)} ms per MB read",
        f"adapter products  {_ms_per_mb(step.lora_product_s)} ms per MB and token",
        f"K and V           {_ms_per_mb(step.kv_byte_s)} ms per MB read",
        f"prompt attention  {step.attention_pair_s * 1e9:.2f} ns per pair of tokens",
        f"load              {_transfer(figures.load)}",
        f"copy to pages     {_transfer(figures.copy)}",
        f"merge             {_merge(figures.merge_s)}",
        f"fitted            {_residuals(figures.fitted)}",
        f"not fitted        {_residuals(figures.checked)}",
    ]
    if figures.checked.median_error > DOUBTFUL_ERROR:
        lines.append("doubtful: steps are not as predicted; is this machine doing something else?")
    return lines


def _ms_per_mb(byte_s: float) -> str:
    return f"{byte_s * 1e9:.4f}"


def _transfer(costs: TransferCosts) -> str:
    return f"{costs.fixed_s * 1e3:.2f} ms + {_ms_per_mb(costs.byte_s)} ms per MB"


def _residuals(found: Residuals) -> str:
    return (
        f"{found.num_points} steps, median error {found.median_error:.1%}, "
        f"worst {found.worst_error:.1%}"
    )


def _merge(seconds: float | None) -> str:
    return "cannot be" if seconds is None else f"{seconds * 1e3:.0f} ms into all linears"
