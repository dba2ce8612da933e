"""A selection by latent: CSR to CSC, in four launches.

A *cell* is a latent and 256 tokens, with a bit for each of them. Entries set their bits and are counted,
the counts are added up over all cells, and then each entry knows its place: where its cell starts, and how
many bits of the cell stand before its own. Deterministic, bit for bit: only integers are added, and no
place depends on arrival order.

Bytes moved: ``B·F/8`` of bits, a sixteenth of 16-bit pre-activations, ``3·B·F/64`` of counts, and about
200 an entry, through L2.
"""

import torch
from torch import Tensor

from .dispatch import cdiv, implementation, jit, register, tl
from .sparse import CSC, CSR

# A cell's bits are 32 bytes, what a GPU reads at once.
WORDS = tl.constexpr(8)
TOKENS = tl.constexpr(32 * 8)
BLOCK_ENTRIES = 128
BLOCK_CELLS = 1024

_Parts = tuple[Tensor, Tensor, Tensor]  # rows, positions and offsets of the CSC form


@jit
def mark_entries_kernel(
    indices_ptr, row_offsets_ptr, bits_ptr, counts_ptr, block_counts_ptr, tokens_ptr,
    B, cells_per_latent, search_steps,
    BLOCK: tl.constexpr, BLOCK_CELLS: tl.constexpr,
):  # fmt: skip
    """Set each entry's bit, count it in its cell and in its block of cells, and keep its token."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    filled = slots < tl.load(row_offsets_ptr + B)
    # The token of a slot: the last row that starts at or before it.
    low = slots * 0
    high = low + B
    for _ in range(search_steps):
        middle = (low + high) // 2
        reached = tl.load(row_offsets_ptr + middle, mask=filled, other=0) <= slots
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    latent = tl.load(indices_ptr + slots, mask=filled, other=0)
    cell = latent.to(tl.int64) * cells_per_latent + low // TOKENS
    word = cell * WORDS + low % TOKENS // 32
    tl.atomic_or(bits_ptr + word, 1 << (low & 31), mask=filled, sem="relaxed")
    tl.atomic_add(counts_ptr + cell, 1, mask=filled, sem="relaxed")
    tl.atomic_add(block_counts_ptr + cell // BLOCK_CELLS, 1, mask=filled, sem="relaxed")
    tl.store(tokens_ptr + slots, low, mask=filled)


@jit
def start_cells_kernel(
    counts_ptr, block_counts_ptr, offsets_ptr,
    cells, cells_per_latent,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Make each cell's count its start: how many entries stand in the cells before it."""
    block = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, block, BLOCK):
        other = first + tl.arange(0, BLOCK)
        before += tl.load(block_counts_ptr + other, mask=other < block, other=0)
    cell = block * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts_ptr + cell, mask=cell < cells, other=0)
    start = tl.sum(before, 0) + tl.cumsum(count, 0) - count
    tl.store(counts_ptr + cell, start, mask=cell < cells)
    latent = cell // cells_per_latent
    first_of_latent = (cell <= cells) & (cell % cells_per_latent == 0)
    tl.store(offsets_ptr + latent, start, mask=first_of_latent)


