"""Encoding and batch-level selection as one operation, for those who need the selection alone.

    csr = batch_topk((x - b_dec) @ W_enc + b_enc, K)

On a GPU it is the fused encoder followed by :mod:`.selection`. On a CPU the pre-activations ``[B, F]``
never exist as a whole: blocks of tokens are multiplied and looked through while they are in the cache.
Once K entries are held, the smallest of them is a bound: a later entry must exceed it, since of equal
entries the earlier one stands first. The result is :func:`batch_topk`'s, entry for entry, of
pre-activations whose sums ran in the order of the smaller products. With a latent quota each block's
peaks are kept where they exceed those of the blocks before; in the end they take the places of the smallest
other entries.

Bytes on a CPU: ``W_enc`` once for each block of tokens; memory besides the result: one block of
pre-activations, ``4·TOKENS_PER_PRODUCT·F``, and at most 2·K entries and the new block's.
"""

import torch
from torch import Tensor

from .dispatch import implementation, register
from .dtypes import accumulator
from .encoder import centre, check_shapes, encode_with_group_max, fake_encode
from .products import linear
from .selection import Selection, batch_topk, check_quota, check_slots
from .selection.torch_impl import (
    as_groups,
    batch_csr,
    group_max,
    keep_largest,
    largest_peaks,
    largest_positive,
    peak_values,
    put_peaks_first,
)
from .selection.triton_impl import GROUP, empty_selection
from .sparse import CSR

# Tokens multiplied together on a CPU: enough of them to keep the product at its peak.
TOKENS_PER_PRODUCT = 256


def _select_blocks(
    centred: Tensor, weight: Tensor, bias: Tensor, num_selected: int, most_peaks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``values, flat indices`` ascending of the selection, the values beside peaks, and whether a
    pre-activation was not finite."""
    dtype = accumulator(centred.dtype)
    latents = len(weight)
    centred, weight, bias = centred.to(dtype), weight.to(dtype).contiguous(), bias.to(dtype)
    values, flat = centred.new_empty(0), torch.empty(0, dtype=torch.int64, device=centred.device)
    largest = centred.new_zeros(latents)
    peaks = torch.full_like(largest, -1, dtype=torch.int32)
    nonfinite = torch.zeros((), dtype=torch.bool, device=centred.device)
    for first in range(0, len(centred), TOKENS_PER_PRODUCT):
        pre = linear(centred[first : first + TOKENS_PER_PRODUCT], weight, bias)
        maxima, bad, block_peaks = group_max(pre, most_peaks > 0)
        nonfinite |= bad
        if most_peaks:
            block_largest = peak_values(pre, block_peaks)
            # Not where they are equal: the earlier token's is the peak.
            exceeds = block_largest > largest
            largest = torch.where(exceeds, block_largest, largest)
            peaks = torch.where(exceeds, block_peaks + first, peaks)
        if len(values) < num_selected:
            found = largest_positive(pre, maxima, num_selected, per_token=False)
        else:
            found = _above(pre, maxima, float(values.min()))
        values = torch.cat([values, pre.view(-1)[found]])
        flat = torch.cat([flat, found + first * latents])
        if len(values) > num_selected:
            kept = keep_largest(values, num_selected)
            values, flat = values[kept], flat[kept]
    others = values
    if most_peaks:
        if most_peaks < latents:
            peaks = largest_peaks(largest, peaks, most_peaks)
        values, flat, others = put_peaks_first(values, flat, peaks, largest, num_selected)
    return values, flat, others, nonfinite


def _above(pre: Tensor, maxima: Tensor, bound: float) -> Tensor:
    """Flat indices, ascending, of the entries above ``bound``; they lie in groups whose maximum is."""
    group = (maxima.view(-1) > bound).nonzero().squeeze(1)
    place = (as_groups(pre).index_select(0, group) > bound).view(-1).nonzero().squeeze(1)
    group, width = group[place // GROUP], maxima.shape[1]
    return (group // width) * pre.shape[1] + (group % width) * GROUP + place % GROUP


def _fake(
    centred: Tensor, weight: Tensor, bias: Tensor, num_selected: int, quota: float
) -> tuple[Tensor, ...]:
    pre, maxima, nonfinite, _ = fake_encode(centred, weight, bias, False)
    return *empty_selection(pre, maxima, num_selected), nonfinite


@register(fake=_fake)
def _encode_batch_topk(
    centred: Tensor, weight: Tensor, bias: Tensor, num_selected: int, quota: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if centred.is_cuda or num_selected == 0 or implementation(centred) == "triton":
        pre, maxima = encode_with_group_max(centred, weight.T, bias, with_peaks=quota > 0)
        csr, threshold, nonfinite = batch_topk(pre, num_selected, maxima, quota)
        return csr.values, csr.indices, csr.offsets, threshold, nonfinite
    most_peaks = int(quota * num_selected)
    found = _select_blocks(centred, weight, bias, num_selected, most_peaks)
    values, flat, others, nonfinite = found
    return *batch_csr(values, flat, others, (len(centred), len(weight)), num_selected), nonfinite


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    num_selected: int,
    quota: float = 0,
) -> Selection:
    """The ``num_selected`` largest positive entries of ``pre = (x - b_dec) @ W_enc + b_enc``.

    Arguments as those of :func:`encode_with_group_max` and :func:`batch_topk`, result as that of the
    latter: exact, in the same strict total order. Not differentiable. Deterministic. Raises ValueError
    for shapes that do not fit, more entries than have 32-bit places, a quota that is no share.
    """
    check_shapes(x, W_enc, b_enc, b_dec)
    check_quota(quota, "encode_batch_topk")
    num_selected = min(max(num_selected, 0), x.shape[0] * W_enc.shape[1])
    check_slots(num_selected, "encode_batch_topk")
    centred = centre(x, b_dec).to(W_enc.dtype)
    *csr, threshold, nonfinite = _encode_batch_topk(
        centred.detach(), W_enc.T.detach(), b_enc.detach(), num_selected, quota
    )
    return Selection(CSR(*csr), threshold, nonfinite)
