"""The two sparse products of a CPU's training step, on torch alone.

    sums[s] = Σ_{j in segment s} weights[j] · table[places[j]]
    dz[j]   = <left[s(j)], right[places[j]]>

``offsets [n + 1]`` (int32) delimit the segments. Deterministic: an output element belongs to one
thread, which adds a segment's entries in order.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


def row_sums(weights: Tensor, places: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """``sums [n, D]`` of ``weights [nnz]`` and ``table [rows, D]``, all of one dtype."""
    if len(places) == 0:
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return F.embedding_bag(
        places, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def sampled_products(left: Tensor, right: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    """``dz [nnz]``: the products of ``left [n, D]`` with ``right [rows, D]`` at the entries only."""
    if len(places) == 0:
        return right.new_zeros(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            offsets,
            places,
            right.new_zeros(len(places)),
            (len(left), len(right)),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
