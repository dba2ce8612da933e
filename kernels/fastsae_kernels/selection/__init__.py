"""Group maxima, and the exact selection through them that ``batch_topk`` and ``topk`` share.

    m[b, g] = max of the positive entries of pre[b, 32 g : 32 (g + 1)], 0 where there is none

Order entries by (value descending, flat index ascending), groups by (maximum descending, flat index
ascending). The K largest positive entries lie in the K largest groups: were one in a group outside,
K groups would each hold an entry before it. So after one pass over ``pre`` for the maxima, only
``32 K`` entries are looked at again, whatever the data: a static bound, hence nothing to overflow.

The K-th largest key is found digit by digit (8 bits, most significant first) from integer histograms.
Keys are the bits of the positive float32, which order as the values do.

Bytes: ``group_max`` reads ``pre`` once and writes 1/32 of its entries. Deterministic: the maximum does
not depend on order, and no sum is taken.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .aot import Case
from .dispatch import implementation, jit, register, tl

GROUP = 32
DIGIT_PASSES = 4
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_BLOCK_GROUPS = 64


class GroupMax(NamedTuple):
    """The largest positive entry of every 32 adjacent latents, and whether ``pre`` was finite."""

    values: Tensor  # [B, ceil(F / 32)] float32 (float64 for a float64 pre); 0: nothing positive
    nonfinite: Tensor  # [] bool: pre holds a NaN or an infinity


# --- kernels ------------------------------------------------------------------------------------


@jit
def float_bits(x):
    """The bits of ``x`` as float32; bfloat16 by a shift, which is exact under the interpreter too."""
    if x.dtype == tl.bfloat16:
        return x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        return x.to(tl.float32).to(tl.int32, bitcast=True)


@jit
def positive_keys(bits):
    """Bits of a positive number (infinity included) as they are, 0 for everything else."""
    return tl.where((bits > 0) & (bits <= 0x7F800000), bits, 0)


@jit
def count_digits(keys, prefix, top, shift):
    """Histogram ``[256]`` of the digit at ``shift`` over positive keys that agree with ``prefix``.

    Keys have 31 bits: digits stand at 23, 15, 7 and 0; the last one repeats a bit of the third.
    """
    flat = tl.reshape(keys, [keys.numel])
    counted = (flat > 0) & ((flat >> top) == (prefix >> top))
    return tl.histogram((flat >> shift) & 255, 256, mask=counted)


@jit
def descend(counts, prefix, rank, shift):
    """The digit that holds the ``rank``-th largest key, joined to ``prefix``; the rank within it."""
    digits = tl.arange(0, 256)
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_least >= rank).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(digits > digit, counts, 0), 0)
    return prefix | (digit << shift), rank - above


@jit
def load_group_bits(pre_ptr, list_ptr, slots, stop, F, G, GROUP: tl.constexpr):
    """The listed groups' entries: raw, as bits, with their columns, all ``[slots, 32]``."""
    listed = slots < stop
    group = tl.load(list_ptr + slots, mask=listed, other=0)
    row = group // G
    column = (group - row * G)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    offset = row.to(tl.int64)[:, None] * F + column
    entries = tl.load(pre_ptr + offset, mask=listed[:, None] & (column < F), other=0.0)
    return entries, float_bits(entries), column


@jit
def before_in_tile(chosen):
    """How many of ``chosen [N, 32]`` stand before each place, in row-major order."""
    ones = chosen.to(tl.int32)
    in_row = tl.sum(ones, 1)
    return tl.cumsum(ones, 1) - ones + (tl.cumsum(in_row, 0) - in_row)[:, None]


