"""TopK over a whole batch and TopK over each token, exactly, through group maxima.

    batch level:   z = pre where pre is among the K largest positive entries of the batch, else 0
    per token:     z[b] = pre[b] where among the k largest positive entries of token b, else 0
    group maxima:  m[b, g] = max of the positive entries of pre[b, 32 g : 32 (g + 1)], 0 if there is none
    peaks:         p[f] = the token of the largest positive entry of pre[:, f], -1 if there is none

The order is total, (value descending, then token-major flat index ascending), so a selection is
unique: the same on every device. Non-positive entries and NaN are never selected; infinity comes
first. BatchTopK with ``K = int(k * B)`` is Bussmann et al. 2024 (arXiv:2412.06410), section 3; TopK is
Gao et al. 2024 (arXiv:2406.04093), section 2.3, and how a BatchTopK autoencoder is used at inference.

With a latent quota, at the batch level, the latents' peaks come before all other entries; if there are
more than ``int(quota * K)``, the largest of them. So every latent that can be used is, in as many entries
as without. It is another strict total order, in which a group stands where its first entry does, and what
follows holds for it as well. (On torch the K largest are selected as without, and peaks then take the
places of the smallest.)

The K largest positive entries lie in the K groups of the largest maxima: were one in a group outside, K
groups would each hold an entry before it. So after one pass over ``pre``, only ``32 K`` entries are
looked at again, whatever the data. And the K-th largest maximum is a bound: each of the K groups holds an
entry that reaches it. Above it lie, in fewer than K groups, little more than K entries as a rule. If fewer
do, it is the K-th largest entry itself, and those level with it fill up, the first of them.

The K-th largest key is found digit by digit, most significant first, from integer histograms; keys are
the bits of the positive float32, which order as the values do.

On a GPU the batch level takes nine launches: three passes over the maxima, one that gathers the entries
above the bound, two passes over those, one that counts each token's, one that writes them. Per token one
program selects in one row, any ``k <= F``, and a second launch writes the CSR arrays. The peaks are 64-bit
integer maxima of value and token together, taken in the same pass as the group maxima; a quota takes four
launches more, or eight where it has not room for a peak of each latent.

Bytes: the maxima read ``pre`` once and write 1/32 of it. The batch level then moves 4 x 4 B a group
(from L2), 2 x 128 B a group that reaches the bound, about 40 B an entry above it, and has room for ``32 K``
of those; per token 5 x 128 B a listed group.
Deterministic, bit for bit: only integers are added or compared, and no place in a result depends on
arrival order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import implementation, register
from ..dtypes import FLOATS
from ..sparse import CSR, scatter_values
from . import torch_impl, triton_impl
from .triton_impl import empty_maxima, empty_selection

MAX_SLOTS = 2**31 - 1  # places are int32


class GroupMax(NamedTuple):
    """The largest positive entry of every 32 adjacent latents, whether ``pre`` was finite, the peaks."""

    values: Tensor  # [B, ceil(F / 32)] float32 (float64 for a float64 pre); 0: nothing positive
    nonfinite: Tensor  # [] bool: pre holds a NaN or an infinity
    peaks: Tensor  # [F] int32: token of each latent's largest positive entry, -1: none; [0]: not asked for


class Selection(NamedTuple):
    """What ``batch_topk`` selected."""

    csr: CSR
    threshold: (
        Tensor  # [] float32, the smallest selected value, peaks aside; +inf where there is none
    )
    nonfinite: Tensor  # [] bool, pre held a NaN or an infinity


@register(fake=empty_maxima)
def _group_max(pre: Tensor, with_peaks: bool) -> tuple[Tensor, Tensor, Tensor]:
    if pre.numel() == 0:
        maxima, nonfinite, peaks = empty_maxima(pre, with_peaks)
        return maxima.zero_(), nonfinite.zero_(), peaks.fill_(-1)
    run = torch_impl if implementation(pre) == "torch" else triton_impl
    return run.group_max(pre, with_peaks)


def _fake_topk(pre: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_selection(pre, maxima, pre.shape[0] * k)[:3]


def _setup_context(ctx, inputs, output) -> None:
    _, indices, offsets, *threshold = output
    ctx.latents = inputs[0].shape[1]
    ctx.others = len(inputs) - 1
    ctx.save_for_backward(indices, offsets)
    ctx.mark_non_differentiable(*threshold)


def _backward(ctx, values_gradient, *_):
    indices, offsets = ctx.saved_tensors
    gradient = scatter_values(values_gradient, indices, offsets, ctx.latents)
    return gradient, *[None] * ctx.others


@register(fake=_fake_topk, setup_context=_setup_context, backward=_backward)
def _topk(pre: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    if len(pre) * k == 0:
        values, indices, offsets = _fake_topk(pre, maxima, k)
        return values, indices, offsets.zero_()
    return (torch_impl if implementation(pre) == "torch" else triton_impl).topk(pre, maxima, k)


def _fake_batch_topk(
    pre: Tensor, maxima: Tensor, peaks: Tensor, num_selected: int, quota: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_selection(pre, maxima, num_selected)


@register(fake=_fake_batch_topk, setup_context=_setup_context, backward=_backward)
def _batch_topk(
    pre: Tensor, maxima: Tensor, peaks: Tensor, num_selected: int, quota: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if num_selected == 0:
        values, indices, offsets, threshold = empty_selection(pre, maxima, num_selected)
        return values, indices, offsets.zero_(), threshold.fill_(torch.inf)
    run = torch_impl if implementation(pre) == "torch" else triton_impl
    return run.batch_topk(pre, maxima, peaks, num_selected, int(quota * num_selected))


def _check_pre(pre: Tensor, where: str) -> None:
    if pre.ndim != 2 or pre.dtype not in FLOATS:
        raise ValueError(
            f"{where}: pre must be a [tokens, latents] matrix of float32, bfloat16, float16 or "
            f"float64, got {pre.dtype} of shape {tuple(pre.shape)}; flatten leading dimensions first"
        )


def check_slots(slots: int, where: str) -> None:
    """Raise ValueError unless ``slots`` entries have 32-bit places."""
    if slots > MAX_SLOTS:
        raise ValueError(
            f"{where}: {slots} entries do not fit 32-bit places; select from fewer tokens at once"
        )


def check_quota(quota: float, where: str) -> None:
    """Raise ValueError unless ``quota`` is a share."""
    if not 0 <= quota <= 1:
        raise ValueError(f"{where}: quota is a share of num_selected, 0 to 1, got {quota}")


def group_max(pre: Tensor, with_peaks: bool = False) -> GroupMax:
    """The largest positive entry of each 32 adjacent latents of ``pre [B, F]``, and ``with_peaks`` the
    token of each latent's largest; not differentiable.

    Deterministic. Reads ``pre`` once. Raises ValueError unless ``pre`` is a floating-point matrix.
    """
    _check_pre(pre, "group_max")
    return GroupMax(*_group_max(pre.detach(), with_peaks))


def batch_topk(
    pre: Tensor, num_selected: int, maxima: GroupMax | None = None, quota: float = 0
) -> Selection:
    """The ``num_selected`` largest positive entries of ``pre [B, F]``, in a strict total order.

    ``pre`` is float32, bfloat16, float16 (float64 on torch); ``num_selected`` is clamped to
    ``[0, B * F]`` and is the number of slots ``K`` of the CSR arrays, ``nnz = offsets[-1] <= K`` of which
    are entries. ``maxima`` are the group maxima of this very ``pre``, where the encoder already took
    them. Up to ``int(quota * K)`` peaks, each a latent's largest positive entry, come before all other
    entries; that takes ``maxima`` with peaks, or takes them anew. ``csr.values`` is differentiable in
    ``pre``: the gradient is dense, zero where nothing was selected.

    Deterministic; never waits for the device. Raises ValueError for a wrong shape or dtype, and for a
    quota that is no share.
    """
    _check_pre(pre, "batch_topk")
    check_quota(quota, "batch_topk")
    num_selected = min(max(num_selected, 0), pre.shape[0] * pre.shape[1])
    check_slots(num_selected, "batch_topk")
    if maxima is None or (quota > 0 and maxima.peaks.shape[0] == 0):
        maxima = group_max(pre, quota > 0)
    peaks = maxima.peaks if quota > 0 else maxima.peaks[:0]
    *csr, threshold = _batch_topk(pre, maxima.values, peaks, num_selected, quota)
    return Selection(CSR(*csr), threshold, maxima.nonfinite)


def topk(pre: Tensor, k: int, maxima: GroupMax | None = None) -> CSR:
    """The ``k`` largest positive entries of each token of ``pre [B, F]``, ties to the lower latent.

    ``k`` is clamped to ``[0, F]``; the CSR arrays have ``B * k`` slots, of which ``offsets[-1]`` are
    entries: fewer where a token has fewer than ``k`` positive ones. The rest as in ``batch_topk``.

    Deterministic; never waits for the device. Raises ValueError for a wrong shape or dtype.
    """
    _check_pre(pre, "topk")
    k = min(max(k, 0), pre.shape[1])
    check_slots(pre.shape[0] * k, "topk")
    maxima = group_max(pre) if maxima is None else maxima
    return CSR(*_topk(pre, maxima.values, k))
