"""The kernels of the selection; :mod:`fastsae_kernels.selection` has the algorithm."""

import torch
from torch import Tensor

from ..dispatch import cdiv, jit, tl
from ..dtypes import accumulator, float_bits

GROUP = 32
DIGIT_PASSES = 4
# Enough programs to fill any GPU; more only add to the contention on the histogram.
MAX_COUNTING_PROGRAMS = 1024
BLOCK_KEYS = 1024  # keys a program reads at a time
BLOCK_GROUPS = 64  # groups, of 32 entries, a program reads at a time
BLOCK_EMIT = 32  # the same, where two running counts take registers too
BLOCK_ROW = 128  # entries of a token that a program reads at a time; there are k or so
ROW_WARPS = 8  # of the kernels that write a row's entries
EMIT_WARPS = 2
STEP_TIES = 4  # equal peaks that are compared with a block of others at a time
# Counters of one selection, all zero at first. A key has 31 bits: digits of 7, 8, 8 and 8. Of the first
# [128] and, over the keys that agree in it, of the second: [256, 128], so that neighbours do not meet in
# one line of the cache. Over the keys that agree in both, of the third [256] and of the last two [256, 256].
MIDDLE = tl.constexpr(128)
LOW = tl.constexpr(128 + 256 * 128)
LAST = tl.constexpr(128 + 256 * 128 + 256)
# Behind them what one launch leaves to the next: the key's first two digits and its rank among those that
# have them; whether there were as many keys as asked for; of the entries how many were gathered, above
# which bound; the threshold, and how many of those level with it are selected.
STATE = tl.constexpr(128 + 256 * 128 + 256 + 256 * 256)
UPPER, RANK, ENOUGH, NUMBER, BOUND, THRESHOLD, QUOTA = map(tl.constexpr, range(7))
COUNTERS = 128 + 256 * 128 + 256 + 256 * 256 + 8
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
def descend(counts, prefix, rank):
    """The digit, of which ``counts`` keys have each value, of the ``rank``-th largest key, or of the last
    one if there are fewer; joined to ``prefix``. And the rank among the keys that have it."""
    at_least = tl.cumsum(counts, 0, reverse=True)
    rank = tl.minimum(rank, tl.max(at_least, 0))
    digit = tl.sum((at_least >= rank).to(tl.int32), 0) - 1
    above = tl.max(tl.where(at_least < rank, at_least, 0), 0)
    return digit + prefix * counts.shape[0], rank - above


@jit
def _load_keys(key_ptr, row, group, G):
    return tl.load(key_ptr + row.to(tl.int64) * G + group, mask=group < G, other=0)


@jit
def load_groups(pre_ptr, list_ptr, peaks_ptr, row, slots, stop, F, GROUP: tl.constexpr):
    """The entries of a row's listed groups: raw, as keys, with their columns, all ``[slots, 32]``."""
    listed = slots < stop
    group = tl.load(list_ptr + slots, mask=listed, other=0)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = listed[:, None] & (column < F)
    entries = tl.load(pre_ptr + row.to(tl.int64) * F + column, mask=inside, other=0.0)
    keys = positive_keys(float_bits(entries))
    if peaks_ptr is not None:
        peak = tl.load(peaks_ptr + column, mask=inside, other=-1)
        keys = tl.where(peak == row, PEAK_KEY, keys)
    return entries, keys, column


@jit
def before_in_tile(chosen):
    """How many of ``chosen [N, 32]`` stand before each place, in row-major order."""
    ones = chosen.to(tl.int32)
    in_row = tl.sum(ones, 1)
    return tl.cumsum(ones, 1) - ones + (tl.cumsum(in_row, 0) - in_row)[:, None]


@jit
def emit_tile(
    entries, keys, column,
    threshold, quota, greater, equal,
    values_ptr, indices_ptr,
):  # fmt: skip
    """Write the entries above the threshold and, of the ties, the first ``quota``.

    ``greater`` and ``equal`` count such entries before these; returned are they with these.
    """
    is_greater = keys > threshold
    is_equal = keys == threshold
    tie = equal + before_in_tile(is_equal)
    chosen = is_greater | (is_equal & (tie < quota))
    slot = greater + before_in_tile(is_greater) + tl.minimum(tie, quota)
    tl.store(values_ptr + slot, entries, mask=chosen)
    tl.store(indices_ptr + slot, column, mask=chosen)
    greater += tl.sum(tl.sum(is_greater.to(tl.int32), 1), 0)
    equal += tl.sum(tl.sum(is_equal.to(tl.int32), 1), 0)
    return greater, equal