@jit
def _ones(words):
    """How many bits of each int32 are set."""
    words = words.to(tl.uint32, bitcast=True)
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@jit
def place_entries_kernel(
    indices_ptr, row_offsets_ptr, bits_ptr, starts_ptr, tokens_ptr, rows_ptr, positions_ptr,
    B, capacity, cells_per_latent,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move each entry behind those of the cells before its own, and of the tokens before its own."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    filled = slots < tl.load(row_offsets_ptr + B)
    token = tl.load(tokens_ptr + slots, mask=filled, other=0)
    latent = tl.load(indices_ptr + slots, mask=filled, other=0)
    cell = latent.to(tl.int64) * cells_per_latent + token // TOKENS
    word = tl.arange(0, WORDS)[None, :]
    bits = tl.load(  # [BLOCK, WORDS]
        bits_ptr + cell[:, None] * WORDS + word, mask=filled[:, None], other=0
    )
    # How many of a word's tokens stand before the entry's own, and their bits.
    before = tl.minimum(tl.maximum((token % TOKENS)[:, None] - 32 * word, 0), 32)
    earlier = tl.where(before < 32, (1 << (before & 31)) - 1, -1)
    place = tl.load(starts_ptr + cell, mask=filled, other=0) + tl.sum(_ones(bits & earlier), 1)
    # The places that are left are zero.
    place = tl.where(filled, place, slots)
    tl.store(rows_ptr + place, token, mask=slots < capacity)
    tl.store(positions_ptr + place, tl.where(filled, slots, 0), mask=slots < capacity)


def _csr_to_csc_triton(indices: Tensor, row_offsets: Tensor, latents: int) -> _Parts:
    B, (tokens, rows, positions) = len(row_offsets) - 1, (torch.empty_like(indices) for _ in "trp")
    cells_per_latent = cdiv(B, TOKENS.value)
    cells = latents * cells_per_latent
    # The end of the last latent stands where another cell would start.
    blocks = cdiv(cells + 1, BLOCK_CELLS)
    sizes = cells * WORDS.value, cells, blocks
    zeros = torch.zeros(sum(sizes), dtype=torch.int32, device=indices.device)
    bits, counts, block_counts = zeros.split(sizes)
    offsets = indices.new_empty(latents + 1)
    entries = {
        "indices_ptr": indices, "row_offsets_ptr": row_offsets, "bits_ptr": bits, "tokens_ptr": tokens,
        "B": B, "cells_per_latent": cells_per_latent, "BLOCK": BLOCK_ENTRIES,
    }  # fmt: skip
    grid = (cdiv(len(indices), BLOCK_ENTRIES),)
    mark_entries_kernel[grid](
        counts_ptr=counts, block_counts_ptr=block_counts,
        search_steps=(B - 1).bit_length(),
        BLOCK_CELLS=BLOCK_CELLS,
        **entries,
    )  # fmt: skip
    start_cells_kernel[(blocks,)](
        counts_ptr=counts, block_counts_ptr=block_counts, offsets_ptr=offsets,
        cells=cells, cells_per_latent=cells_per_latent,
        BLOCK=BLOCK_CELLS,
    )  # fmt: skip
    place_entries_kernel[grid](
        starts_ptr=counts, rows_ptr=rows, positions_ptr=positions,
        capacity=len(indices),
        **entries,
    )  # fmt: skip
    return rows, positions, offsets


def csr_to_csc_torch(indices: Tensor, row_offsets: Tensor, latents: int) -> _Parts:
    nnz = int(row_offsets[-1])
    rows, positions = torch.zeros_like(indices), torch.zeros_like(indices)
    order = indices[:nnz].sort(stable=True)
    positions[:nnz] = order.indices
    rows[:nnz] = torch.searchsorted(row_offsets, order.indices.int(), right=True) - 1
    boundaries = torch.arange(latents + 1, dtype=torch.int32, device=indices.device)
    return rows, positions, torch.searchsorted(order.values, boundaries).int()


def _fake(indices: Tensor, row_offsets: Tensor, latents: int) -> _Parts:
    return torch.empty_like(indices), torch.empty_like(indices), indices.new_empty(latents + 1)


@register(fake=_fake)
def _csr_to_csc(indices: Tensor, row_offsets: Tensor, latents: int) -> _Parts:
    if len(indices) == 0 or len(row_offsets) == 1:
        return torch.zeros_like(indices), torch.zeros_like(indices), indices.new_zeros(latents + 1)
    if implementation(indices) == "torch":
        return csr_to_csc_torch(indices, row_offsets, latents)
    return _csr_to_csc_triton(indices.contiguous(), row_offsets.contiguous(), latents)


def csr_to_csc(csr: CSR, latents: int) -> CSC:
    """The entries of ``csr`` by latent; within one, by token.

    The latents of a token are distinct. Deterministic; never waits for a GPU, which holds B·F/8 and
    B·F/64 bytes while it sorts. Raises ValueError unless indices and offsets are int32 vectors.
    """
    for name in ("indices", "offsets"):
        tensor = getattr(csr, name)
        if tensor.ndim != 1 or tensor.dtype != torch.int32:
            raise ValueError(
                f"csr_to_csc: {name} must be an int32 vector, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; pass the CSR that batch_topk or topk returned"
            )
    return CSC(*_csr_to_csc(csr.indices, csr.offsets, latents))
