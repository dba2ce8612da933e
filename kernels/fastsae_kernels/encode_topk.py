"""Encoding and batch-level selection as one operation, for those who need the selection alone.

    csr = batch_topk((x - b_dec) @ W_enc + b_enc, K)

On a GPU it is the fused encoder followed by :mod:`.selection`. On a CPU the pre-activations ``[B, F]``
never exist as a whole: blocks of tokens are multiplied and looked through while they are in the cache.
Once K entries are held, the smallest of them is a bound: a later entry must exceed it, since of equal
entries the earlier one stands first. The result is :func:`batch_topk`'s, entry for entry, of
pre-activations whose sums ran in the order of the smaller products.

Bytes on a CPU: ``W_enc`` once for each block of tokens; memory besides the result: one block of
pre-activations, ``4·TOKENS_PER_PRODUCT·F``, and at most 2·K entries and the new block's.
"""

import torch
from torch import Tensor

from .dispatch import implementation, register
from .dtypes import accumulator
from .encoder import centre, check_shapes, encode_with_group_max, fake_encode
from .products import linear
from .selection import Selection, batch_topk, check_slots
from .selection.torch_impl import as_groups, batch_csr, group_max, keep_largest, largest_positive
from .selection.triton_impl import GROUP, empty_selection
from .sparse import CSR

# Tokens multiplied together on a CPU: enough of them to keep the product at its peak.
TOKENS_PER_PRODUCT = 256


def _select_blocks(
    centred: Tensor, weight: Tensor, bias: Tensor, num_selected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``values, flat indices`` ascending of the selection, and whether all of ``pre`` was finite."""
    dtype = accumulator(centred.dtype)
    latents = len(weight)
    centred, weight, bias = centred.to(dtype), weight.to(dtype).contiguous(), bias.to(dtype)
    values, flat = centred.new_empty(0), torch.empty(0, dtype=torch.int64, device=centred.device)
    nonfinite = torch.zeros((), dtype=torch.bool, device=centred.device)
    for first in range(0, len(centred), TOKENS_PER_PRODUCT):
        pre = linear(centred[first : first + TOKENS_PER_PRODUCT], weight, bias)
        maxima, bad = group_max(pre)
        nonfinite |= bad
        if len(values) < num_selected:
            found = largest_positive(pre, maxima, num_selected, per_token=False)
        else:
            found = _above(pre, maxima, float(values.min()))
        values = torch.cat([values, pre.view(-1)[found]])
        flat = torch.cat([flat, found + first * latents])
        if len(values) > num_selected:
            kept = keep_largest(values, num_selected)
            values, flat = values[kept], flat[kept]
    return values, flat, nonfinite


def _above(pre: Tensor, maxima: Tensor, bound: float) -> Tensor:
    """Flat indices, ascending, of the entries above ``bound``; they lie in groups whose maximum is."""
    group = (maxima.view(-1) > bound).nonzero().squeeze(1)
    place = (as_groups(pre).index_select(0, group) > bound).view(-1).nonzero().squeeze(1)
    group, width = group[place // GROUP], maxima.shape[1]
    return (group // width) * pre.shape[1] + (group % width) * GROUP + place % GROUP


def _fake(centred: Tensor, weight: Tensor, bias: Tensor, num_selected: int) -> tuple[Tensor, ...]:
    pre, maxima, nonfinite = fake_encode(centred, weight, bias)
    return *empty_selection(pre, maxima, num_selected), nonfinite


@register(fake=_fake)
def _encode_batch_topk(
    centred: Tensor, weight: Tensor, bias: Tensor, num_selected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if centred.is_cuda or num_selected == 0 or implementation(centred) == "triton":
        pre, maxima = encode_with_group_max(centred, weight.T, bias)
        csr, threshold, nonfinite = batch_topk(pre, num_selected, maxima)
        return csr.values, csr.indices, csr.offsets, threshold, nonfinite
    values, flat, nonfinite = _select_blocks(centred, weight, bias, num_selected)
    return *batch_csr(values, flat, (len(centred), len(weight)), num_selected), nonfinite


def encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, num_selected: int
) -> Selection:
    """The ``num_selected`` largest positive entries of ``pre = (x - b_dec) @ W_enc + b_enc``.

    Arguments as those of :func:`encode_with_group_max`, result as that of :func:`batch_topk`: exact,
    in the same strict total order. Not differentiable. Deterministic. Raises ValueError for shapes
    that do not fit and for more entries than have 32-bit places.
    """
    check_shapes(x, W_enc, b_enc, b_dec)
    num_selected = min(max(num_selected, 0), x.shape[0] * W_enc.shape[1])
    check_slots(num_selected, "encode_batch_topk")
    centred = centre(x, b_dec).to(W_enc.dtype)
    *csr, threshold, nonfinite = _encode_batch_topk(
        centred.detach(), W_enc.T.detach(), b_enc.detach(), num_selected
    )
    return Selection(CSR(*csr), threshold, nonfinite)
