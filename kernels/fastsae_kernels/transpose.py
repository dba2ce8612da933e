"""A selection by latent: CSR to CSC, a stable counting sort, digit by digit.

8 bits a pass, least significant first: entries of one latent keep the order of their tokens. Moves
about 40 B an entry and digit. Deterministic, bit for bit: only integers are added, and no place depends
on arrival order.
"""

import torch
from torch import Tensor

from .dispatch import implementation, jit, register, tl, triton
from .sparse import CSC, CSR

BLOCK_SORT = 256
STEP_SORT = 16
SORT_WARPS = 8

_Parts = tuple[Tensor, Tensor, Tensor]  # rows, positions and offsets of the CSC form


@jit
def _sort_keys(slots, order_ptr, indices_ptr, nnz, capacity, F, FIRST: tl.constexpr):
    """CSR place and latent of the sort's slots; empty places have latent ``F`` and so come last."""
    place = slots if FIRST else tl.load(order_ptr + slots, mask=slots < capacity, other=0)
    latent = tl.load(indices_ptr + place, mask=(slots < capacity) & (place < nnz), other=0)
    return place, tl.where(place < nnz, latent, F)


@jit
def count_latents_kernel(
    order_ptr, indices_ptr, row_offsets_ptr, counts_ptr, latent_counts_ptr,
    B, F, capacity,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Digit histogram of each block, digit-major; in the first pass also how often a latent occurs."""
    block = tl.program_id(0)
    nnz = tl.load(row_offsets_ptr + B)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    place, latent = _sort_keys(slots, order_ptr, indices_ptr, nnz, capacity, F, SHIFT == 0)
    inside = slots < capacity
    if SHIFT == 0:
        tl.atomic_add(latent_counts_ptr + latent + 1, 1, mask=inside & (place < nnz), sem="relaxed")
    counts = tl.histogram((latent >> SHIFT) & 255, 256, mask=inside)
    tl.store(counts_ptr + 1 + tl.arange(0, 256) * tl.num_programs(0) + block, counts)


@jit
def scatter_latents_kernel(
    order_ptr, indices_ptr, row_offsets_ptr, starts_ptr, out_ptr, rows_ptr,
    B, F, capacity, search_steps,
    SHIFT: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Move each entry behind those with a smaller digit, and those with the same digit before it."""
    block = tl.program_id(0)
    nnz = tl.load(row_offsets_ptr + B)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    place, latent = _sort_keys(slots, order_ptr, indices_ptr, nnz, capacity, F, SHIFT == 0)
    digit = (latent >> SHIFT) & 255
    inside = slots < capacity

    target = tl.load(starts_ptr + digit * tl.num_programs(0) + block, mask=inside, other=0)
    for start in range(0, BLOCK, STEP):
        others = block * BLOCK + start + tl.arange(0, STEP)
        _, other = _sort_keys(others, order_ptr, indices_ptr, nnz, capacity, F, SHIFT == 0)
        # [BLOCK, STEP]
        same = digit[:, None] == ((other >> SHIFT) & 255)[None, :]
        target += tl.sum((same & (others[None, :] < slots[:, None])).to(tl.int32), 1)

    if LAST:
        filled = inside & (place < nnz)
        # The token of a place: the last row that starts at or before it.
        low = place * 0
        high = low + B
        for _ in range(search_steps):
            middle = (low + high) // 2
            reached = tl.load(row_offsets_ptr + middle, mask=filled, other=0) <= place
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
        tl.store(rows_ptr + target, tl.where(filled, low, 0), mask=inside)
        place = tl.where(filled, place, 0)
    tl.store(out_ptr + target, place, mask=inside)


def _csr_to_csc_triton(indices: Tensor, row_offsets: Tensor, latents: int) -> _Parts:
    capacity, B = len(indices), len(row_offsets) - 1
    blocks = triton.cdiv(capacity, BLOCK_SORT)
    offsets = torch.zeros(latents + 1, dtype=torch.int32, device=indices.device)
    order, positions, rows = (torch.empty_like(indices) for _ in range(3))
    shared = {"indices_ptr": indices, "row_offsets_ptr": row_offsets}
    shared |= {"B": B, "F": latents, "capacity": capacity, "BLOCK": BLOCK_SORT}
    # The sentinel of an empty place is `latents` itself, so its bits count.
    shifts = range(0, max(latents.bit_length(), 1), 8)
    # Passes alternate between two arrays so that the last one writes `positions`.
    source, target = (order, positions) if len(shifts) % 2 else (positions, order)
    for shift in shifts:
        counts = torch.zeros(256 * blocks + 1, dtype=torch.int32, device=indices.device)
        count_latents_kernel[(blocks,)](
            **shared, order_ptr=source, counts_ptr=counts, latent_counts_ptr=offsets, SHIFT=shift
        )
        scatter_latents_kernel[(blocks,)](
            **shared, order_ptr=source, starts_ptr=counts.cumsum(0, dtype=torch.int32),
            out_ptr=target, rows_ptr=rows,
            search_steps=(B - 1).bit_length(),
            SHIFT=shift, LAST=shift == shifts[-1], STEP=STEP_SORT, num_warps=SORT_WARPS,
        )  # fmt: skip
        source, target = target, source
    return rows, positions, offsets.cumsum(0, dtype=torch.int32)


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

    Deterministic; never waits for a GPU. Moves about 40 B an entry and digit. Raises ValueError
    unless indices and offsets are int32 vectors.
    """
    for name in ("indices", "offsets"):
        tensor = getattr(csr, name)
        if tensor.ndim != 1 or tensor.dtype != torch.int32:
            raise ValueError(
                f"csr_to_csc: {name} must be an int32 vector, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; pass the CSR that batch_topk or topk returned"
            )
    return CSC(*_csr_to_csc(csr.indices, csr.offsets, latents))
