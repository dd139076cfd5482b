"""Where engines and Triton's kernels are tested: the CPU, unless LORASWARM_TEST_DEVICE is cuda."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("LORASWARM_TEST_DEVICE", "cpu"))
