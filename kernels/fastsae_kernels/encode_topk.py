"""Encoding and batch-level selection as one operation, for those who need the selection alone.

    csr = batch_topk((x - b_dec) @ W_enc + b_enc, K)

On a GPU it is the fused encoder followed by :mod:`.batch_topk`. On a CPU the pre-activations ``[B, F]``
never exist as a whole: blocks of tokens are multiplied, looked through while they are in the cache,
and overwritten by the next.

Of each block only what can still be among the K largest is kept. Once K entries are held, the smallest
of them is a bound: a later entry must exceed it, since of equal entries the earlier one stands first.
After the last block the K held are the K largest of all, so the result is :func:`batch_topk`'s, entry
for entry, of pre-activations whose sums ran in the order of the smaller products.

Bytes on a CPU: ``W_enc`` once for each block of tokens; memory besides the result: one block of
pre-activations, ``4·TOKENS·F``, and at most 2·K entries and the new block's.
"""

import torch
from torch import Tensor

from .batch_topk import _MAX_CAPACITY, Selection, _batch_topk
from .dispatch import implementation, register
from .encoder import _check_shapes, _encode, centre
from .groups import _blocks, _group_max_torch, _keep_largest, largest_positive
from .products import linear
from .sparse import CSR

# Tokens multiplied together on a CPU: enough of them to keep the product at its peak.
TOKENS = 256


def _select_blocks(centred: Tensor, weight: Tensor, bias: Tensor, budget: int):
    """``values, flat indices`` ascending of the selection, and whether all of ``pre`` was finite."""
    dtype = torch.promote_types(centred.dtype, torch.float32)
    latents = len(weight)
    centred, weight, bias = centred.to(dtype), weight.to(dtype).contiguous(), bias.to(dtype)
    values, flat = centred.new_empty(0), torch.empty(0, dtype=torch.int64, device=centred.device)
    nonfinite = torch.zeros((), dtype=torch.bool, device=centred.device)
    for first in range(0, len(centred), TOKENS):
        pre = linear(centred[first : first + TOKENS], weight, bias)
        maxima, bad = _group_max_torch(pre)
        nonfinite |= bad
        if len(values) < budget:
            found = largest_positive(pre, maxima, budget, per_token=False)
        else:
            found = _above(pre, maxima, float(values.min()))
        values = torch.cat([values, pre.view(-1)[found]])
        flat = torch.cat([flat, found + first * latents])
        if len(values) > budget:
            kept = _keep_largest(values, budget)
            values, flat = values[kept], flat[kept]
    return values, flat, nonfinite


def _above(pre: Tensor, maxima: Tensor, bound: float) -> Tensor:
    """Flat indices, ascending, of the entries above ``bound``; they lie in groups whose maximum is."""
    group = (maxima.view(-1) > bound).nonzero().squeeze(1)
    place = (_blocks(pre).index_select(0, group) > bound).view(-1).nonzero().squeeze(1)
    group, width = group[place // 32], maxima.shape[1]
    return (group // width) * pre.shape[1] + (group % width) * 32 + place % 32


def _fake(centred: Tensor, weight: Tensor, bias: Tensor, budget: int) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(centred.dtype, torch.float32)
    return (
        centred.new_empty(budget, dtype=dtype),
        centred.new_empty(budget, dtype=torch.int32),
        centred.new_empty(centred.shape[0] + 1, dtype=torch.int32),
        centred.new_empty((), dtype=torch.float32),
        centred.new_empty((), dtype=torch.bool),
    )


@register(fake=_fake)
def _encode_batch_topk(
    centred: Tensor, weight: Tensor, bias: Tensor, budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if centred.is_cuda or budget == 0 or implementation(centred) == "triton":
        pre, maxima, nonfinite = _encode(centred, weight, bias)
        return *_batch_topk(pre, maxima, budget), nonfinite
    values, flat, nonfinite = _select_blocks(centred, weight, bias, budget)
    padded, indices = values.new_zeros(budget), torch.zeros(budget, dtype=torch.int32)
    padded[: len(values)] = values
    indices[: len(values)] = flat % len(weight)
    starts = torch.arange(len(centred) + 1) * len(weight)
    offsets = torch.searchsorted(flat, starts).int()
    threshold = values.min().float() if len(values) else torch.full((), torch.inf)
    return padded, indices, offsets, threshold, nonfinite


def encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, budget: int
) -> Selection:
    """The ``budget`` largest positive entries of ``pre = (x - b_dec) @ W_enc + b_enc``.

    Arguments as those of :func:`encode_with_group_max`, result as that of :func:`batch_topk`: exact,
    in the same strict total order. Not differentiable. Deterministic. Raises ValueError for shapes
    that do not fit and for a budget beyond 32-bit places.
    """
    _check_shapes(x, W_enc, b_enc, b_dec)
    budget = min(max(budget, 0), x.shape[0] * W_enc.shape[1])
    if budget > _MAX_CAPACITY:
        raise ValueError(
            f"encode_batch_topk: budget {budget} does not fit 32-bit places; select from fewer tokens at once"
        )
    centred = centre(x, b_dec).to(W_enc.dtype)
    *csr, threshold, nonfinite = _encode_batch_topk(
        centred.detach(), W_enc.T.detach(), b_enc.detach(), budget
    )
    return Selection(CSR(*csr), threshold, nonfinite)
