"""Decoding a selection, against dense products and torch's embedding_bag."""

import ops
import pytest

PROVIDERS = (
    "fastsae",
    "torch, eager",
    "torch, compiled",
    "torch, embedding_bag (sparsify's on a CPU)",
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_decode(compare, shape, device, dtype, provider):
    compare(ops.decode(shape, dtype, device), provider)