@jit
def emit_row(
    pre_ptr,
    list_ptr,
    first,
    stop,
    threshold_key,
    quota,
    greater,
    equal,
    values_ptr,
    indices_ptr,
    F,
    G,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's entries: those above the threshold and, of the ties, the first ``quota``.

    ``greater`` and ``equal`` count such entries in the rows before.
    """
    for start in range(first, stop, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        entries, bits, column = load_group_bits(pre_ptr, list_ptr, slots, stop, F, G, GROUP)
        keys = positive_keys(bits)
        is_greater = keys > threshold_key
        is_equal = keys == threshold_key
        tie = equal + before_in_tile(is_equal)
        chosen = is_greater | (is_equal & (tie < quota))
        slot = greater + before_in_tile(is_greater) + tl.minimum(tie, quota)
        tl.store(values_ptr + slot, entries, mask=chosen)
        tl.store(indices_ptr + slot, column, mask=chosen)
        greater += tl.sum(tl.sum(is_greater.to(tl.int32), 1), 0)
        equal += tl.sum(tl.sum(is_equal.to(tl.int32), 1), 0)


@jit
def clear_tail(values_ptr, indices_ptr, nnz, capacity, BLOCK: tl.constexpr):
    """Zero the slots ``[nnz, capacity)``, shared out over the programs."""
    for start in range(tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        slot = start + tl.arange(0, BLOCK)
        empty = (slot >= nnz) & (slot < capacity)
        tl.store(values_ptr + slot, tl.zeros([BLOCK], values_ptr.dtype.element_ty), mask=empty)
        tl.store(indices_ptr + slot, tl.zeros([BLOCK], tl.int32), mask=empty)


@jit
def _group_max_kernel(
    pre_ptr, max_ptr, nonfinite_ptr, F, G, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # [BLOCK, 32]
    bits = float_bits(tl.load(pre_ptr + row * F + column, mask=column < F, other=0.0))
    maximum = tl.max(positive_keys(bits), 1)
    tl.store(max_ptr + row * G + group, maximum.to(tl.float32, bitcast=True), mask=group < G)
    # Every program that stores, stores the same.
    bad = tl.max(((bits & 0x7F800000) == 0x7F800000).to(tl.int32), 1)
    tl.store(nonfinite_ptr + group * 0, bad > 0, mask=bad > 0)


# --- torch --------------------------------------------------------------------------------------


def _blocks(pre: Tensor) -> Tensor:
    """``pre`` as its groups ``[B * G, 32]``, zeros after the last latent."""
    missing = -pre.shape[1] % GROUP
    # Padding copies even where there is nothing to pad.
    padded = torch.nn.functional.pad(pre, (0, missing)) if missing else pre
    return padded.reshape(-1, GROUP)


def _group_max_torch(pre: Tensor) -> tuple[Tensor, Tensor]:
    smallest, largest = torch.aminmax(pre)
    nonfinite = ~(smallest.isfinite() & largest.isfinite())
    # Only now is a NaN's group worth a second pass: amax lets the NaN win.
    clean = torch.where(pre.isnan(), 0, pre) if nonfinite else pre
    values = _blocks(clean).amax(-1).view(len(pre), -1).clamp_min(0)
    return values.to(torch.promote_types(pre.dtype, torch.float32)), nonfinite


def _keep_largest(rows: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` largest entries along the last dimension, ties to the lower index."""
    size = rows.shape[-1]
    if k >= size:
        return torch.ones_like(rows, dtype=torch.bool)
    kth = rows.kthvalue(size - k + 1, dim=-1, keepdim=True).values
    greater, equal = rows > kth, rows == kth
    quota = k - greater.sum(-1, keepdim=True, dtype=torch.int32)
    return greater | (equal & (equal.cumsum(-1, dtype=torch.int32) <= quota))


def largest_positive(pre: Tensor, maxima: Tensor, k: int, per_token: bool) -> Tensor:
    """Flat indices, ascending, of the ``k`` largest positive entries, of the batch or of each token."""
    G = maxima.shape[1]
    listed = _keep_largest(maxima if per_token else maxima.view(-1), k)
    group = listed.view(-1).nonzero().squeeze(1)
    entries = _blocks(pre).index_select(0, group)
    if per_token:
        entries = entries.nan_to_num_(0, torch.inf, 0)
        kept = _keep_largest(entries.view(len(pre), -1), k).view(-1).nonzero().squeeze(1)
    else:
        # Where K maxima reach a bound, entries below it need not be looked at again. NaN fails it.
        bound = maxima.view(-1)[group].min().to(entries.dtype) if len(group) == k else 0.0
        near = (entries >= bound).view(-1).nonzero().squeeze(1)
        kept = near[_keep_largest(entries.view(-1)[near], k)]
    kept = kept[entries.view(-1)[kept] > 0]
    group = group[kept // GROUP]
    return (group // G) * pre.shape[1] + (group % G) * GROUP + kept % GROUP


def padded_csr(pre: Tensor, flat: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """CSR arrays of ``capacity`` slots from ascending flat indices."""
    tokens, latents = pre.shape
    values, indices = pre.new_zeros(capacity), flat.new_zeros(capacity, dtype=torch.int32)
    values[: len(flat)] = pre.reshape(-1)[flat]
    indices[: len(flat)] = flat % latents
    row_starts = torch.arange(tokens + 1, device=flat.device) * latents
    return values, indices, torch.searchsorted(flat, row_starts).int()


# --- the operation ------------------------------------------------------------------------------


def _group_max_fake(pre: Tensor) -> tuple[Tensor, Tensor]:
    groups = (pre.shape[1] + GROUP - 1) // GROUP
    dtype = torch.promote_types(pre.dtype, torch.float32)
    return pre.new_empty(pre.shape[0], groups, dtype=dtype), pre.new_empty((), dtype=torch.bool)


@register(fake=_group_max_fake)
def _group_max(pre: Tensor) -> tuple[Tensor, Tensor]:
    B, F = pre.shape
    G = cdiv(F, GROUP)
    dtype = torch.promote_types(pre.dtype, torch.float32)
    nonfinite = pre.new_zeros((), dtype=torch.bool)
    if pre.numel() == 0:
        return pre.new_zeros(B, G, dtype=dtype), nonfinite
    if implementation(pre) == "torch":
        return _group_max_torch(pre)
    pre = pre.contiguous()
    values = torch.empty(B, G, dtype=dtype, device=pre.device)
    grid = (B, cdiv(G, _BLOCK_GROUPS))
    _group_max_kernel[grid](pre, values, nonfinite, F, G, GROUP=GROUP, BLOCK=_BLOCK_GROUPS)
    return values, nonfinite


def cdiv(n: int, d: int) -> int:
    return -(-n // d)


def check_pre(pre: Tensor, where: str) -> None:
    """Raise ValueError unless ``pre`` is a floating-point matrix."""
    if pre.ndim != 2 or pre.dtype not in FLOATS:
        raise ValueError(
            f"{where}: pre must be a [tokens, latents] matrix of float32, bfloat16, float16 or "
            f"float64, got {pre.dtype} of shape {tuple(pre.shape)}; flatten leading dimensions first"
        )


def group_max(pre: Tensor) -> GroupMax:
    """The largest positive entry of each 32 adjacent latents of ``pre [B, F]``; not differentiable.

    Deterministic. Reads ``pre`` once. Raises ValueError unless ``pre`` is a floating-point matrix.
    """
    check_pre(pre, "group_max")
    return GroupMax(*_group_max(pre.detach()))


def aot_cases() -> list[Case]:
    return [
        Case(
            f"group_max {dtype}",
            _group_max_kernel,
            {
                "pre_ptr": f"*{dtype}",
                "max_ptr": "*fp32",
                "nonfinite_ptr": "*i1",
                "F": "i32",
                "G": "i32",
            },
            {"GROUP": GROUP, "BLOCK": _BLOCK_GROUPS},
            divisible=("F", "G"),
            representative=dtype == "fp32",
        )
        for dtype in ("fp32", "bf16", "fp16")
    ]
