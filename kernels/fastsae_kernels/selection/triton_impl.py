"""The kernels of the selection; :mod:`fastsae_kernels.selection` has the algorithm."""

import torch
from torch import Tensor

from ..dispatch import jit, tl, triton
from ..dtypes import accumulator, float_bits

GROUP = 32
DIGIT_PASSES = 4
# Enough programs to fill any GPU; more only add to the contention on the histogram.
MAX_COUNTING_PROGRAMS = 1024
BLOCK_KEYS = 1024  # group maxima a program reads at a time
BLOCK_GROUPS = 64  # groups, of 32 entries, a program reads at a time
BLOCK_EMIT = 32  # the same, where two running counts take registers too
ROW_WARPS = 8  # of the kernels that write a row's entries
ROWS_TOGETHER = 32  # tokens a program takes the group maxima of, where it looks for peaks
# The key of a peak in the selection, and of a group that holds one: above that of infinity.
PEAK_KEY = tl.constexpr(0x7FFFFFFF)


def empty_maxima(pre: Tensor, with_peaks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What ``group_max`` returns."""
    groups = (pre.shape[1] + GROUP - 1) // GROUP
    maxima = pre.new_empty(pre.shape[0], groups, dtype=accumulator(pre.dtype))
    peaks = pre.new_empty(pre.shape[1] if with_peaks else 0, dtype=torch.int32)
    return maxima, pre.new_empty((), dtype=torch.bool), peaks


def empty_selection(
    pre: Tensor, maxima: Tensor, num_selected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``batch_topk`` returns; without the threshold, ``topk``."""
    sizes = num_selected, pre.shape[0] + 1
    indices, offsets = (pre.new_empty(size, dtype=torch.int32) for size in sizes)
    threshold = pre.new_empty((), dtype=torch.float32)
    return pre.new_empty(num_selected), indices, offsets, threshold


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
def _load_keys(key_ptr, row, group, G):
    return tl.load(key_ptr + row.to(tl.int64) * G + group, mask=group < G, other=0)


@jit
def load_groups(pre_ptr, list_ptr, peaks_ptr, slots, stop, F, G, GROUP: tl.constexpr):
    """The listed groups' entries: raw, as keys, with their columns, all ``[slots, 32]``."""
    listed = slots < stop
    group = tl.load(list_ptr + slots, mask=listed, other=0)
    row = group // G
    column = (group - row * G)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    offset = row.to(tl.int64)[:, None] * F + column
    inside = listed[:, None] & (column < F)
    entries = tl.load(pre_ptr + offset, mask=inside, other=0.0)
    keys = positive_keys(float_bits(entries))
    if peaks_ptr is not None:
        peak = tl.load(peaks_ptr + column, mask=inside, other=-1)
        keys = tl.where(peak == row[:, None], PEAK_KEY, keys)
    return entries, keys, column


@jit
def before_in_tile(chosen):
    """How many of ``chosen [N, 32]`` stand before each place, in row-major order."""
    ones = chosen.to(tl.int32)
    in_row = tl.sum(ones, 1)
    return tl.cumsum(ones, 1) - ones + (tl.cumsum(in_row, 0) - in_row)[:, None]


@jit
def emit_row(
    pre_ptr, list_ptr, peaks_ptr,
    first, stop, threshold_key, quota, greater, equal,
    values_ptr, indices_ptr,
    F, G,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one row's entries: those above the threshold and, of the ties, the first ``quota``.

    ``greater`` and ``equal`` count such entries in the rows before.
    """
    for start in range(first, stop, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        entries, keys, column = load_groups(pre_ptr, list_ptr, peaks_ptr, slots, stop, F, G, GROUP)
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
def raise_peaks(peaks_ptr, latent, key, token):
    """Join a program's best entry of some latents to the others': the largest key, the first token."""
    packed = (key.to(tl.int64) << 32) + (0xFFFFFFFF - token.to(tl.int64))
    tl.atomic_max(peaks_ptr + latent, packed, mask=key > 0, sem="relaxed")


def packed_peaks(pre: Tensor, with_peaks: bool) -> Tensor | None:
    """What :func:`raise_peaks` writes to, for all latents."""
    return pre.new_zeros(pre.shape[1], dtype=torch.int64) if with_peaks else None


def unpacked_peaks(packed: Tensor | None, pre: Tensor) -> Tensor:
    """The tokens ``[F]``, -1 where nothing was written; ``[0]`` of None."""
    if packed is None:
        return pre.new_empty(0, dtype=torch.int32)
    # The low half holds the token's complement, or 0.
    return packed.to(torch.int32).bitwise_not_()


@jit
def group_max_kernel(
    pre_ptr, max_ptr, nonfinite_ptr, peaks_ptr,
    B, F, G,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    best = tl.zeros([BLOCK, GROUP], tl.int32)
    token = tl.zeros([BLOCK, GROUP], tl.int32)
    first = tl.program_id(0) * ROWS
    for i in range(0, tl.minimum(ROWS, B - first)):
        row = (first + i).to(tl.int64)
        # [BLOCK, 32]
        bits = float_bits(tl.load(pre_ptr + row * F + column, mask=column < F, other=0.0))
        keys = positive_keys(bits)
        maximum = tl.max(keys, 1).to(tl.float32, bitcast=True)
        tl.store(max_ptr + row * G + group, maximum, mask=group < G)
        # Every program that stores, stores the same.
        bad = tl.max(((bits & 0x7F800000) == 0x7F800000).to(tl.int32), 1)
        tl.store(nonfinite_ptr + group * 0, bad > 0, mask=bad > 0)
        if peaks_ptr is not None:
            token = tl.where(keys > best, first + i, token)
            best = tl.maximum(best, keys)
    if peaks_ptr is not None:
        raise_peaks(peaks_ptr, column, best, token)


def group_max(pre: Tensor, with_peaks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima ``[B, G]`` of a ``pre [B, F]`` with entries, whether one is not finite, the peaks."""
    (B, F), pre = pre.shape, pre.contiguous()
    values, nonfinite, _ = empty_maxima(pre, False)
    nonfinite.zero_()
    packed = packed_peaks(pre, with_peaks)
    G = values.shape[1]
    rows = ROWS_TOGETHER if with_peaks else 1
    group_max_kernel[(triton.cdiv(B, rows), triton.cdiv(G, BLOCK_GROUPS))](
        pre_ptr=pre, max_ptr=values, nonfinite_ptr=nonfinite, peaks_ptr=packed,
        B=B, F=F, G=G,
        GROUP=GROUP, BLOCK=BLOCK_GROUPS, ROWS=rows,
    )  # fmt: skip
    return values, nonfinite, unpacked_peaks(packed, pre)


# --- batch level --------------------------------------------------------------------------------


@jit
def mark_groups_kernel(key_ptr, peaks_ptr, F, G, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Give the groups that hold a peak its key."""
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(peaks_ptr + latent, mask=latent < F, other=-1)
    place = token.to(tl.int64) * G + latent // GROUP
    tl.store(key_ptr + place, tl.full([BLOCK], PEAK_KEY, tl.int32), mask=token >= 0)


@jit
def _narrow(histograms_ptr, state_ptr, rank, PASS: tl.constexpr):
    """Prefix and rank after ``PASS`` digits, from the histogram the launch before this one filled.

    Every program works them out for itself; the first keeps them for the next launch. That takes the
    place of a scan that would have to wait for all programs of a launch.
    """
    prefix = 0
    if PASS > 0:
        counts = tl.load(histograms_ptr + 256 * (PASS - 1) + tl.arange(0, 256))
        if PASS == 1:
            rank = tl.minimum(rank, tl.sum(counts, 0))
        else:
            prefix = tl.load(state_ptr + 2 * (PASS - 1))
            rank = tl.load(state_ptr + 2 * (PASS - 1) + 1)
        shift: tl.constexpr = 31 - 8 * PASS if PASS < 4 else 0  # pyright: ignore
        prefix, rank = descend(counts, prefix, rank, shift)
        if tl.program_id(0) == 0:
            tl.store(state_ptr + 2 * PASS, prefix)
            tl.store(state_ptr + 2 * PASS + 1, rank)
    return prefix, rank


@jit
def count_group_digits_kernel(
    key_ptr, histograms_ptr, state_ptr,
    groups, rank,
    PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    prefix, rank = _narrow(histograms_ptr, state_ptr, rank, PASS)
    shift: tl.constexpr = 23 - 8 * PASS if PASS < 3 else 0  # pyright: ignore
    total = tl.zeros([256], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, groups, tl.num_programs(0) * BLOCK):
        group = start + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + group, mask=group < groups, other=0)
        total += count_digits(key, prefix, 31 - 8 * PASS, shift)
    digit = tl.arange(0, 256)
    tl.atomic_add(histograms_ptr + 256 * PASS + digit, total, mask=total > 0, sem="relaxed")


@jit
def count_entry_digits_kernel(
    pre_ptr, list_ptr, list_offsets_ptr, peaks_ptr, histograms_ptr, state_ptr,
    B, F, G, rank,
    PASS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    prefix, rank = _narrow(histograms_ptr, state_ptr, rank, PASS)
    shift: tl.constexpr = 23 - 8 * PASS if PASS < 3 else 0  # pyright: ignore
    listed = tl.load(list_offsets_ptr + B)
    total = tl.zeros([256], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, listed, tl.num_programs(0) * BLOCK):
        slots = start + tl.arange(0, BLOCK)
        _, keys, _ = load_groups(pre_ptr, list_ptr, peaks_ptr, slots, listed, F, G, GROUP)
        total += count_digits(keys, prefix, 31 - 8 * PASS, shift)
    digit = tl.arange(0, 256)
    tl.atomic_add(histograms_ptr + 256 * PASS + digit, total, mask=total > 0, sem="relaxed")


@jit
def count_groups_kernel(
    key_ptr, histograms_ptr, state_ptr, counts_ptr,
    B, G,
    PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per token, the groups above the threshold and level with it, into ``counts [2, B + 1]``."""
    threshold_key, _quota = _narrow(histograms_ptr, state_ptr, 0, PASSES)
    row = tl.program_id(0)
    greater = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, G, BLOCK):
        group = start + tl.arange(0, BLOCK)
        key = _load_keys(key_ptr, row, group, G)
        greater += (key > threshold_key).to(tl.int32)
        equal += (key == threshold_key).to(tl.int32)
    tl.store(counts_ptr + row + 1, tl.sum(greater, 0))
    tl.store(counts_ptr + B + 1 + row + 1, tl.sum(equal, 0))


@jit
def list_groups_kernel(
    key_ptr, state_ptr, starts_ptr, list_ptr, list_offsets_ptr,
    B, G,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The chosen groups in token-major order; of the ties the first ``quota``."""
    threshold_key = tl.load(state_ptr)
    quota = tl.load(state_ptr + 1)
    row = tl.program_id(0)
    greater = tl.load(starts_ptr + row)
    equal = tl.load(starts_ptr + B + 1 + row)
    tl.store(list_offsets_ptr + row, greater + tl.minimum(equal, quota))
    for start in range(0, G, BLOCK):
        group = start + tl.arange(0, BLOCK)
        key = _load_keys(key_ptr, row, group, G)
        is_greater = (key > threshold_key).to(tl.int32)
        is_equal = (key == threshold_key).to(tl.int32)
        tie = equal + tl.cumsum(is_equal, 0) - is_equal
        slot = greater + tl.cumsum(is_greater, 0) - is_greater + tl.minimum(tie, quota)
        chosen = (is_greater > 0) | ((is_equal > 0) & (tie < quota))
        tl.store(list_ptr + slot, row * G + group, mask=chosen)
        greater += tl.sum(is_greater, 0)
        equal += tl.sum(is_equal, 0)
    if row == B - 1:
        tl.store(list_offsets_ptr + B, greater + tl.minimum(equal, quota))


@jit
def count_entries_kernel(
    pre_ptr, list_ptr, list_offsets_ptr, peaks_ptr, histograms_ptr, state_ptr, counts_ptr,
    B, F, G,
    PASSES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per token, the entries above the threshold and level with it, into ``counts [2, B + 1]``."""
    threshold_key, _quota = _narrow(histograms_ptr, state_ptr, 0, PASSES)
    row = tl.program_id(0)
    stop = tl.load(list_offsets_ptr + row + 1)
    greater = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.load(list_offsets_ptr + row), stop, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        _, keys, _ = load_groups(pre_ptr, list_ptr, peaks_ptr, slots, stop, F, G, GROUP)
        greater += tl.sum((keys > threshold_key).to(tl.int32), 1)
        equal += tl.sum((keys == threshold_key).to(tl.int32), 1)
    tl.store(counts_ptr + row + 1, tl.sum(greater, 0))
    tl.store(counts_ptr + B + 1 + row + 1, tl.sum(equal, 0))


@jit
def batch_emit_kernel(
    pre_ptr, list_ptr, list_offsets_ptr, peaks_ptr, state_ptr, starts_ptr,
    values_ptr, indices_ptr, offsets_ptr, threshold_ptr,
    B, F, G, capacity,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    threshold_key = tl.load(state_ptr)
    quota = tl.load(state_ptr + 1)
    row = tl.program_id(0)
    greater = tl.load(starts_ptr + row)
    equal = tl.load(starts_ptr + B + 1 + row)
    tl.store(offsets_ptr + row, greater + tl.minimum(equal, quota))
    first = tl.load(list_offsets_ptr + row)
    stop = tl.load(list_offsets_ptr + row + 1)
    emit_row(
        pre_ptr, list_ptr, peaks_ptr,
        first, stop, threshold_key, quota, greater, equal,
        values_ptr, indices_ptr,
        F, G,
        GROUP, BLOCK,
    )  # fmt: skip
    nnz = tl.load(starts_ptr + B) + tl.minimum(tl.load(starts_ptr + B + 1 + B), quota)
    clear_tail(values_ptr, indices_ptr, nnz, capacity, BLOCK)
    if row == B - 1:
        tl.store(offsets_ptr + B, nnz)
        # Without any entry the quota is 0 and the key means nothing; without any but peaks it is theirs.
        key = tl.where((quota > 0) & (threshold_key < PEAK_KEY), threshold_key, 0x7F800000)
        tl.store(threshold_ptr, key.to(tl.float32, bitcast=True))


def batch_topk(
    pre: Tensor, maxima: Tensor, peaks: Tensor, num_selected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``values, indices, offsets, threshold`` of ``num_selected > 0`` entries of ``pre [B, F]``.

    The ``peaks [F]``, at most ``num_selected``, come first; ``[0]`` for a selection without.
    """
    (B, F), G = pre.shape, maxima.shape[1]
    pre, keys = pre.contiguous(), maxima.contiguous().view(torch.int32)
    integers = {"dtype": torch.int32, "device": pre.device}
    # For the groups and for the entries: 4 histograms, and (key, rank) before and after each digit.
    histograms = torch.zeros(2, DIGIT_PASSES, 256, **integers)
    state = torch.empty(2, DIGIT_PASSES + 1, 2, **integers)
    final = state[:, -1]
    counts = torch.zeros(2, 2, B + 1, **integers)
    group_list = torch.empty(min(num_selected, B * G), **integers)
    list_offsets = torch.empty(B + 1, **integers)
    values, indices, offsets, threshold = empty_selection(pre, maxima, num_selected)

    if len(peaks):
        keys = keys.clone()
        mark_groups_kernel[(triton.cdiv(F, BLOCK_KEYS),)](
            key_ptr=keys, peaks_ptr=peaks,
            F=F, G=G,
            GROUP=GROUP, BLOCK=BLOCK_KEYS,
        )  # fmt: skip

    grid = (min(triton.cdiv(B * G, BLOCK_KEYS), MAX_COUNTING_PROGRAMS),)
    for digit in range(DIGIT_PASSES):
        count_group_digits_kernel[grid](
            key_ptr=keys, histograms_ptr=histograms[0], state_ptr=state[0],
            groups=B * G, rank=len(group_list),
            PASS=digit, BLOCK=BLOCK_KEYS,
        )  # fmt: skip
    count_groups_kernel[(B,)](
        key_ptr=keys, histograms_ptr=histograms[0], state_ptr=state[0], counts_ptr=counts[0],
        B=B, G=G,
        PASSES=DIGIT_PASSES, BLOCK=BLOCK_KEYS,
    )  # fmt: skip
    list_groups_kernel[(B,)](
        key_ptr=keys, state_ptr=final[0], starts_ptr=counts[0].cumsum(1, dtype=torch.int32),
        list_ptr=group_list, list_offsets_ptr=list_offsets,
        B=B, G=G,
        BLOCK=BLOCK_KEYS,
    )  # fmt: skip

    listed = {"pre_ptr": pre, "list_ptr": group_list, "list_offsets_ptr": list_offsets}
    listed |= {"peaks_ptr": peaks if len(peaks) else None}
    listed |= {"B": B, "F": F, "G": G, "GROUP": GROUP}
    progress = {"histograms_ptr": histograms[1], "state_ptr": state[1], "BLOCK": BLOCK_GROUPS}
    grid = (min(triton.cdiv(len(group_list), BLOCK_GROUPS), MAX_COUNTING_PROGRAMS),)
    for digit in range(DIGIT_PASSES):
        count_entry_digits_kernel[grid](**listed, **progress, rank=num_selected, PASS=digit)
    count_entries_kernel[(B,)](**listed, **progress, counts_ptr=counts[1], PASSES=DIGIT_PASSES)
    batch_emit_kernel[(B,)](
        **listed, state_ptr=final[1], starts_ptr=counts[1].cumsum(1, dtype=torch.int32),
        values_ptr=values, indices_ptr=indices, offsets_ptr=offsets, threshold_ptr=threshold,
        capacity=num_selected,
        BLOCK=BLOCK_EMIT, num_warps=ROW_WARPS,
    )  # fmt: skip
    return values, indices, offsets, threshold


# --- per token ----------------------------------------------------------------------------------


@jit
def row_select_kernel(
    pre_ptr, key_ptr, list_ptr, listed_ptr, state_ptr, counts_ptr,
    F, G, k, list_capacity,
    PASSES: tl.constexpr, GROUP: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List a token's chosen groups; find its threshold, its quota of ties and its number of entries."""
    row = tl.program_id(0)

    key = 0
    rank = list_capacity
    for digit in range(PASSES):
        top = 31 - 8 * digit
        shift = tl.maximum(top - 8, 0)
        counts = tl.zeros([256], tl.int32)
        for start in range(0, G, BLOCK_KEYS):
            group = start + tl.arange(0, BLOCK_KEYS)
            counts += count_digits(_load_keys(key_ptr, row, group, G), key, top, shift)
        # Only in the first pass can there be fewer than are asked for.
        rank = tl.minimum(rank, tl.sum(counts, 0))
        key, rank = descend(counts, key, rank, shift)

    list_row = list_ptr + row.to(tl.int64) * list_capacity
    listed = 0
    ties = 0
    for start in range(0, G, BLOCK_KEYS):
        group = start + tl.arange(0, BLOCK_KEYS)
        keys = _load_keys(key_ptr, row, group, G)
        is_equal = (keys == key).to(tl.int32)
        tie = ties + tl.cumsum(is_equal, 0) - is_equal
        chosen = (keys > key) | ((is_equal > 0) & (tie < rank))
        ones = chosen.to(tl.int32)
        slot = listed + tl.cumsum(ones, 0) - ones
        tl.store(list_row + slot, row * G + group, mask=chosen)
        listed += tl.sum(ones, 0)
        ties += tl.sum(is_equal, 0)
    tl.store(listed_ptr + row, listed)
    # The list is read back by other threads than wrote it.
    tl.debug_barrier()

    key = 0
    rank = k
    selected = 0
    for digit in range(PASSES):
        top = 31 - 8 * digit
        shift = tl.maximum(top - 8, 0)
        counts = tl.zeros([256], tl.int32)
        for start in range(0, listed, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            _, keys, _ = load_groups(pre_ptr, list_row, None, slots, listed, F, G, GROUP)
            counts += count_digits(keys, key, top, shift)
        rank = tl.minimum(rank, tl.sum(counts, 0))
        selected = tl.maximum(selected, rank)
        key, rank = descend(counts, key, rank, shift)
    tl.store(state_ptr + 2 * row, key)
    tl.store(state_ptr + 2 * row + 1, rank)
    tl.store(counts_ptr + row + 1, selected)


@jit
def row_emit_kernel(
    pre_ptr, list_ptr, listed_ptr, state_ptr, offsets_ptr, values_ptr, indices_ptr,
    B, F, G, list_capacity, capacity,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ties_before = tl.zeros([], tl.int32)
    emit_row(
        pre_ptr, list_ptr + row.to(tl.int64) * list_capacity, None,
        0, tl.load(listed_ptr + row),  # first, stop
        tl.load(state_ptr + 2 * row), tl.load(state_ptr + 2 * row + 1),  # threshold_key, quota
        tl.load(offsets_ptr + row), ties_before,  # greater, equal
        values_ptr, indices_ptr,
        F, G,
        GROUP, BLOCK,
    )  # fmt: skip
    clear_tail(values_ptr, indices_ptr, tl.load(offsets_ptr + B), capacity, BLOCK)


def topk(pre: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``values, indices, offsets`` of the ``k > 0`` largest entries of each row of ``pre [B, F]``."""
    (B, F), G = pre.shape, maxima.shape[1]
    pre, keys = pre.contiguous(), maxima.contiguous().view(torch.int32)
    integers = {"dtype": torch.int32, "device": pre.device}
    list_capacity = min(k, G)
    group_list = torch.empty(B, list_capacity, **integers)
    listed = torch.empty(B, **integers)
    state = torch.empty(B, 2, **integers)
    counts = torch.zeros(B + 1, **integers)
    values, indices, *_ = empty_selection(pre, maxima, B * k)
    shared = {"pre_ptr": pre, "list_ptr": group_list, "listed_ptr": listed, "state_ptr": state}
    shared |= {"F": F, "G": G, "list_capacity": list_capacity}
    shared |= {"GROUP": GROUP, "num_warps": ROW_WARPS}
    row_select_kernel[(B,)](
        **shared, key_ptr=keys, counts_ptr=counts,
        k=k,
        PASSES=DIGIT_PASSES, BLOCK_KEYS=BLOCK_KEYS, BLOCK=BLOCK_GROUPS,
    )  # fmt: skip
    offsets = counts.cumsum(0, dtype=torch.int32)
    row_emit_kernel[(B,)](
        **shared, offsets_ptr=offsets, values_ptr=values, indices_ptr=indices,
        B=B, capacity=B * k,
        BLOCK=BLOCK_EMIT,
    )  # fmt: skip
    return values, indices, offsets
