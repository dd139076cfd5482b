"""The one table of tolerances; no test widens it."""

import torch

# (relative, absolute): rounding of one result to the dtype, after sums in float32. Logits of a
# 2-layer model of random weights are of order 1.
TOLERANCE = {
    torch.float32: (1e-4, 1e-4),
    torch.bfloat16: (3e-2, 3e-2),
    torch.float16: (5e-3, 5e-3),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Compare in float32 with the tolerance of `dtype`."""
    relative, absolute = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=absolute)
