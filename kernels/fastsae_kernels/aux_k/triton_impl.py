"""The kernels of aux-k; :mod:`fastsae_kernels.aux_k` has the mathematics, :mod:`.torch_impl` says what each
function returns."""

import torch
from torch import Tensor

from ..dispatch import cdiv, jit, power_of_2, tl
from ..dtypes import float_bits, rounded
from ..selection.triton_impl import positive_keys

# Columns that a program reads at a time: of one row, while it keeps the largest; more for many of those,
# whose bound is the better the more groups there are.
BLOCK_COLUMNS, MOST_COLUMNS, BLOCK_GATHERED = 1024, 8192, 256
BLOCK_LATENTS, SCAN_WARPS = 4096, 16
BLOCK_WIDTH = 512  # of rows [D]
MAX_PROGRAMS = 512  # that share out rows, each after adding up what there is of all
TILE = (64, 32)  # rows and columns of dA at a time


@jit
def _count_reaching(ptr, number, least, BLOCK: tl.constexpr):
    """How many of ``number`` integers, none of them negative, are ``least`` or more."""
    reached = tl.zeros([BLOCK], tl.int32)
    for start in range(0, number, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(ptr + place, mask=place < number, other=-1)
        reached += (value >= least).to(tl.int32)
    return tl.sum(reached, 0)


@jit
def compact_dead_kernel(
    since_ptr, b_enc_ptr, latents_ptr, slots_ptr, n_dead_ptr, bias_ptr,
    F, dead_after, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Number the dead latents, of more than ``rows`` those that have been dead longest; one program."""
    least = tl.full([], dead_after, tl.int64)
    ties = tl.full([], F, tl.int32)
    if _count_reaching(since_ptr, F, least, BLOCK) > rows:
        # Bit by bit, the count of the last of those that have been dead longest.
        least = tl.full([], 0, tl.int64)
        for i in range(0, 63):
            candidate = least + (tl.full([], 1, tl.int64) << (62 - i))
            reached = _count_reaching(since_ptr, F, candidate, BLOCK)
            least = tl.where(reached >= rows, candidate, least)
        ties = rows - _count_reaching(since_ptr, F, least + 1, BLOCK)
    taken = 0
    tied = 0
    for start in range(0, F, BLOCK):
        latent = start + tl.arange(0, BLOCK)
        since = tl.load(since_ptr + latent, mask=latent < F, other=-1)
        level = (since == least).to(tl.int32)
        dead = (since > least) | ((level > 0) & (tied + tl.cumsum(level, 0) <= ties))
        ones = dead.to(tl.int32)
        slot = taken + tl.cumsum(ones, 0) - ones
        tl.store(slots_ptr + latent, tl.where(dead, slot, -1), mask=latent < F)
        tl.store(latents_ptr + slot, latent, mask=dead)
        tl.store(bias_ptr + slot, tl.load(b_enc_ptr + latent, mask=dead), mask=dead)
        taken += tl.sum(ones, 0)
        tied += tl.sum(level, 0)
    tl.store(n_dead_ptr, taken)


@jit
def _row_keys(z_ptr, bias_ptr, start, used, columns, BLOCK: tl.constexpr):
    """A block of a row's pre-activations, and their keys: 0 where they are not positive or not ``used``."""
    column = start + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + column, mask=column < columns, other=0.0)
    z += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    keys = positive_keys(z.to(tl.int32, bitcast=True))
    return z, tl.where(column < used, keys, 0)


@jit
def keep_largest_kernel(
    z_ptr, bias_ptr, n_dead_ptr, key_ptr, out_ptr,
    columns, k, capacity,
    BLOCK: tl.constexpr, BLOCK_GATHERED: tl.constexpr,
):  # fmt: skip
    """One row a program: of ``n_dead`` columns the ``k`` largest positive entries, 0 elsewhere.

    Columns with one remainder by ``BLOCK`` are a group. The k-th largest maximum of a group is a bound, as
    in :mod:`.selection`: above it lie, in fewer than ``k`` groups, little more than ``k`` entries as a rule,
    of which the k-th largest is found bit by bit; or fewer, and it is the bound itself.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * columns
    out_ptr += row * columns
    key_ptr += row * capacity
    used = tl.load(n_dead_ptr).to(tl.int32)
    maxima = tl.zeros([BLOCK], tl.int32)
    for start in range(0, used, BLOCK):
        _, keys = _row_keys(z_ptr, bias_ptr, start, used, columns, BLOCK)
        maxima = tl.maximum(maxima, keys)
    bound = 0
    for i in range(0, 31):
        candidate = bound + (1 << (30 - i))
        reached = tl.sum((maxima >= candidate).to(tl.int32), 0)
        bound = tl.where(reached >= k, candidate, bound)

    gathered = 0
    for start in range(0, used, BLOCK):
        _, keys = _row_keys(z_ptr, bias_ptr, start, used, columns, BLOCK)
        ones = (keys > bound).to(tl.int32)
        tl.store(key_ptr + gathered + tl.cumsum(ones, 0) - ones, keys, mask=ones > 0)
        gathered += tl.sum(ones, 0)
    # They are read back by other threads than wrote them.
    tl.debug_barrier()

    kth = bound
    above = gathered
    level = bound * 0 + columns  # or fewer
    if gathered >= k:
        kth = bound * 0
        for i in range(0, 31):
            candidate = kth + (1 << (30 - i))
            reached = _count_reaching(key_ptr, gathered, candidate, BLOCK_GATHERED)
            kth = tl.where(reached >= k, candidate, kth)
        above = _count_reaching(key_ptr, gathered, kth + 1, BLOCK_GATHERED)
        level = _count_reaching(key_ptr, gathered, kth, BLOCK_GATHERED) - above
    ties = k - above
    too_many = level > ties
    for start in range(0, columns, BLOCK):
        z, keys = _row_keys(z_ptr, bias_ptr, start, used, columns, BLOCK)
        equal = (keys == kth) & (keys > 0)
        if too_many:
            ones = equal.to(tl.int32)
            equal = equal & (tl.cumsum(ones, 0) <= ties)
            ties -= tl.sum(ones, 0)
        column = start + tl.arange(0, BLOCK)
        kept = rounded(tl.where((keys > kth) | equal, z, 0.0), out_ptr.dtype.element_ty)
        tl.store(out_ptr + column, kept, mask=column < columns)


@jit
def error_sums_kernel(
    error_ptr, divisor_ptr, mean_ptr, sums_ptr,
    B, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each token the squared error and the squared deviation from the mean, into ``sums [2, B]``."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * D
    squared = tl.zeros([BLOCK], tl.float32)
    deviation = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        error = tl.load(error_ptr + start + column, mask=column < D, other=0.0)
        squared += error * error
        if divisor_ptr is not None:
            value = tl.load(divisor_ptr + start + column, mask=column < D, other=0.0)
            value -= tl.load(mean_ptr + column, mask=column < D, other=0.0)
            deviation += value * value
    tl.store(sums_ptr + row, tl.sum(squared, 0))
    tl.store(sums_ptr + B + row, tl.sum(deviation, 0))


@jit
def error_gradient_kernel(
    error_ptr, sums_ptr, n_dead_ptr, loss_ptr, gradient_ptr,
    B, D, tokens, k_aux, coefficient,
    NORMALIZED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    squared = tl.zeros([BLOCK_ROWS], tl.float32)
    deviation = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, B, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        squared += tl.load(sums_ptr + row, mask=row < B, other=0.0)
        deviation += tl.load(sums_ptr + B + row, mask=row < B, other=0.0)
    n_dead = tl.load(n_dead_ptr).to(tl.float32)
    scale = tl.minimum(n_dead / k_aux, 1.0) / tokens
    if NORMALIZED:
        variance = tl.sum(deviation, 0) / tokens
        scale = tl.where(variance > 0, scale, 0.0) / tl.where(variance > 0, variance, 1.0)
    if tl.program_id(0) == 0:
        loss = scale * tl.sum(squared, 0)
        tl.store(loss_ptr, tl.where(tl.abs(loss) < float("inf"), loss, 0.0))
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * D
        for first in range(0, D, BLOCK):
            column = first + tl.arange(0, BLOCK)
            error = tl.load(error_ptr + start + column, mask=column < D, other=0.0)
            gradient = error * (2 * scale)
            gradient = tl.where(tl.abs(gradient) < float("inf"), gradient, 0.0) * coefficient
            gradient = rounded(gradient, gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + start + column, gradient, mask=column < D)


@jit
def where_active_kernel(
    dA_ptr, A_ptr, out_ptr, sums_ptr,
    B, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dA`` where ``A`` is positive and 0 elsewhere, and its sum over the tokens."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, B, ROWS):
        row = first + tl.arange(0, ROWS)
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        inside = (row < B)[:, None] & (column < columns)[None, :]
        A = tl.load(A_ptr + place, mask=inside, other=0.0)
        dA = tl.where(float_bits(A) > 0, tl.load(dA_ptr + place, mask=inside, other=0.0), 0.0)
        tl.store(out_ptr + place, rounded(dA, out_ptr.dtype.element_ty), mask=inside)
        total += dA
    tl.store(sums_ptr + column, tl.sum(total, 0), mask=column < columns)


def compact(
    tokens_since_active: Tensor, dead_after: int, rows: int, b_enc: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = torch.empty_like(tokens_since_active, dtype=torch.int32)
    latents, bias = tokens_since_active.new_zeros(rows), b_enc.new_empty(rows)
    n_dead = tokens_since_active.new_empty(())
    compact_dead_kernel[(1,)](
        since_ptr=tokens_since_active.contiguous(), b_enc_ptr=b_enc.contiguous(),
        latents_ptr=latents, slots_ptr=slots, n_dead_ptr=n_dead, bias_ptr=bias,
        F=len(slots), dead_after=dead_after, rows=rows,
        BLOCK=BLOCK_LATENTS, num_warps=SCAN_WARPS,
    )  # fmt: skip
    return latents, slots, n_dead, bias


def keep_largest(Z: Tensor, k: int, bias: Tensor, n_dead: Tensor, dtype: torch.dtype) -> Tensor:
    rows, columns = Z.shape
    block = min(max(BLOCK_COLUMNS, power_of_2(4 * k)), MOST_COLUMNS)
    capacity = max(1, min(columns, k * cdiv(columns, block)))
    out = Z if dtype == Z.dtype else torch.empty_like(Z, dtype=dtype)
    keep_largest_kernel[(rows,)](
        z_ptr=Z, bias_ptr=bias, n_dead_ptr=n_dead, out_ptr=out,
        key_ptr=torch.empty(rows, capacity, dtype=torch.int32, device=Z.device),
        columns=columns, k=k, capacity=capacity,
        BLOCK=block, BLOCK_GATHERED=BLOCK_GATHERED, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return out


def loss_and_error_gradient(
    E: Tensor,
    divisor: Tensor | None,
    n_dead: Tensor,
    k_aux: int,
    coefficient: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    B, D = E.shape
    loss, sums = E.new_empty(()), E.new_empty(2, B)
    gradient = E if dtype == E.dtype else torch.empty_like(E, dtype=dtype)
    mean = None
    if divisor is not None:
        divisor = divisor.to(E.dtype).contiguous()
        mean = divisor.mean(0)
    error_sums_kernel[(B,)](
        error_ptr=E, divisor_ptr=divisor, mean_ptr=mean, sums_ptr=sums,
        B=B, D=D,
        BLOCK=BLOCK_WIDTH,
    )  # fmt: skip
    error_gradient_kernel[(min(B, MAX_PROGRAMS),)](
        error_ptr=E, sums_ptr=sums, n_dead_ptr=n_dead, loss_ptr=loss, gradient_ptr=gradient,
        B=B, D=D, tokens=float(B), k_aux=float(max(k_aux, 1)), coefficient=coefficient,
        NORMALIZED=mean is not None, BLOCK=BLOCK_WIDTH, BLOCK_ROWS=BLOCK_COLUMNS,
    )  # fmt: skip
    return loss, gradient


def where_active(dA: Tensor, A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (B, columns), (rows, block) = dA.shape, TILE
    out = dA if dtype == dA.dtype else torch.empty_like(dA, dtype=dtype)
    sums = dA.new_empty(columns)
    where_active_kernel[(cdiv(columns, block),)](
        dA_ptr=dA, A_ptr=A, out_ptr=out, sums_ptr=sums,
        B=B, columns=columns,
        ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return out, sums
