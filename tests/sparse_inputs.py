"""Inputs of the operations on a selection: ragged segments in both sparse forms, on every backend."""

import pytest
import torch
from torch import Tensor

from fastsae_kernels.reference import to_csc, to_csr
from fastsae_kernels.sparse import CSC, CSR

# What the ``device`` fixtures of these tests go through: where the tensors are, and what runs on them.
BACKENDS = [
    pytest.param(("cpu", "torch"), id="torch"),
    pytest.param(
        ("cpu", "triton"),
        id="interpreter",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on CUDA here"),
    ),
    pytest.param(("cuda", "triton"), id="cuda", marks=pytest.mark.gpu),
]

# Empty, single, and on either side of a chunk's 128 entries.
LENGTHS = (0, 1, 127, 128, 129)


def ragged_mask(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Row ``b`` has ``LENGTHS[b]`` entries, the next row all, the others about a tenth."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.1
    for row, length in enumerate(LENGTHS):
        mask[row] = False
        mask[row, torch.randperm(columns, generator=generator)[:length]] = True
    mask[len(LENGTHS)] = True
    return mask


def selection(mask: Tensor, values: Tensor, spare: int = 3) -> tuple[CSR, CSC]:
    """``values [B, F]`` where ``mask``, in both sparse forms, with ``spare`` unused slots."""
    csr, csc = to_csr(values, mask), to_csc(mask)
    pad = lambda t: torch.cat([t, t.new_zeros(spare)])
    return (
        CSR(pad(csr.values), pad(csr.indices), csr.offsets),
        CSC(pad(csc.rows), pad(csc.positions), csc.offsets),
    )
