"""Aux-k's gradients on a CPU where each token selects few of the dead latents.

The formulas are :mod:`.aux_k`'s. ``A`` has ``k_aux`` entries a row; where that is a small part of the
``n`` dead latents, gathering at the entries beats the dense product, if the tables it gathers from
fit the cache: ``E = A @ W_dec[S]`` goes by narrow strips of columns, the rest by blocks of latents.
``Z`` alone is a dense product. Nothing of size ``[n, D]`` is held but the two gradients.

Work: ``2·B·n·D`` operations for ``Z``, and four times ``2·B·k_aux·D``. Deterministic, as
:mod:`.sparse_products`.
"""

import torch
from torch import Tensor

from .batch_topk import _csr_to_csc_torch
from .products import linear
from .sparse_products import row_sums, sampled_products

# Columns of a strip of W_dec, latents of a block, tokens selected together.
STRIP = 64
LATENTS = 512
TOKENS = 128


def loss_and_error_gradient(
    E: Tensor, residual: Tensor, x: Tensor | None, n_dead: Tensor, k_aux: int, normalization: str
) -> tuple[Tensor, Tensor]:
    """``(aux [], dE [B, D])`` from ``E = A @ W_dec[S] - r``, which becomes ``dE`` in place."""
    scale = (n_dead.to(E.dtype) / max(k_aux, 1)).clamp(max=1) / max(len(E), 1)
    if normalization != "none":
        target = (residual if normalization == "residual_variance" else x).to(E.dtype)
        scale = scale / (target - target.mean(0)).square().sum(1).mean()
    some = n_dead > 0
    loss = torch.where(some, torch.nan_to_num(scale * E.square().sum(), 0.0, 0.0, 0.0), 0.0)
    dE = E.mul_(2 * scale).nan_to_num_(0.0, 0.0, 0.0)
    return loss, dE.masked_fill_(~some, 0.0)


def _select(Z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` largest positive entries of each row of ``Z [B, n]``: values, columns, offsets."""
    values, columns, counts = [], [], []
    for block in Z.split(TOKENS):
        block = torch.where(block > 0, block, 0)  # NaN is not
        kth = block.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        keep = (block >= kth) & (block > 0)
        count = keep.sum(1)
        if (count > k).any():  # ties go to the lower latent
            above = block > kth
            quota = k - above.sum(1, keepdim=True)
            tied = keep & ~above
            keep = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= quota))
            count = keep.sum(1)
        row, column = keep.nonzero(as_tuple=True)
        values.append(block[row, column])
        columns.append(column.int())
        counts.append(count)
    offsets = torch.cat([Z.new_zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    return torch.cat(values), torch.cat(columns), offsets.int()


def sparse_gradients(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    dead: Tensor,
    capacity: int,
    k_aux: int,
    normalization: str,
    coefficient: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``_aux_k_gradients`` returns, for the ``dead [F]`` latents, more than ``k_aux > 0``."""
    work = torch.promote_types(x.dtype, torch.float32)
    low = W_dec.dtype
    # Operands are rounded to what the forward pass multiplies by, products are in full precision.
    rounded = lambda t: t.to(low).to(work)
    latents = dead.nonzero().flatten()
    n, width = len(latents), W_dec.shape[1]
    slots = torch.where(dead, dead.cumsum(0) - 1, -1).to(torch.int32)
    centred = rounded(x.to(work) - b_dec)

    Z = torch.empty(len(x), n, dtype=work, device=x.device)
    for first in range(0, n, 4 * LATENTS):
        at = slice(first, min(first + 4 * LATENTS, n))
        Z[:, at] = linear(centred, W_enc[latents[at]].to(work), b_enc[latents[at]].to(work))
    values, columns, offsets = _select(Z, k_aux)
    del Z
    values = rounded(values)

    E = torch.empty(residual.shape, dtype=work, device=x.device)
    for first in range(0, width, STRIP):
        strip = slice(first, min(first + STRIP, width))
        table = W_dec[:, strip].index_select(0, latents).to(work)
        E[:, strip] = row_sums(values, columns, offsets, table)
    E -= residual
    loss, dE = loss_and_error_gradient(E, residual, x, dead.sum(), k_aux, normalization)
    dE = rounded(dE.mul_(coefficient))

    rows, positions, starts = _csr_to_csc_torch(columns, offsets, n)
    values = values[positions]
    dW_enc, dW_dec = (torch.zeros(capacity, width, dtype=work, device=x.device) for _ in range(2))
    db_enc = torch.zeros(capacity, dtype=work, device=x.device)
    ends = [*starts[::LATENTS].tolist(), len(values)]
    for i, first in enumerate(range(0, n, LATENTS)):
        at, entries = slice(first, min(first + LATENTS, n)), slice(ends[i], ends[i + 1])
        tokens, offsets = rows[entries], starts[at.start : at.stop + 1] - ends[i]
        dA = sampled_products(W_dec[latents[at]].to(work), dE, tokens, offsets)
        dW_dec[at] = row_sums(values[entries], tokens, offsets, dE)
        dW_enc[at] = row_sums(rounded(dA), tokens, offsets, centred)
        db_enc[at] = torch.segment_reduce(dA, "sum", offsets=offsets.long(), initial=0)
    return loss, dW_enc, db_enc, dW_dec, slots
