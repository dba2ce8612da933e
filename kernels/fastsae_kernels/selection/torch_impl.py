"""The selection on torch; :mod:`fastsae_kernels.selection` has the algorithm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import upcast
from .triton_impl import GROUP

TOKENS_TOGETHER = 16  # whose maxima are taken first, before those of a whole column


def as_groups(pre: Tensor) -> Tensor:
    """``pre`` as its groups ``[B * G, 32]``, zeros after the last latent."""
    missing = -pre.shape[1] % GROUP
    # Padding copies even where there is nothing to pad.
    padded = torch.nn.functional.pad(pre, (0, missing)) if missing else pre
    return padded.reshape(-1, GROUP)


def group_max(pre: Tensor, with_peaks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima ``[B, G]`` of a ``pre [B, F]`` with entries, whether one is not finite, the peaks."""
    smallest, largest = torch.aminmax(pre)
    nonfinite = ~(smallest.isfinite() & largest.isfinite())
    # Only now is a NaN's group worth a second pass: amax lets the NaN win.
    clean = torch.where(pre.isnan(), 0, pre) if nonfinite else pre
    maxima = upcast(as_groups(clean).amax(-1).view(len(pre), -1).clamp_min(0))
    peaks = find_peaks(clean) if with_peaks else pre.new_empty(0, dtype=torch.int32)
    return maxima, nonfinite, peaks


def find_peaks(pre: Tensor) -> Tensor:
    """The token ``[F]`` (int32) of each latent's largest positive entry, -1 for none; no NaN."""
    # A maximum down a column is fast; with its place it is not. So the place is looked for among the
    # maxima of a few tokens at a time, then among the tokens of the first that has the largest.
    missing = -len(pre) % TOKENS_TOGETHER
    padded = torch.nn.functional.pad(pre, (0, 0, 0, missing)) if missing else pre
    parts = padded.reshape(-1, TOKENS_TOGETHER, pre.shape[1])
    maxima = parts.amax(1)
    largest = maxima.amax(0)
    part = _first_row(maxima >= largest)
    entries = parts.gather(0, part.long().expand(1, TOKENS_TOGETHER, -1))[0]
    token = part * TOKENS_TOGETHER + _first_row(entries >= largest)
    return torch.where(largest > 0, token, -1)


def _first_row(mask: Tensor) -> Tensor:
    """The first row (int32) that is set in each column; in every column one is."""
    rows = len(mask)
    to_the_end = torch.arange(rows, 0, -1, dtype=torch.int32, device=mask.device)
    return rows - (mask * to_the_end[:, None]).amax(0)


def peak_values(pre: Tensor, peaks: Tensor) -> Tensor:
    """The entries ``[F]`` of ``pre [B, F]`` at the tokens ``peaks``; 0 where there is none."""
    return torch.where(peaks < 0, 0, pre.gather(0, peaks.clamp_min(0).long()[None])[0])


def largest_peaks(values: Tensor, peaks: Tensor, most: int) -> Tensor:
    """``peaks`` without all but the ``most`` largest, in the order of the selection; never waits."""
    by_place = peaks.argsort(stable=True)
    order = by_place[values[by_place].argsort(descending=True, stable=True)]
    return peaks.index_fill(0, order[most:], -1)


