"""Selections with segments of chosen lengths, for the tests of what runs on a CSR and its CSC."""

import torch
from fastsae_kernels.reference import to_csc, to_csr
from fastsae_kernels.sparse import CSC, CSR


def selection(mask, values, spare: int = 3) -> tuple[CSR, CSC]:
    """``values [B, F]`` where ``mask``, in both sparse forms, with ``spare`` unused slots."""
    csr, csc = to_csr(values, mask), to_csc(mask)
    pad = lambda t: torch.cat([t, t.new_zeros(spare)])
    return (
        CSR(pad(csr.values), pad(csr.indices), csr.offsets),
        CSC(pad(csc.rows), pad(csc.positions), csc.offsets),
    )


def ragged_mask(tokens: int, latents: int, row_lengths: dict[int, int], density: float, seed: int):
    """A random mask in which row ``b`` has exactly ``row_lengths[b]`` entries, spread over it."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, latents, generator=generator) < density
    for row, length in row_lengths.items():
        mask[row] = False
        mask[row, torch.randperm(latents, generator=generator)[:length]] = True
    return mask
