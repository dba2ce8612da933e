"""Encoding and selecting, against eager and compiled torch and SAELens's own module."""

import ops
import pytest

DENSE = ("fastsae", "torch, eager", "torch, compiled")
SELECTORS = (*DENSE, "fastsae, without group maxima", "SAELens")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", DENSE)
def bench_encode(compare, shape, device, dtype, provider):
    compare(ops.encode(shape, dtype, device), provider)


@pytest.mark.parametrize("provider", SELECTORS)
def bench_batch_selection(compare, shape, device, provider):
    compare(ops.selection(shape, "fp32", device), provider)


@pytest.mark.parametrize("provider", DENSE)
def bench_per_token_selection(compare, shape, device, provider):
    compare(ops.per_token_selection(shape, "fp32", device), provider)
