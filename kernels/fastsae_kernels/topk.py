"""Per-token TopK: the k largest positive pre-activations of each token.

    z[b] = pre[b] where among the k largest positive entries of token b, else 0

Ties go to the lower latent; non-positive entries and NaN are never selected. Gao et al. 2024
(arXiv:2406.04093), section 2.3. It is also how a BatchTopK autoencoder is used at inference.

On a GPU one program selects in one row: its k largest groups by their maxima, then the k-th largest
entry inside them (``groups.py`` has the proof), both by four histograms of 8-bit digits; a second
launch writes the CSR arrays. Any ``k <= F``: nothing has to fit in registers.

Bytes after the group maxima: 4 x 4 B per group, 5 x 128 B per listed group, 8 B per entry written.
Deterministic, bit for bit.
"""

import torch
from torch import Tensor

from .aot import Case
from .dispatch import implementation, jit, register, tl
from .groups import (
    DIGIT_PASSES,
    GROUP,
    GroupMax,
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
from .sparse import CSR, scatter_values

_BLOCK_KEYS = 1024
_BLOCK_GROUPS = 64
_BLOCK_EMIT = 32
_WARPS = 8
_MAX_CAPACITY = 2**31 - 1


# --- kernels ------------------------------------------------------------------------------------


@jit
def _load_keys(max_ptr, row, group, G):
    maximum = tl.load(max_ptr + row.to(tl.int64) * G + group, mask=group < G, other=0.0)
    return maximum.to(tl.int32, bitcast=True)


@jit
def _select_kernel(
    pre_ptr,
    max_ptr,
    list_ptr,
    listed_ptr,
    state_ptr,
    counts_ptr,
    F,
    G,
    k,
    list_capacity,
    PASSES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
            counts += count_digits(_load_keys(max_ptr, row, group, G), key, top, shift)
        # Only in the first pass can there be fewer than are asked for.
        rank = tl.minimum(rank, tl.sum(counts, 0))
        key, rank = descend(counts, key, rank, shift)

    list_row = list_ptr + row.to(tl.int64) * list_capacity
    listed = 0
    ties = 0
    for start in range(0, G, BLOCK_KEYS):
        group = start + tl.arange(0, BLOCK_KEYS)
        keys = _load_keys(max_ptr, row, group, G)
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
            _, bits, _ = load_group_bits(pre_ptr, list_row, slots, listed, F, G, GROUP)
            counts += count_digits(positive_keys(bits), key, top, shift)
        rank = tl.minimum(rank, tl.sum(counts, 0))
        selected = tl.maximum(selected, rank)
        key, rank = descend(counts, key, rank, shift)
    tl.store(state_ptr + 2 * row, key)
    tl.store(state_ptr + 2 * row + 1, rank)
    tl.store(counts_ptr + row + 1, selected)


@jit
def _emit_kernel(
    pre_ptr,
    list_ptr,
    listed_ptr,
    state_ptr,
    offsets_ptr,
    values_ptr,
    indices_ptr,
    B,
    F,
    G,
    list_capacity,
    capacity,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    ties_before = tl.zeros([], tl.int32)
    emit_row(
        pre_ptr,
        list_ptr + row.to(tl.int64) * list_capacity,
        0,
        tl.load(listed_ptr + row),
        tl.load(state_ptr + 2 * row),
        tl.load(state_ptr + 2 * row + 1),
        tl.load(offsets_ptr + row),
        ties_before,
        values_ptr,
        indices_ptr,
        F,
        G,
        GROUP,
        BLOCK,
    )
    clear_tail(values_ptr, indices_ptr, tl.load(offsets_ptr + B), capacity, BLOCK)


# --- launch, torch, operation -------------------------------------------------------------------


def _select_triton(pre: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    (B, F), G = pre.shape, maxima.shape[1]
    pre, maxima = pre.contiguous(), maxima.contiguous()
    integers = {"dtype": torch.int32, "device": pre.device}
    list_capacity = min(k, G)
    group_list = torch.empty(B, list_capacity, **integers)
    listed = torch.empty(B, **integers)
    state = torch.empty(B, 2, **integers)
    counts = torch.zeros(B + 1, **integers)
    values = torch.empty(B * k, dtype=pre.dtype, device=pre.device)
    indices = torch.empty(B * k, **integers)
    _select_kernel[(B,)](
        pre,
        maxima,
        group_list,
        listed,
        state,
        counts,
        F,
        G,
        k,
        list_capacity,
        PASSES=DIGIT_PASSES,
        GROUP=GROUP,
        BLOCK_KEYS=_BLOCK_KEYS,
        BLOCK=_BLOCK_GROUPS,
        num_warps=_WARPS,
    )
    offsets = counts.cumsum(0, dtype=torch.int32)
    _emit_kernel[(B,)](
        pre,
        group_list,
        listed,
        state,
        offsets,
        values,
        indices,
        B,
        F,
        G,
        list_capacity,
        B * k,
        GROUP=GROUP,
        BLOCK=_BLOCK_EMIT,
        num_warps=_WARPS,
    )
    return values, indices, offsets


def _fake(pre: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    capacity = pre.shape[0] * k
    return (
        pre.new_empty(capacity),
        pre.new_empty(capacity, dtype=torch.int32),
        pre.new_empty(pre.shape[0] + 1, dtype=torch.int32),
    )


def _setup_context(ctx, inputs, output) -> None:
    _, indices, offsets = output
    ctx.latents = inputs[0].shape[1]
    ctx.save_for_backward(indices, offsets)


def _backward(ctx, values_gradient, *_):
    return scatter_values(values_gradient, *ctx.saved_tensors, ctx.latents), None, None


@register(fake=_fake, setup_context=_setup_context, backward=_backward)
def _topk(pre: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    capacity = len(pre) * k
    if capacity == 0:
        offsets = pre.new_zeros(len(pre) + 1, dtype=torch.int32)
        return pre.new_empty(0), pre.new_empty(0, dtype=torch.int32), offsets
    if implementation(pre) == "torch":
        return padded_csr(pre, largest_positive(pre, maxima, k, per_token=True), capacity)
    return _select_triton(pre, maxima, k)


def topk(pre: Tensor, k: int, maxima: GroupMax | None = None) -> CSR:
    """The ``k`` largest positive entries of each token of ``pre [B, F]``, ties to the lower latent.

    ``pre`` is float32, bfloat16, float16 (float64 on torch); ``k`` is clamped to ``[0, F]``; the CSR
    arrays have ``B * k`` slots, of which ``offsets[-1]`` are entries: fewer where a token has fewer
    than ``k`` positive ones. ``values`` is differentiable in ``pre``. ``maxima`` as in ``batch_topk``.

    Deterministic; never waits for the device. Raises ValueError for a wrong shape or dtype.
    """
    check_pre(pre, "topk")
    k = min(max(k, 0), pre.shape[1])
    if pre.shape[0] * k > _MAX_CAPACITY:
        raise ValueError(
            f"topk: {pre.shape[0]} tokens x k = {k} do not fit 32-bit places; "
            "select from fewer tokens at once"
        )
    maxima = group_max(pre) if maxima is None else maxima
    return CSR(*_topk(pre, maxima.values, k))


def aot_cases() -> list[Case]:
    sizes = {n: "i32" for n in ("B", "F", "G", "k", "list_capacity", "capacity")}
    integers = ("list_ptr", "listed_ptr", "state_ptr", "counts_ptr", "offsets_ptr", "indices_ptr")
    types = sizes | {n: "*i32" for n in integers} | {"max_ptr": "*fp32"}
    select = {"PASSES": DIGIT_PASSES, "BLOCK_KEYS": _BLOCK_KEYS, "BLOCK": _BLOCK_GROUPS}
    configurations = (
        ("select", _select_kernel, select | {"GROUP": GROUP}),
        ("emit", _emit_kernel, {"GROUP": GROUP, "BLOCK": _BLOCK_EMIT}),
    )
    return [
        Case(
            f"topk {label} {dtype}",
            kernel,
            {
                name: (types | {"pre_ptr": f"*{dtype}", "values_ptr": f"*{dtype}"})[name]
                for name in getattr(kernel, "arg_names", ())
                if name not in constexprs
            },
            constexprs,
            divisible=tuple(sizes),
            num_warps=_WARPS,
            # A thread that emits holds 4 entries.
            vector_loads=label == "select" or dtype == "fp32",
            representative=label == "select" and dtype == "fp32",
        )
        for label, kernel, constexprs in configurations
        for dtype in ("fp32", "bf16", "fp16")
    ]
