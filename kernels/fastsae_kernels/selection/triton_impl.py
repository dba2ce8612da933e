"""Batch-level TopK: the K largest positive pre-activations of a whole batch, exactly.

    z = pre where pre is among the K largest positive entries of the batch, else 0

The order is total, (value descending, then token-major flat index ascending), so the selection is
unique: the same on every device. Non-positive entries and NaN are never selected; infinity comes
first. ``K = int(k * B)`` is Bussmann et al. 2024 (arXiv:2412.06410), section 3.

On a GPU, through group maxima (``groups.py`` has the proof):

1. radix-select the K largest groups' smallest key, list exactly K groups in token-major order;
2. radix-select the K-th largest entry inside them;
3. count each token's entries above it and level with it, add up, write the CSR arrays.

``csr_to_csc`` sorts the entries by latent, stably, digit by digit (8 bits, least significant first).

Bytes after the group maxima: 4 x 4 B per group (from L2), 6 x 128 B per listed group, 8 B per entry
written. Deterministic, bit for bit: only integers are added, and no place depends on arrival order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .aot import Case
from .dispatch import implementation, jit, register, tl
from .groups import (
    DIGIT_PASSES,
    GROUP,
    GroupMax,
    cdiv,
    check_pre,
    clear_tail,
    count_digits,
    descend,
    emit_row,
    group_max,
    largest_positive,
    load_group_bits,
    padded_csr,
    positive_keys,
)
from .sparse import CSC, CSR, scatter_values

# Enough programs to fill any GPU; more only add to the contention on the histogram.
_MAX_COUNTING_PROGRAMS = 1024
_BLOCK_KEYS = 1024  # group maxima a program reads at a time
_BLOCK_GROUPS = 64  # groups, of 32 entries, a program reads at a time
_BLOCK_EMIT = 32  # the same, where two running counts take registers too
_EMIT_WARPS = 8
_BLOCK_SORT = 256
_STEP_SORT = 16
_SORT_WARPS = 8
_MAX_CAPACITY = 2**31 - 1


class Selection(NamedTuple):
    """What ``batch_topk`` selected."""

    csr: CSR
    threshold: Tensor  # [] float32, the smallest selected value; +inf where nothing was
    nonfinite: Tensor  # [] bool, pre held a NaN or an infinity


# --- selection: kernels -------------------------------------------------------------------------


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
        shift: tl.constexpr = 31 - 8 * PASS if PASS < 4 else 0
        prefix, rank = descend(counts, prefix, rank, shift)
        if tl.program_id(0) == 0:
            tl.store(state_ptr + 2 * PASS, prefix)
            tl.store(state_ptr + 2 * PASS + 1, rank)
    return prefix, rank


@jit
def _count_group_digits_kernel(
    max_ptr, histograms_ptr, state_ptr, groups, rank, PASS: tl.constexpr, BLOCK: tl.constexpr
):
    prefix, rank = _narrow(histograms_ptr, state_ptr, rank, PASS)
    shift: tl.constexpr = 23 - 8 * PASS if PASS < 3 else 0
    total = tl.zeros([256], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, groups, tl.num_programs(0) * BLOCK):
        group = start + tl.arange(0, BLOCK)
        key = tl.load(max_ptr + group, mask=group < groups, other=0.0).to(tl.int32, bitcast=True)
        total += count_digits(key, prefix, 31 - 8 * PASS, shift)
    digit = tl.arange(0, 256)
    tl.atomic_add(histograms_ptr + 256 * PASS + digit, total, mask=total > 0, sem="relaxed")


@jit
def _count_entry_digits_kernel(
    pre_ptr,
    list_ptr,
    list_offsets_ptr,
    histograms_ptr,
    state_ptr,
    B,
    F,
    G,
    rank,
    PASS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    prefix, rank = _narrow(histograms_ptr, state_ptr, rank, PASS)
    shift: tl.constexpr = 23 - 8 * PASS if PASS < 3 else 0
    listed = tl.load(list_offsets_ptr + B)
    total = tl.zeros([256], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, listed, tl.num_programs(0) * BLOCK):
        slots = start + tl.arange(0, BLOCK)
        _, bits, _ = load_group_bits(pre_ptr, list_ptr, slots, listed, F, G, GROUP)
        total += count_digits(positive_keys(bits), prefix, 31 - 8 * PASS, shift)
    digit = tl.arange(0, 256)
    tl.atomic_add(histograms_ptr + 256 * PASS + digit, total, mask=total > 0, sem="relaxed")


@jit
def _count_groups_kernel(
    max_ptr, histograms_ptr, state_ptr, counts_ptr, B, G, PASSES: tl.constexpr, BLOCK: tl.constexpr
):
    """Per token, the groups above the threshold and level with it, into ``counts [2, B + 1]``."""
    threshold_key, _quota = _narrow(histograms_ptr, state_ptr, 0, PASSES)
    row = tl.program_id(0)
    greater = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, G, BLOCK):
        group = start + tl.arange(0, BLOCK)
        key = tl.load(max_ptr + row.to(tl.int64) * G + group, mask=group < G, other=0.0)
        key = key.to(tl.int32, bitcast=True)
        greater += (key > threshold_key).to(tl.int32)
        equal += (key == threshold_key).to(tl.int32)
    tl.store(counts_ptr + row + 1, tl.sum(greater, 0))
    tl.store(counts_ptr + B + 1 + row + 1, tl.sum(equal, 0))


@jit
def _list_groups_kernel(
    max_ptr, state_ptr, starts_ptr, list_ptr, list_offsets_ptr, B, G, BLOCK: tl.constexpr
):
    """The chosen groups in token-major order; of the ties the first ``quota``."""
    threshold_key = tl.load(state_ptr)
    quota = tl.load(state_ptr + 1)
    row = tl.program_id(0)
    greater = tl.load(starts_ptr + row)
    equal = tl.load(starts_ptr + B + 1 + row)
    tl.store(list_offsets_ptr + row, greater + tl.minimum(equal, quota))
    for start in range(0, G, BLOCK):
        group = start + tl.arange(0, BLOCK)
        key = tl.load(max_ptr + row.to(tl.int64) * G + group, mask=group < G, other=0.0)
        key = key.to(tl.int32, bitcast=True)
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
def _count_entries_kernel(
    pre_ptr,
    list_ptr,
    list_offsets_ptr,
    histograms_ptr,
    state_ptr,
    counts_ptr,
    B,
    F,
    G,
    PASSES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per token, the entries above the threshold and level with it, into ``counts [2, B + 1]``."""
    threshold_key, _quota = _narrow(histograms_ptr, state_ptr, 0, PASSES)
    row = tl.program_id(0)
    stop = tl.load(list_offsets_ptr + row + 1)
    greater = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.load(list_offsets_ptr + row), stop, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        _, bits, _ = load_group_bits(pre_ptr, list_ptr, slots, stop, F, G, GROUP)
        keys = positive_keys(bits)
        greater += tl.sum((keys > threshold_key).to(tl.int32), 1)
        equal += tl.sum((keys == threshold_key).to(tl.int32), 1)
    tl.store(counts_ptr + row + 1, tl.sum(greater, 0))
    tl.store(counts_ptr + B + 1 + row + 1, tl.sum(equal, 0))


