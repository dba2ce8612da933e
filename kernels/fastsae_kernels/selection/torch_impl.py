"""The selection on torch; :mod:`fastsae_kernels.selection` has the algorithm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import upcast
from .triton_impl import GROUP


def as_groups(pre: Tensor) -> Tensor:
    """``pre`` as its groups ``[B * G, 32]``, zeros after the last latent."""
    missing = -pre.shape[1] % GROUP
    # Padding copies even where there is nothing to pad.
    padded = torch.nn.functional.pad(pre, (0, missing)) if missing else pre
    return padded.reshape(-1, GROUP)


def group_max(pre: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima ``[B, G]`` of a ``pre [B, F]`` with entries, and whether one is not finite."""
    smallest, largest = torch.aminmax(pre)
    nonfinite = ~(smallest.isfinite() & largest.isfinite())
    # Only now is a NaN's group worth a second pass: amax lets the NaN win.
    clean = torch.where(pre.isnan(), 0, pre) if nonfinite else pre
    return upcast(as_groups(clean).amax(-1).view(len(pre), -1).clamp_min(0)), nonfinite


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
    values: Tensor, flat: Tensor, shape: Sequence[int], slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`padded_csr`, and the smallest value (infinity where there is none), float32."""
    infinity = torch.full((1,), torch.inf, device=values.device)
    threshold = torch.cat([values.float(), infinity]).min()
    return *padded_csr(values, flat, shape, slots), threshold


def batch_topk(
    pre: Tensor, maxima: Tensor, num_selected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``values, indices, offsets, threshold`` of the selection from ``pre [B, F]``."""
    flat = largest_positive(pre, maxima, num_selected, per_token=False)
    return batch_csr(pre.reshape(-1)[flat], flat, pre.shape, num_selected)


def topk(pre: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``values, indices, offsets`` of the ``k`` largest entries of each row of ``pre [B, F]``."""
    flat = largest_positive(pre, maxima, k, per_token=True)
    return padded_csr(pre.reshape(-1)[flat], flat, pre.shape, len(pre) * k)