@jit
def emit_row(
    pre_ptr, list_ptr, peaks_ptr, row, listed,
    threshold, quota, greater, equal,
    values_ptr, indices_ptr,
    F,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row's entries from its ``listed`` groups."""
    for start in range(0, listed, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        entries, keys, column = load_groups(
            pre_ptr, list_ptr, peaks_ptr, row, slots, listed, F, GROUP
        )
        greater, equal = emit_tile(
            entries, keys, column, threshold, quota, greater, equal, values_ptr, indices_ptr
        )


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
    # The low half, which stands first, holds the token's complement, or 0.
    return packed.view(torch.int32)[::2].bitwise_not()


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
    group_max_kernel[(cdiv(B, rows), cdiv(G, BLOCK_GROUPS))](
        pre_ptr=pre, max_ptr=values, nonfinite_ptr=nonfinite, peaks_ptr=packed,
        B=B, F=F, G=G,
        GROUP=GROUP, BLOCK=BLOCK_GROUPS, ROWS=rows,
    )  # fmt: skip
    return values, nonfinite, unpacked_peaks(packed, pre)


# --- batch level --------------------------------------------------------------------------------


@jit
def _find_upper(counters_ptr, rank):
    """The upper two digits of the ``rank``-th largest key, and its rank among those that have them."""
    top, rank = descend(tl.load(counters_ptr + tl.arange(0, 128)), 0, rank)
    counts = tl.load(counters_ptr + MIDDLE + tl.arange(0, 256) * 128 + top)
    return descend(counts, top, rank)


@jit
def _find_key(counters_ptr):
    """The key that was looked for, and its rank among the equal ones."""
    upper = tl.load(counters_ptr + STATE + UPPER)
    rank = tl.load(counters_ptr + STATE + RANK)
    low, rank = descend(tl.load(counters_ptr + LOW + tl.arange(0, 256)), 0, rank)
    counts = tl.load(counters_ptr + LAST + low * 256 + tl.arange(0, 256))
    low, rank = descend(counts, low, rank)
    return (upper << 16) | low, rank


@jit
def count_keys_kernel(
    key_ptr, counters_ptr,
    number, rank,
    TOP: tl.constexpr, MIDDLE_TOO: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count how often positive keys have each first digit, each second or both; or the last two, of the keys
    that agree with the ``rank``-th largest in the others.

    Every program works out for itself what earlier launches found: no program ever waits for another.
    """
    BINS: tl.constexpr = 128 if TOP else 256  # pyright: ignore
    total = tl.zeros([BINS], tl.int32)
    filled, top, upper = number, 0, 0
    if GATHERED:
        filled = tl.load(counters_ptr + STATE + NUMBER)
    if MIDDLE_TOO and not TOP:
        top, rank = descend(tl.load(counters_ptr + tl.arange(0, 128)), 0, rank)
    if not MIDDLE_TOO and not TOP:
        upper, rank_within = _find_upper(counters_ptr, rank)
        if tl.program_id(0) == 0:
            tl.store(counters_ptr + STATE + UPPER, upper)
            tl.store(counters_ptr + STATE + RANK, rank_within)
            positive = tl.sum(tl.load(counters_ptr + tl.arange(0, 128)), 0)
            tl.store(counters_ptr + STATE + ENOUGH, (positive >= rank).to(tl.int32))
    for start in range(tl.program_id(0) * BLOCK, filled, tl.num_programs(0) * BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + slot, mask=slot < number, other=0)
        if GATHERED:
            key = tl.where(slot < filled, key, 0)
        if TOP:
            total += tl.histogram(key >> 24, 128, mask=key > 0)
            if MIDDLE_TOO:
                place = MIDDLE + ((key >> 16) & 255) * 128 + (key >> 24)
                tl.atomic_add(counters_ptr + place, 1, mask=key > 0, sem="relaxed")
        elif MIDDLE_TOO:
            counted = (key > 0) & ((key >> 24) == top)
            total += tl.histogram((key >> 16) & 255, 256, mask=counted)
        else:
            # Few agree, so they need no histogram of the program's own.
            counted = (key > 0) & ((key >> 16) == upper)
            low = key & 0xFFFF
            tl.atomic_add(counters_ptr + LOW + (low >> 8), 1, mask=counted, sem="relaxed")
            tl.atomic_add(counters_ptr + LAST + low, 1, mask=counted, sem="relaxed")
    if TOP:
        digit = tl.arange(0, 128)
        tl.atomic_add(counters_ptr + digit, total, mask=total > 0, sem="relaxed")
    elif MIDDLE_TOO:
        place = MIDDLE + tl.arange(0, 256) * 128 + top
        tl.atomic_add(counters_ptr + place, total, mask=total > 0, sem="relaxed")


@jit
def gather_entries_kernel(
    pre_ptr, key_ptr, peaks_ptr, counters_ptr, list_ptr,
    entry_key_ptr, entry_column_ptr, state_ptr, rows_ptr,
    F, G,
    GROUP: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gather a token's entries above the bound, from the groups that reach it, in order and in one piece.

    Where among the other tokens' depends on who comes first. ``rows [B, 4]``: where, how many, how many
    are level with the bound, how many groups are listed.
    """
    row = tl.program_id(0)
    bound, _rank = _find_key(counters_ptr)
    # Fewer groups than are asked for bound nothing.
    bound = tl.where(tl.load(counters_ptr + STATE + ENOUGH) > 0, bound, 0)
    if tl.program_id(0) == 0:
        tl.store(state_ptr + BOUND, bound)
    list_ptr += row.to(tl.int64) * G
    listed = 0
    for start in range(0, G, BLOCK_KEYS):
        group = start + tl.arange(0, BLOCK_KEYS)
        keys = _load_keys(key_ptr, row, group, G)
        chosen = (keys >= bound) & (keys > 0)
        ones = chosen.to(tl.int32)
        tl.store(list_ptr + listed + tl.cumsum(ones, 0) - ones, group, mask=chosen)
        listed += tl.sum(ones, 0)
    # The list is read back by other threads than wrote it.
    tl.debug_barrier()

    above = tl.zeros([BLOCK], tl.int32)
    level = tl.zeros([BLOCK], tl.int32)
    for start in range(0, listed, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        _, keys, _ = load_groups(pre_ptr, list_ptr, peaks_ptr, row, slots, listed, F, GROUP)
        above += tl.sum((keys > bound).to(tl.int32), 1)
        level += tl.sum((keys == bound).to(tl.int32), 1)
    number = tl.sum(above, 0)
    first = tl.atomic_add(state_ptr + NUMBER, number, sem="relaxed")
    tl.store(rows_ptr + 4 * row, first)
    tl.store(rows_ptr + 4 * row + 1, number)
    tl.store(rows_ptr + 4 * row + 2, tl.sum(level, 0))
    tl.store(rows_ptr + 4 * row + 3, listed)
    for start in range(0, listed, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        _, keys, column = load_groups(pre_ptr, list_ptr, peaks_ptr, row, slots, listed, F, GROUP)
        kept = keys > bound
        place = first + before_in_tile(kept)
        tl.store(entry_key_ptr + place, keys, mask=kept)
        tl.store(entry_column_ptr + place, column, mask=kept)
        first += tl.sum(tl.sum(kept.to(tl.int32), 1), 0)


@jit
def count_entries_kernel(
    entry_key_ptr, rows_ptr, counters_ptr, counts_ptr,
    B, num_selected,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Per token, the entries above the threshold and level with it, into ``counts [2, B]``."""
    row = tl.program_id(0)
    threshold, quota = _find_key(counters_ptr)
    bound = tl.load(counters_ptr + STATE + BOUND)
    gathered = tl.load(counters_ptr + STATE + NUMBER)
    # Too few lie above the bound: it is the threshold itself.
    at_bound = (bound > 0) & (gathered < num_selected)
    threshold = tl.where(at_bound, bound, threshold)
    if row == 0:
        tl.store(counters_ptr + STATE + THRESHOLD, threshold)
        tl.store(counters_ptr + STATE + QUOTA, tl.where(at_bound, num_selected - gathered, quota))
    first = tl.load(rows_ptr + 4 * row)
    number = tl.load(rows_ptr + 4 * row + 1)
    greater = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, number, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(entry_key_ptr + first + slot, mask=slot < number, other=0)
        greater += (key > threshold).to(tl.int32)
        equal += (key == threshold).to(tl.int32)
    level = tl.where(at_bound, tl.load(rows_ptr + 4 * row + 2), tl.sum(equal, 0))
    tl.store(counts_ptr + row, tl.sum(greater, 0))
    tl.store(counts_ptr + B + row, level)


@jit
def batch_emit_kernel(
    pre_ptr, peaks_ptr, list_ptr, entry_key_ptr, entry_column_ptr, rows_ptr, counts_ptr, counters_ptr,
    values_ptr, indices_ptr, offsets_ptr, threshold_ptr,
    B, F, G, capacity,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    threshold = tl.load(counters_ptr + STATE + THRESHOLD)
    quota = tl.load(counters_ptr + STATE + QUOTA)
    gathered = tl.load(counters_ptr + STATE + NUMBER)
    at_bound = (tl.load(counters_ptr + STATE + BOUND) > 0) & (gathered < capacity)
    above = tl.zeros([BLOCK_ROWS], tl.int32)
    level = tl.zeros([BLOCK_ROWS], tl.int32)
    for start in range(0, row, BLOCK_ROWS):
        before = start + tl.arange(0, BLOCK_ROWS)
        above += tl.load(counts_ptr + before, mask=before < row, other=0)
        level += tl.load(counts_ptr + B + before, mask=before < row, other=0)
    greater = tl.sum(above, 0)
    equal = tl.sum(level, 0)
    tl.store(offsets_ptr + row, greater + tl.minimum(equal, quota))
    if at_bound:
        # Entries level with the threshold were not gathered.
        emit_row(
            pre_ptr, list_ptr + row.to(tl.int64) * G, peaks_ptr, row, tl.load(rows_ptr + 4 * row + 3),
            threshold, quota, greater, equal,
            values_ptr, indices_ptr,
            F,
            GROUP, BLOCK,
        )  # fmt: skip
    else:
        first = tl.load(rows_ptr + 4 * row)
        number = tl.load(rows_ptr + 4 * row + 1)
        place = tl.arange(0, BLOCK_ROW // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        for start in range(0, number, BLOCK_ROW):
            there = start + place < number
            slot = first + start + place
            keys = tl.load(entry_key_ptr + slot, mask=there, other=0)
            column = tl.load(entry_column_ptr + slot, mask=there, other=0)
            entries = tl.load(pre_ptr + row.to(tl.int64) * F + column, mask=there, other=0.0)
            greater, equal = emit_tile(
                entries, keys, column, threshold, quota, greater, equal, values_ptr, indices_ptr
            )
    nnz = tl.where(at_bound, capacity, tl.minimum(gathered, capacity))
    clear_tail(values_ptr, indices_ptr, nnz, capacity, BLOCK_ROW)
    if row == B - 1:
        tl.store(offsets_ptr + B, nnz)
        # Without any entry the quota is 0 and the key means nothing; without any but peaks it is theirs.
        key = tl.where((quota > 0) & (threshold < PEAK_KEY), threshold, 0x7F800000)
        tl.store(threshold_ptr, key.to(tl.float32, bitcast=True))


@jit
def peak_keys_kernel(pre_ptr, peaks_ptr, key_ptr, F, BLOCK: tl.constexpr):
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(peaks_ptr + latent, mask=latent < F, other=-1)
    entry = tl.load(pre_ptr + token.to(tl.int64) * F + latent, mask=token >= 0, other=0.0)
    tl.store(key_ptr + latent, positive_keys(float_bits(entry)), mask=latent < F)


@jit
def mark_peaks_kernel(
    peaks_ptr, peak_key_ptr, counters_ptr, kept_ptr, key_ptr,
    F, G,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Give the groups that hold a peak its key; with ``kept`` those of the largest peaks, which are kept."""
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(peaks_ptr + latent, mask=latent < F, other=-1)
    if kept_ptr is not None:
        threshold, quota = _find_key(counters_ptr)
        key = tl.load(peak_key_ptr + latent, mask=latent < F, other=0)
        tie = tl.zeros([BLOCK], tl.int32)
        if tl.load(counters_ptr + LAST + (threshold & 0xFFFF)) > quota:
            # Equal ones stand in the order of their tokens, then of their latents.
            for start in range(0, F, STEP):
                other = start + tl.arange(0, STEP)
                other_key = tl.load(peak_key_ptr + other, mask=other < F, other=0)
                other_token = tl.load(peaks_ptr + other, mask=other < F, other=-1)
                same = other_token[None, :] == token[:, None]
                earlier = (other_token[None, :] < token[:, None]) | (
                    same & (other[None, :] < latent[:, None])
                )
                tied = earlier & (other_key == threshold)[None, :]
                tie += tl.sum(tied.to(tl.int32), 1)
        kept = (key > threshold) | ((key == threshold) & (tie < quota))
        token = tl.where(kept, token, -1)
        tl.store(kept_ptr + latent, token, mask=latent < F)
    place = token.to(tl.int64) * G + latent // GROUP
    tl.store(key_ptr + place, tl.full([BLOCK], PEAK_KEY, tl.int32), mask=token >= 0)


def _count_keys(keys: Tensor, counters: Tensor, rank: int, gathered: bool = False) -> None:
    """Count the digits of ``keys``, or of those alone that were ``gathered``, for :func:`_find_key`."""
    # Of few keys the first two digits are counted at once.
    passes = [(True, False), (False, True), (False, False)]
    programs = cdiv(len(keys), BLOCK_KEYS)
    if gathered:
        # As a rule little more than are asked for; if not, a program reads more of them.
        passes, programs = [(True, True), (False, False)], cdiv(2 * rank, BLOCK_KEYS)
    for top, middle in passes:
        count_keys_kernel[(min(programs, MAX_COUNTING_PROGRAMS),)](
            key_ptr=keys, counters_ptr=counters,
            number=len(keys), rank=rank,
            TOP=top, MIDDLE_TOO=middle, GATHERED=gathered, BLOCK=BLOCK_KEYS,
        )  # fmt: skip


def batch_topk(
    pre: Tensor, maxima: Tensor, peaks: Tensor, num_selected: int, most_peaks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``values, indices, offsets, threshold`` of ``num_selected > 0`` entries of ``pre [B, F]``.

    The ``most_peaks`` largest of the ``peaks [F]`` come first; ``[0]`` for a selection without.
    """
    (B, F), G = pre.shape, maxima.shape[1]
    pre, keys = pre.contiguous(), maxima.contiguous().view(torch.int32)
    integers = {"dtype": torch.int32, "device": pre.device}
    # For the groups, the entries and the peaks.
    counters = torch.zeros(3 if len(peaks) else 2, COUNTERS, **integers)
    # Above the bound are fewer groups than are selected.
    entry_keys = torch.empty(min(GROUP * num_selected, B * F), **integers)
    entry_columns = torch.empty_like(entry_keys)
    group_list = torch.empty(B, G, **integers)
    rows, counts = torch.empty(B, 4, **integers), torch.empty(2, B, **integers)
    values, indices, offsets, threshold = empty_selection(pre, maxima, num_selected)

    if len(peaks):
        keys, peak_keys, kept = keys.clone(), None, None
        grid = (cdiv(F, BLOCK_KEYS),)
        if most_peaks < F:
            peak_keys, kept = torch.empty_like(peaks), torch.empty_like(peaks)
            peak_keys_kernel[grid](
                pre_ptr=pre, peaks_ptr=peaks, key_ptr=peak_keys, F=F, BLOCK=BLOCK_KEYS
            )
            _count_keys(peak_keys, counters[2], most_peaks)
        mark_peaks_kernel[grid](
            peaks_ptr=peaks, peak_key_ptr=peak_keys, counters_ptr=counters[2], kept_ptr=kept,
            key_ptr=keys,
            F=F, G=G,
            GROUP=GROUP, BLOCK=BLOCK_KEYS, STEP=STEP_TIES,
        )  # fmt: skip
        peaks = peaks if kept is None else kept

    _count_keys(keys.view(-1), counters[0], num_selected)
    shared = {"pre_ptr": pre, "peaks_ptr": peaks if len(peaks) else None, "list_ptr": group_list}
    shared |= {"entry_key_ptr": entry_keys, "entry_column_ptr": entry_columns, "rows_ptr": rows}
    shared |= {"F": F, "G": G, "GROUP": GROUP}
    gather_entries_kernel[(B,)](
        **shared, key_ptr=keys, counters_ptr=counters[0], state_ptr=counters[1, STATE:],
        BLOCK_KEYS=BLOCK_KEYS, BLOCK=BLOCK_EMIT,
    )  # fmt: skip
    _count_keys(entry_keys, counters[1], num_selected, gathered=True)
    count_entries_kernel[(B,)](
        entry_key_ptr=entry_keys, rows_ptr=rows, counters_ptr=counters[1], counts_ptr=counts,
        B=B, num_selected=num_selected,
        BLOCK=BLOCK_ROW, num_warps=1,
    )  # fmt: skip
    batch_emit_kernel[(B,)](
        **shared, counts_ptr=counts, counters_ptr=counters[1],
        values_ptr=values, indices_ptr=indices, offsets_ptr=offsets, threshold_ptr=threshold,
        B=B, capacity=num_selected,
        BLOCK=BLOCK_EMIT // 2, BLOCK_ROW=BLOCK_ROW, BLOCK_ROWS=BLOCK_KEYS, num_warps=EMIT_WARPS,
    )  # fmt: skip
    return values, indices, offsets, threshold


# --- per token ----------------------------------------------------------------------------------


@jit
def _digit_counts(keys, prefix, shift):
    """How many of the positive keys that agree with ``prefix`` have each digit ``[256]`` at ``shift``."""
    flat = tl.reshape(keys, [keys.numel])
    counted = (flat > 0) & ((flat >> shift) >> 8 == prefix)
    return tl.histogram((flat >> shift) & 255, 256, mask=counted)


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
        shift = 24 - 8 * digit
        counts = tl.zeros([256], tl.int32)
        for start in range(0, G, BLOCK_KEYS):
            group = start + tl.arange(0, BLOCK_KEYS)
            counts += _digit_counts(_load_keys(key_ptr, row, group, G), key, shift)
        key, rank = descend(counts, key, rank)
    key &= 0x7FFFFFFF  # all ones where nothing is positive

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
        tl.store(list_row + slot, group, mask=chosen)
        listed += tl.sum(ones, 0)
        ties += tl.sum(is_equal, 0)
    tl.store(listed_ptr + row, listed)
    # The list is read back by other threads than wrote it.
    tl.debug_barrier()

    key = 0
    rank = k
    selected = 0
    for digit in range(PASSES):
        shift = 24 - 8 * digit
        counts = tl.zeros([256], tl.int32)
        for start in range(0, listed, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            _, keys, _ = load_groups(pre_ptr, list_row, None, row, slots, listed, F, GROUP)
            counts += _digit_counts(keys, key, shift)
        if digit == 0:
            # There can be fewer than are asked for.
            selected = tl.minimum(rank, tl.sum(counts, 0))
        key, rank = descend(counts, key, rank)
    key &= 0x7FFFFFFF
    tl.store(state_ptr + 2 * row, key)
    tl.store(state_ptr + 2 * row + 1, rank)
    tl.store(counts_ptr + row + 1, selected)


@jit
def row_emit_kernel(
    pre_ptr, list_ptr, listed_ptr, state_ptr, offsets_ptr, values_ptr, indices_ptr,
    B, F, list_capacity, capacity,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ties_before = tl.zeros([], tl.int32)
    emit_row(
        pre_ptr, list_ptr + row.to(tl.int64) * list_capacity, None, row,
        tl.load(listed_ptr + row),
        tl.load(state_ptr + 2 * row), tl.load(state_ptr + 2 * row + 1),  # threshold, quota
        tl.load(offsets_ptr + row), ties_before,  # greater, equal
        values_ptr, indices_ptr,
        F,
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
    shared |= {"F": F, "list_capacity": list_capacity}
    shared |= {"GROUP": GROUP, "num_warps": ROW_WARPS}
    row_select_kernel[(B,)](
        **shared, key_ptr=keys, counts_ptr=counts,
        G=G, k=k,
        PASSES=DIGIT_PASSES, BLOCK_KEYS=BLOCK_KEYS, BLOCK=BLOCK_GROUPS,
    )  # fmt: skip
    offsets = counts.cumsum(0, dtype=torch.int32)
    row_emit_kernel[(B,)](
        **shared, offsets_ptr=offsets, values_ptr=values, indices_ptr=indices,
        B=B, capacity=B * k,
        BLOCK=BLOCK_EMIT,
    )  # fmt: skip
    return values, indices, offsets
