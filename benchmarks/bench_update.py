"""From the residual to updated weights, against dense gradients and torch's fused Adam."""

import ops
import pytest


@pytest.mark.parametrize("provider", ["fastsae", "torch, eager", "torch, compiled"])
def bench_weight_update(compare, shape, device, provider):
    compare(ops.update(shape, "fp32", device), provider)