@jit
def _emit_kernel(
    pre_ptr,
    list_ptr,
    list_offsets_ptr,
    state_ptr,
    starts_ptr,
    values_ptr,
    indices_ptr,
    offsets_ptr,
    threshold_ptr,
    B,
    F,
    G,
    capacity,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    threshold_key = tl.load(state_ptr)
    quota = tl.load(state_ptr + 1)
    row = tl.program_id(0)
    greater = tl.load(starts_ptr + row)
    equal = tl.load(starts_ptr + B + 1 + row)
    tl.store(offsets_ptr + row, greater + tl.minimum(equal, quota))
    first = tl.load(list_offsets_ptr + row)
    stop = tl.load(list_offsets_ptr + row + 1)
    emit_row(
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
        GROUP,
        BLOCK,
    )
    nnz = tl.load(starts_ptr + B) + tl.minimum(tl.load(starts_ptr + B + 1 + B), quota)
    clear_tail(values_ptr, indices_ptr, nnz, capacity, BLOCK)
    if row == B - 1:
        tl.store(offsets_ptr + B, nnz)
        # Without any entry the quota is 0 and the key means nothing.
        key = tl.where(quota > 0, threshold_key, 0x7F800000)
        tl.store(threshold_ptr, key.to(tl.float32, bitcast=True))


# --- selection: launch and torch ----------------------------------------------------------------


def _select_triton(pre: Tensor, maxima: Tensor, budget: int) -> tuple[Tensor, ...]:
    (B, F), G = pre.shape, maxima.shape[1]
    pre, maxima = pre.contiguous(), maxima.contiguous()
    integers = {"dtype": torch.int32, "device": pre.device}
    # For the groups and for the entries: 4 histograms, and (key, rank) before and after each digit.
    histograms = torch.zeros(2, DIGIT_PASSES, 256, **integers)
    state = torch.empty(2, DIGIT_PASSES + 1, 2, **integers)
    final = state[:, -1]
    counts = torch.zeros(2, 2, B + 1, **integers)
    group_list = torch.empty(min(budget, B * G), **integers)
    list_offsets = torch.empty(B + 1, **integers)
    values = torch.empty(budget, dtype=pre.dtype, device=pre.device)
    indices = torch.empty(budget, **integers)
    offsets = torch.empty(B + 1, **integers)
    threshold = torch.empty((), dtype=torch.float32, device=pre.device)

    grid = (min(cdiv(B * G, _BLOCK_KEYS), _MAX_COUNTING_PROGRAMS),)
    for digit in range(DIGIT_PASSES):
        _count_group_digits_kernel[grid](
            maxima, histograms[0], state[0], B * G, len(group_list), PASS=digit, BLOCK=_BLOCK_KEYS
        )
    _count_groups_kernel[(B,)](
        maxima, histograms[0], state[0], counts[0], B, G, PASSES=DIGIT_PASSES, BLOCK=_BLOCK_KEYS
    )
    starts = counts[0].cumsum(1, dtype=torch.int32)
    _list_groups_kernel[(B,)](
        maxima, final[0], starts, group_list, list_offsets, B, G, BLOCK=_BLOCK_KEYS
    )

    blocks = {"GROUP": GROUP, "BLOCK": _BLOCK_GROUPS}
    grid = (min(cdiv(len(group_list), _BLOCK_GROUPS), _MAX_COUNTING_PROGRAMS),)
    for digit in range(DIGIT_PASSES):
        _count_entry_digits_kernel[grid](
            pre,
            group_list,
            list_offsets,
            histograms[1],
            state[1],
            B,
            F,
            G,
            budget,
            PASS=digit,
            **blocks,
        )
    _count_entries_kernel[(B,)](
        pre,
        group_list,
        list_offsets,
        histograms[1],
        state[1],
        counts[1],
        B,
        F,
        G,
        PASSES=DIGIT_PASSES,
        **blocks,
    )
    starts = counts[1].cumsum(1, dtype=torch.int32)
    _emit_kernel[(B,)](
        pre,
        group_list,
        list_offsets,
        final[1],
        starts,
        values,
        indices,
        offsets,
        threshold,
        B,
        F,
        G,
        budget,
        GROUP=GROUP,
        BLOCK=_BLOCK_EMIT,
        num_warps=_EMIT_WARPS,
    )
    return values, indices, offsets, threshold


def _select_torch(pre: Tensor, maxima: Tensor, budget: int) -> tuple[Tensor, ...]:
    flat = largest_positive(pre, maxima, budget, per_token=False)
    values, indices, offsets = padded_csr(pre, flat, budget)
    infinity = torch.full((1,), torch.inf, device=pre.device)
    threshold = torch.cat([values[: len(flat)].float(), infinity]).min()
    return values, indices, offsets, threshold


# --- selection: the operation -------------------------------------------------------------------


def _fake(pre: Tensor, maxima: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        pre.new_empty(budget),
        pre.new_empty(budget, dtype=torch.int32),
        pre.new_empty(pre.shape[0] + 1, dtype=torch.int32),
        pre.new_empty((), dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    _, indices, offsets, threshold = output
    ctx.latents = inputs[0].shape[1]
    ctx.save_for_backward(indices, offsets)
    ctx.mark_non_differentiable(threshold)


def _backward(ctx, values_gradient, *_):
    return scatter_values(values_gradient, *ctx.saved_tensors, ctx.latents), None, None


@register(fake=_fake, setup_context=_setup_context, backward=_backward)
def _batch_topk(pre: Tensor, maxima: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if budget == 0:
        return (
            pre.new_empty(0),
            pre.new_empty(0, dtype=torch.int32),
            pre.new_zeros(len(pre) + 1, dtype=torch.int32),
            torch.full((), torch.inf, device=pre.device),
        )
    if implementation(pre) == "torch":
        return _select_torch(pre, maxima, budget)
    return _select_triton(pre, maxima, budget)


def batch_topk(pre: Tensor, budget: int, maxima: GroupMax | None = None) -> Selection:
    """The ``budget`` largest positive entries of ``pre [B, F]``, in a strict total order.

    ``pre`` is float32, bfloat16, float16 (float64 on torch); ``budget`` is clamped to ``[0, B * F]``
    and is the capacity ``K`` of the CSR arrays, ``nnz = offsets[-1] <= K`` of which are entries.
    ``maxima`` are the group maxima of this very ``pre``, where the encoder already took them.
    ``csr.values`` is differentiable in ``pre``: the gradient is dense, zero where nothing was selected.

    Deterministic; never waits for the device. Raises ValueError for a wrong shape or dtype.
    """
    check_pre(pre, "batch_topk")
    budget = min(max(budget, 0), pre.shape[0] * pre.shape[1])
    if budget > _MAX_CAPACITY:
        raise ValueError(
            f"batch_topk: budget {budget} does not fit 32-bit places; select from fewer tokens at once"
        )
    maxima = group_max(pre) if maxima is None else maxima
    values, indices, offsets, threshold = _batch_topk(pre, maxima.values, budget)
    return Selection(CSR(values, indices, offsets), threshold, maxima.nonfinite)


# --- CSR to CSC ---------------------------------------------------------------------------------


@jit
def _sort_keys(slots, order_ptr, indices_ptr, nnz, capacity, F, FIRST: tl.constexpr):
    """CSR place and latent of the sort's slots; empty places have latent ``F`` and so come last."""
    place = slots if FIRST else tl.load(order_ptr + slots, mask=slots < capacity, other=0)
    latent = tl.load(indices_ptr + place, mask=(slots < capacity) & (place < nnz), other=0)
    return place, tl.where(place < nnz, latent, F)


@jit
def _count_latents_kernel(
    order_ptr,
    indices_ptr,
    row_offsets_ptr,
    counts_ptr,
    latent_counts_ptr,
    B,
    F,
    capacity,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Digit histogram of each block, digit-major; in the first pass also how often a latent occurs."""
    block = tl.program_id(0)
    nnz = tl.load(row_offsets_ptr + B)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    place, latent = _sort_keys(slots, order_ptr, indices_ptr, nnz, capacity, F, SHIFT == 0)
    inside = slots < capacity
    if SHIFT == 0:
        tl.atomic_add(latent_counts_ptr + latent + 1, 1, mask=inside & (place < nnz), sem="relaxed")
    counts = tl.histogram((latent >> SHIFT) & 255, 256, mask=inside)
    tl.store(counts_ptr + 1 + tl.arange(0, 256) * tl.num_programs(0) + block, counts)


@jit
def _scatter_latents_kernel(
    order_ptr,
    indices_ptr,
    row_offsets_ptr,
    starts_ptr,
    out_ptr,
    rows_ptr,
    B,
    F,
    capacity,
    search_steps,
    SHIFT: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Move each entry behind those with a smaller digit, and those with the same digit before it."""
    block = tl.program_id(0)
    nnz = tl.load(row_offsets_ptr + B)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    place, latent = _sort_keys(slots, order_ptr, indices_ptr, nnz, capacity, F, SHIFT == 0)
    digit = (latent >> SHIFT) & 255
    inside = slots < capacity

    target = tl.load(starts_ptr + digit * tl.num_programs(0) + block, mask=inside, other=0)
    for start in range(0, BLOCK, STEP):
        others = block * BLOCK + start + tl.arange(0, STEP)
        _, other = _sort_keys(others, order_ptr, indices_ptr, nnz, capacity, F, SHIFT == 0)
        # [BLOCK, STEP]
        same = digit[:, None] == ((other >> SHIFT) & 255)[None, :]
        target += tl.sum((same & (others[None, :] < slots[:, None])).to(tl.int32), 1)

    if LAST:
        filled = inside & (place < nnz)
        # The token of a place: the last row that starts at or before it.
        low = place * 0
        high = low + B
        for _ in range(search_steps):
            middle = (low + high) // 2
            reached = tl.load(row_offsets_ptr + middle, mask=filled, other=0) <= place
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
        tl.store(rows_ptr + target, tl.where(filled, low, 0), mask=inside)
        place = tl.where(filled, place, 0)
    tl.store(out_ptr + target, place, mask=inside)


def _csr_to_csc_triton(indices: Tensor, row_offsets: Tensor, latents: int) -> tuple[Tensor, ...]:
    capacity, B = len(indices), len(row_offsets) - 1
    blocks = cdiv(capacity, _BLOCK_SORT)
    offsets = torch.zeros(latents + 1, dtype=torch.int32, device=indices.device)
    order, positions, rows = (torch.empty_like(indices) for _ in range(3))
    # The sentinel of an empty place is `latents` itself, so its bits count.
    shifts = range(0, max(latents.bit_length(), 1), 8)
    for shift in shifts:
        # Passes alternate between two arrays so that the last one writes `positions`.
        if (len(shifts) - 1 - shift // 8) % 2 == 0:
            source, target = order, positions
        else:
            source, target = positions, order
        counts = torch.zeros(256 * blocks + 1, dtype=torch.int32, device=indices.device)
        _count_latents_kernel[(blocks,)](
            source,
            indices,
            row_offsets,
            counts,
            offsets,
            B,
            latents,
            capacity,
            SHIFT=shift,
            BLOCK=_BLOCK_SORT,
        )
        _scatter_latents_kernel[(blocks,)](
            source,
            indices,
            row_offsets,
            counts.cumsum(0, dtype=torch.int32),
            target,
            rows,
            B,
            latents,
            capacity,
            (B - 1).bit_length(),
            SHIFT=shift,
            LAST=shift == shifts[-1],
            BLOCK=_BLOCK_SORT,
            STEP=_STEP_SORT,
            num_warps=_SORT_WARPS,
        )
    return rows, positions, offsets.cumsum(0, dtype=torch.int32)


def _csr_to_csc_torch(indices: Tensor, row_offsets: Tensor, latents: int) -> tuple[Tensor, ...]:
    nnz = int(row_offsets[-1])
    rows, positions = torch.zeros_like(indices), torch.zeros_like(indices)
    order = indices[:nnz].sort(stable=True)
    positions[:nnz] = order.indices
    rows[:nnz] = torch.searchsorted(row_offsets, order.indices.int(), right=True) - 1
    boundaries = torch.arange(latents + 1, dtype=torch.int32, device=indices.device)
    return rows, positions, torch.searchsorted(order.values, boundaries).int()


def _csr_to_csc_fake(
    indices: Tensor, row_offsets: Tensor, latents: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(indices),
        torch.empty_like(indices),
        indices.new_empty(latents + 1),
    )


@register(fake=_csr_to_csc_fake)
def _csr_to_csc(
    indices: Tensor, row_offsets: Tensor, latents: int
) -> tuple[Tensor, Tensor, Tensor]:
    if len(indices) == 0 or len(row_offsets) == 1:
        zeros = indices.new_zeros(latents + 1)
        return torch.zeros_like(indices), torch.zeros_like(indices), zeros
    if implementation(indices) == "torch":
        return _csr_to_csc_torch(indices, row_offsets, latents)
    return _csr_to_csc_triton(indices.contiguous(), row_offsets.contiguous(), latents)


def csr_to_csc(csr: CSR, latents: int) -> CSC:
    """The entries of ``csr`` by latent; within one, by token.

    Deterministic; never waits for a GPU. Moves about 40 B an entry and digit. Raises ValueError
    unless indices and offsets are int32 vectors.
    """
    for name in ("indices", "offsets"):
        tensor = getattr(csr, name)
        if tensor.ndim != 1 or tensor.dtype != torch.int32:
            raise ValueError(
                f"csr_to_csc: {name} must be an int32 vector, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; pass the CSR that batch_topk or topk returned"
            )
    return CSC(*_csr_to_csc(csr.indices, csr.offsets, latents))


def aot_cases() -> list[Case]:
    i32 = "*i32"
    keys = {"max_ptr": "*fp32", "B": "i32", "G": "i32", "groups": "i32", "rank": "i32"}
    places = {name: i32 for name in ("list_ptr", "list_offsets_ptr", "histograms_ptr", "state_ptr")}
    places |= {name: i32 for name in ("starts_ptr", "counts_ptr", "indices_ptr", "offsets_ptr")}
    sizes = {"B": "i32", "F": "i32", "G": "i32", "rank": "i32", "capacity": "i32"}
    divisible = ("B", "F", "G", "groups", "capacity")
    groups = {"GROUP": GROUP, "BLOCK": _BLOCK_GROUPS}

    def case(label: str, kernel, types: dict[str, str], constexprs: dict, **more) -> Case:
        names = getattr(kernel, "arg_names", ())
        signature = {name: types[name] for name in names if name in types}
        return Case(label, kernel, signature, constexprs, divisible, **more)

    cases = [
        case(
            "batch_topk count groups",
            _count_groups_kernel,
            keys | places,
            {"PASSES": DIGIT_PASSES, "BLOCK": _BLOCK_KEYS},
            representative=True,
        ),
        case("batch_topk list groups", _list_groups_kernel, keys | places, {"BLOCK": _BLOCK_KEYS}),
    ]
    cases += [
        case(
            f"batch_topk count group digits, pass {digit}",
            _count_group_digits_kernel,
            keys | places,
            {"PASS": digit, "BLOCK": _BLOCK_KEYS},
            representative=digit == 1,
        )
        for digit in range(DIGIT_PASSES)
    ]
    for dtype in ("fp32", "bf16", "fp16"):
        pointers = places | sizes | {"pre_ptr": f"*{dtype}", "values_ptr": f"*{dtype}"}
        cases += [
            case(
                f"batch_topk count entry digits, pass {digit}, {dtype}",
                _count_entry_digits_kernel,
                pointers,
                groups | {"PASS": digit},
                representative=digit == 3 and dtype == "fp32",
            )
            for digit in range(DIGIT_PASSES)
        ]
        cases += [
            case(
                f"batch_topk count entries {dtype}",
                _count_entries_kernel,
                pointers,
                groups | {"PASSES": DIGIT_PASSES},
            ),
            case(
                f"batch_topk emit {dtype}",
                _emit_kernel,
                pointers | {"threshold_ptr": "*fp32"},
                {"GROUP": GROUP, "BLOCK": _BLOCK_EMIT},
                num_warps=_EMIT_WARPS,
                vector_loads=dtype == "fp32",  # a thread holds 4 entries
                representative=dtype == "bf16",
            ),
        ]
    sort = sizes | {
        name: i32
        for name in (
            "order_ptr",
            "indices_ptr",
            "row_offsets_ptr",
            "counts_ptr",
            "latent_counts_ptr",
            "starts_ptr",
            "out_ptr",
            "rows_ptr",
        )
    }
    for shift in (0, 8):
        cases += [
            case(
                f"csr_to_csc count, digit {shift // 8}",
                _count_latents_kernel,
                sort,
                {"SHIFT": shift, "BLOCK": _BLOCK_SORT},
                vector_loads=False,
            ),
            case(
                f"csr_to_csc scatter, digit {shift // 8}",
                _scatter_latents_kernel,
                sort | {"search_steps": "i32"},
                {"SHIFT": shift, "LAST": shift == 8, "BLOCK": _BLOCK_SORT, "STEP": _STEP_SORT},
                num_warps=_SORT_WARPS,
                vector_loads=False,
                representative=shift == 8,
            ),
        ]
    return cases