def put_peaks_first(
    values: Tensor, flat: Tensor, peaks: Tensor, largest: Tensor, num_selected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``num_selected`` entries and their ascending indices: the peaks and the largest of the others.

    ``values, flat`` are the ``num_selected`` largest of all, which hold those others: beside them there
    are only peaks before an entry. ``largest [F]`` are the peaks' values. The third result are the values
    of the others.
    """
    latent = (peaks >= 0).nonzero().squeeze(1)
    token = flat // len(peaks)
    other = (peaks[flat - token * len(peaks)] != token).nonzero().squeeze(1)
    other = other[keep_largest(values[other], num_selected - len(latent))]
    flat, order = torch.cat([peaks[latent].long() * len(peaks) + latent, flat[other]]).sort()
    return torch.cat([largest[latent], values[other]])[order], flat, values[other]


def keep_largest(rows: Tensor, k: int, *, positive: bool = False) -> Tensor:
    """Mask of the ``k`` largest entries along the last dimension, ties to the lower index; no NaN.

    With ``positive`` the entries that are not are left out.
    """
    if k == 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    if k >= rows.shape[-1]:
        return rows > 0 if positive else torch.ones_like(rows, dtype=torch.bool)
    kth = rows.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    keep = (rows >= kth) & (rows > 0) if positive else rows >= kth
    if (keep.sum(-1, dtype=torch.int32) > k).any():
        above, equal = keep & (rows > kth), keep & (rows == kth)
        quota = k - above.sum(-1, keepdim=True, dtype=torch.int32)
        keep = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= quota))
    return keep


def largest_positive(pre: Tensor, maxima: Tensor, k: int, per_token: bool) -> Tensor:
    """Flat indices, ascending, of the ``k`` largest positive entries, of the batch or of each token."""
    G = maxima.shape[1]
    listed = keep_largest(maxima if per_token else maxima.view(-1), k)
    group = listed.view(-1).nonzero().squeeze(1)
    entries = as_groups(pre).index_select(0, group)
    if per_token:
        entries = entries.nan_to_num_(0, torch.inf, 0)
        kept = keep_largest(entries.view(len(pre), -1), k).view(-1).nonzero().squeeze(1)
    else:
        # Where K maxima reach a bound, entries below it need not be looked at again. NaN fails it.
        bound = maxima.view(-1)[group].min().to(entries.dtype) if len(group) == k else 0.0
        near = (entries >= bound).view(-1).nonzero().squeeze(1)
        kept = near[keep_largest(entries.view(-1)[near], k)]
    kept = kept[entries.view(-1)[kept] > 0]
    group = group[kept // GROUP]
    return (group // G) * pre.shape[1] + (group % G) * GROUP + kept % GROUP


def padded_csr(
    values: Tensor, flat: Tensor, shape: Sequence[int], slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """CSR arrays of ``slots`` slots from entries and their ascending flat indices in ``shape``."""
    tokens, latents = shape
    padded, indices = values.new_zeros(slots), flat.new_zeros(slots, dtype=torch.int32)
    padded[: len(flat)] = values
    indices[: len(flat)] = flat % latents
    row_starts = torch.arange(tokens + 1, device=flat.device) * latents
    return padded, indices, torch.searchsorted(flat, row_starts).int()


def batch_csr(
    values: Tensor, flat: Tensor, others: Tensor, shape: Sequence[int], slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`padded_csr`, and the smallest of ``others`` (infinity where there is none), float32."""
    infinity = torch.full((1,), torch.inf, device=values.device)
    threshold = torch.cat([others.float(), infinity]).min()
    return *padded_csr(values, flat, shape, slots), threshold


def batch_topk(
    pre: Tensor, maxima: Tensor, peaks: Tensor, num_selected: int, most_peaks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``values, indices, offsets, threshold`` of the selection from ``pre [B, F]``."""
    flat = largest_positive(pre, maxima, num_selected, per_token=False)
    values = others = pre.reshape(-1)[flat]
    if len(peaks):
        largest = peak_values(pre, peaks)
        if most_peaks < len(peaks):
            peaks = largest_peaks(largest, peaks, most_peaks)
        values, flat, others = put_peaks_first(values, flat, peaks, largest, num_selected)
    return batch_csr(values, flat, others, pre.shape, num_selected)


def topk(pre: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``values, indices, offsets`` of the ``k`` largest entries of each row of ``pre [B, F]``."""
    flat = largest_positive(pre, maxima, k, per_token=True)
    return padded_csr(pre.reshape(-1)[flat], flat, pre.shape, len(pre) * k)
