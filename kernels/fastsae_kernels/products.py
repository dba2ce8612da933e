"""The products of a CPU's training step, on torch alone.

    linear            x @ weightᵀ + bias
    row_sums          sums[s] = Σ_{j in segment s} weights[j] · table[places[j]]
    sampled_products  dz[j]   = <left[s(j)], right[places[j]]>

torch multiplies float32 by MKL (or another BLAS); on AVX-512 its oneDNN runs at the cores' peak, where
MKL, on processors of another make, stays with AVX2. Both sum exact float32 products in float32, each in
an order of its own that depends on the shapes and on the number of threads.

In the sparse ones ``offsets [n + 1]`` (int32) delimit the segments. Deterministic: an output element
belongs to one thread, which adds a segment's entries in order.
"""

import functools
import warnings

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


def row_sums(weights: Tensor, places: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """``sums [n, D]`` of ``weights [nnz]`` and ``table [rows, D]``, all of one dtype."""
    if len(places) == 0 or table.shape[1] == 0:
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return torch.nn.functional.embedding_bag(
        places, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def sampled_products(left: Tensor, right: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """``dz [nnz]``: the products of ``left [n, D]`` with ``right [rows, D]`` at the entries only."""
    if len(places) == 0:
        return right.new_zeros(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        values, shape = right.new_zeros(len(places)), (len(left), len(right))
        pattern = torch.sparse_csr_tensor(offsets, places, values, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
