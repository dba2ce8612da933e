"""The matrix product of a CPU, by the faster of the two libraries that torch brings.

torch multiplies float32 by MKL (or another BLAS) and uses oneDNN for other things. On AVX-512 oneDNN
runs at the cores' peak, where MKL, on processors of another make, stays with AVX2. Both sum exact
float32 products in float32, each in an order of its own that depends on the shapes and on the number
of threads.
"""

import functools

import torch
from torch import Tensor

# Fewer operations than this are over before oneDNN has looked its program up.
MIN_ONEDNN_PRODUCTS = 2**22


@functools.cache
def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [m, k] @ weight [n, k]ᵀ + bias [n]``, all of one dtype, float32 or float64."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32
    large = x.numel() * len(weight) >= MIN_ONEDNN_PRODUCTS
    if fits and large and torch.backends.mkldnn.enabled and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if bias is None:
        return x @ weight.T
    return torch.addmm(bias, x, weight.T)
