"""Aux-k on torch; :mod:`fastsae_kernels.aux_k` has the mathematics."""

import torch
from torch import Tensor

from ..dtypes import accumulator
from ..products import linear, row_sums, sampled_products
from ..selection.torch_impl import keep_largest as largest
from ..transpose import csr_to_csc_torch
from ..update.torch_impl import BLOCK_LATENTS

# Columns of a strip of W_dec, and tokens whose entries are selected together, where entries are gathered.
STRIP = 64
TOKENS_PER_SELECTION = 128


def chosen_dead(tokens_since_active: Tensor, dead_after: int, max_dead: int) -> Tensor:
    """The dead latents ``[F]`` bool, of more than ``max_dead`` those that have been dead longest."""
    dead = tokens_since_active >= dead_after
    if max_dead >= len(dead):
        return dead
    longest = tokens_since_active.sort(descending=True, stable=True).indices[:max_dead]
    return dead & torch.zeros_like(dead).index_fill_(0, longest, True)


def compact(
    tokens_since_active: Tensor, dead_after: int, rows: int, b_enc: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``latents [rows]`` ascending (0 where unused), ``slots [F]`` (-1: none), ``n_dead []`` and the latents'
    ``bias [rows]``, of :func:`chosen_dead`."""
    dead = chosen_dead(tokens_since_active, dead_after, rows)
    count = dead.cumsum(0)
    slots = torch.where(dead, count - 1, -1).to(torch.int32)
    # The latents that have no slot all write to one place beyond the others, which is cut off.
    place = torch.where(dead, count - 1, rows)
    latents = torch.zeros(rows + 1, dtype=torch.int64, device=dead.device)
    latents.scatter_(0, place, torch.arange(len(dead), device=dead.device))
    latents = latents[:rows]
    return latents, slots, dead.sum(), b_enc[latents]


def keep_largest(Z: Tensor, k: int, bias: Tensor, n_dead: Tensor, dtype: torch.dtype) -> Tensor:
    """``Z [B, n] + bias [n]`` with all but each row's ``k`` largest positive entries among the first ``n_dead``
    columns set to zero, in ``dtype`` or more precise; overwrites ``Z``."""
    rows, columns = Z.shape
    unused = torch.arange(columns, device=Z.device) >= n_dead
    Z = (Z + bias.to(Z.dtype)).masked_fill_(unused, 0.0)
    if k == 0:
        return Z.zero_()
    if k >= columns or rows == 0:
        return Z.nan_to_num_(0.0, float("inf"), 0.0).clamp_(min=0)
    positive = torch.where(Z > 0, Z, 0)  # NaN is not
    return Z.copy_(torch.where(largest(positive, k, positive=True), positive, 0))


def loss_and_error_gradient(
    E: Tensor, divisor: Tensor | None, n_dead: Tensor, k_aux: int, coefficient: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``aux []`` and ``coefficient · dE [B, D]`` in ``dtype``; the denominator is the variance of ``divisor``."""
    scale = (n_dead.to(E.dtype) / max(k_aux, 1)).clamp(max=1) / max(len(E), 1)
    if divisor is not None:
        divisor = divisor.to(E.dtype)
        scale = scale / (divisor - divisor.mean(0)).square().sum(1).mean()
    some = n_dead > 0
    loss = torch.where(some, torch.nan_to_num(scale * E.square().sum(), 0.0, 0.0, 0.0), 0.0)
    dE = E.mul_(2 * scale).nan_to_num_(0.0, 0.0, 0.0).masked_fill_(~some, 0.0)
    return loss, dE.mul_(coefficient).to(dtype)


def where_active(dA: Tensor, A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``dA [B, n]`` where ``A`` is positive and 0 elsewhere, in ``dtype``, and its sums ``[n]``; overwrites it."""
    dA.mul_(A > 0)
    return dA.to(dtype), dA.sum(0)


def gathered_gradients(
    tokens_since_active: Tensor, dead_after: int, n: int, x: Tensor, residual: Tensor, W_enc: Tensor,
    b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, divisor: Tensor | None, k_aux: int, coefficient: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``loss, slots, dW_enc, db_enc, dW_dec`` of ``n`` latents, from products at the selected entries."""
    work = accumulator(x.dtype)
    # Operands are rounded to what the forward pass multiplies by, products are in full precision.
    rounded = lambda t: t.to(W_dec.dtype).to(work)
    latents, slots, n_dead, bias = compact(tokens_since_active, dead_after, n, b_enc)
    width = W_dec.shape[1]
    centred = rounded(x.to(work) - b_dec)

    Z = torch.empty(len(x), n, dtype=work, device=x.device)
    for first in range(0, n, 4 * BLOCK_LATENTS):
        at = slice(first, min(first + 4 * BLOCK_LATENTS, n))
        Z[:, at] = linear(centred, W_enc[latents[at]].to(work), bias[at].to(work))
    values, columns, offsets = _select(Z, k_aux)
    del Z
    values = rounded(values)

    E = torch.empty(residual.shape, dtype=work, device=x.device)
    for first in range(0, width, STRIP):
        strip = slice(first, min(first + STRIP, width))
        table = W_dec[:, strip].index_select(0, latents).to(work)
        E[:, strip] = row_sums(values, columns, offsets, table)
    E -= residual
    loss, dE = loss_and_error_gradient(E, divisor, n_dead, k_aux, coefficient, W_dec.dtype)
    dE = dE.to(work)

    rows, positions, starts = csr_to_csc_torch(columns, offsets, n)
    values = values[positions]
    dW_enc, dW_dec = (x.new_zeros(n, w.shape[1], dtype=work) for w in (W_enc, W_dec))
    db_enc = torch.zeros(n, dtype=work, device=x.device)
    ends = [*starts[::BLOCK_LATENTS].tolist(), len(values)]
    for i, first in enumerate(range(0, n, BLOCK_LATENTS)):
        at, entries = slice(first, min(first + BLOCK_LATENTS, n)), slice(ends[i], ends[i + 1])
        tokens, offsets = rows[entries], starts[at.start : at.stop + 1] - ends[i]
        dA = sampled_products(W_dec[latents[at]].to(work), dE, tokens, offsets)
        dW_dec[at] = row_sums(values[entries], tokens, offsets, dE)
        dW_enc[at] = row_sums(rounded(dA), tokens, offsets, centred)
        db_enc[at] = torch.segment_reduce(dA, "sum", offsets=offsets.long(), initial=0)
    return loss, slots, dW_enc, db_enc, dW_dec


def _select(Z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` largest positive entries of each row of ``Z [B, n]``: values, columns, offsets."""
    values, columns, counts = [], [], [Z.new_zeros(1, dtype=torch.int64)]
    for block in Z.split(TOKENS_PER_SELECTION):
        block = torch.where(block > 0, block, 0)  # NaN is not
        row, column = largest(block, k, positive=True).nonzero(as_tuple=True)
        values.append(block[row, column])
        columns.append(column.int())
        counts.append(row.bincount(minlength=len(block)))
    return torch.cat(values), torch.cat(columns), torch.cat(counts).cumsum(0).int()
