"""The encoder's matrix product, with the group maxima that the selection needs in its epilogue.

    pre[b, f] = sum_d (x[b, d] - b_dec[d]) * W_enc[d, f] + b_enc[f]
    m[b, g]   = max of the positive entries of pre[b, 32 g : 32 (g + 1)], 0 where there is none
    p[f]      = the token of the largest positive entry of pre[:, f], -1 where there is none; if asked for

``W_enc [D, F]`` is feature-major in memory: a transposed view of a contiguous ``[F, D]``. Operands are
bfloat16, float16 or float32; sums are float32 and so is ``pre``, for the selection must not meet the
ties that rounding to bfloat16 makes. float32 operands go through the fused kernel only where TF32 is
allowed (``torch.backends.cuda.matmul.allow_tf32``); exact float32 is the library's product followed
by ``group_max``.

Bytes: operands once, ``4 B F`` written; taking the maxima here saves reading those back. Arithmetic:
``2 B D F``. Deterministic: each entry is summed by one program in a fixed order, and the configuration
depends on dtype and device alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import INTERPRETED, cdiv, implementation, jit, multiprocessors, register, tl
from .dtypes import accumulator, float_bits, upcast
from .products import linear
from .selection import GroupMax, group_max
from .selection.triton_impl import (
    GROUP,
    empty_maxima,
    packed_peaks,
    positive_keys,
    raise_peaks,
    unpacked_peaks,
)


class Encoded(NamedTuple):
    """Pre-activations and their group maxima."""

    pre: Tensor  # [B, F] float32 (float64 for float64 operands)
    maxima: GroupMax


class Tile(NamedTuple):
    BLOCK_B: int
    BLOCK_F: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# By pointers and by tensor descriptors (the bulk copies of sm_90), for 2 and for 4 byte operands.
POINTERS = {2: Tile(128, 128, 32, 8, 3), 4: Tile(128, 64, 32, 8, 2)}
DESCRIPTORS = {2: Tile(128, 128, 64, 4, 3), 4: Tile(128, 128, 32, 8, 3)}
PROGRAMS = 2  # of a multiprocessor, by descriptors: one multiplies while the other stores
# On sm_100 the tile by descriptors spills, so it is left to pointers.
DESCRIPTOR_CAPABILITIES = range(90, 100)
# The interpreter multiplies bfloat16 bit patterns as if they were integers.
CONSTANTS = {"GROUP": GROUP, "ROWS_TOGETHER": 8, "UPCAST": INTERPRETED}


@jit
def _tile(number, B, F, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, ROWS_TOGETHER: tl.constexpr):
    """Where a tile is; neighbours share a few row tiles, so that the cache serves the columns."""
    row_tiles = tl.cdiv(B, BLOCK_B)
    per_band = ROWS_TOGETHER * tl.cdiv(F, BLOCK_F)
    first = (number // per_band) * ROWS_TOGETHER
    rows = tl.minimum(row_tiles - first, ROWS_TOGETHER)
    within = number % per_band
    return first + within % rows, within // rows


@jit
def _epilogue(
    total, tile_b, tile_f,
    bias_ptr, pre_ptr, max_ptr, nonfinite_ptr, peaks_ptr,
    B, F, G,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    bias = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
    pre = total + bias[None, :]
    inside = (row[:, None] < B) & (column[None, :] < F)
    place = row[:, None].to(tl.int64) * F + column[None, :]
    tl.store(pre_ptr + place, pre, mask=inside)

    bits = tl.where(inside, float_bits(pre), 0)
    # Every program that stores, stores the same.
    bad = tl.max(((bits & 0x7F800000) == 0x7F800000).to(tl.int32), 1)
    tl.store(nonfinite_ptr + row * 0, bad > 0, mask=bad > 0)
    keys = positive_keys(bits)
    groups = tl.reshape(keys, [BLOCK_B, BLOCK_F // GROUP, GROUP])
    maximum = tl.max(groups, 2).to(tl.float32, bitcast=True)
    group = tile_f * (BLOCK_F // GROUP) + tl.arange(0, BLOCK_F // GROUP)
    inside = (row[:, None] < B) & (group[None, :] < G)
    tl.store(max_ptr + row[:, None].to(tl.int64) * G + group[None, :], maximum, mask=inside)
    if peaks_ptr is not None:
        best, place = tl.max(keys, 0, return_indices=True)
        token = tile_b * BLOCK_B + place
        raise_peaks(peaks_ptr, column, best, token)


@jit
def encode_pointers_kernel(
    x_ptr, weight_ptr, bias_ptr, pre_ptr, max_ptr, nonfinite_ptr, peaks_ptr,
    B, F, D, G,
    EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, ROWS_TOGETHER: tl.constexpr,
):  # fmt: skip
    tile_b, tile_f = _tile(tl.program_id(0), B, F, BLOCK_B, BLOCK_F, ROWS_TOGETHER)
    row = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    # Rows and columns past the end read the first one: their results are not stored.
    row = tl.where(row < B, row, 0).to(tl.int64)
    column = tl.where(column < F, column, 0).to(tl.int64)
    width = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + row[:, None] * D + width[None, :]
    weight_ptrs = weight_ptr + column[None, :] * D + width[:, None]
    total = tl.zeros([BLOCK_B, BLOCK_F], tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=width[None, :] < D - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=width[:, None] < D - start, other=0.0)
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, weight, total)
        x_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    _epilogue(
        total, tile_b, tile_f,
        bias_ptr, pre_ptr, max_ptr, nonfinite_ptr, peaks_ptr,
        B, F, G, BLOCK_B, BLOCK_F, GROUP,
    )  # fmt: skip


@jit
def encode_descriptors_kernel(
    x_descriptor, weight_descriptor, bias_ptr, pre_ptr, max_ptr, nonfinite_ptr, peaks_ptr,
    B, F, D, G,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, ROWS_TOGETHER: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Tile after tile a program: the next one's operands are on their way while this one is stored."""
    tiles = tl.cdiv(B, BLOCK_B) * tl.cdiv(F, BLOCK_F)
    for number in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        tile_b, tile_f = _tile(number, B, F, BLOCK_B, BLOCK_F, ROWS_TOGETHER)
        total = tl.zeros([BLOCK_B, BLOCK_F], tl.float32)
        for start in range(0, D, BLOCK_D):
            # [BLOCK_B, BLOCK_D], [BLOCK_F, BLOCK_D]; zeros past the end
            x = x_descriptor.load([tile_b * BLOCK_B, start])
            weight = weight_descriptor.load([tile_f * BLOCK_F, start])
            if UPCAST:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(x, weight.T, total)
        # One half of the columns after the other: both at once take more registers than there are.
        HALF: tl.constexpr = BLOCK_F // 2
        halves = tl.permute(tl.reshape(total, [BLOCK_B, 2, HALF]), (0, 2, 1))
        left, right = tl.split(halves)
        _epilogue(
            left, tile_b, 2 * tile_f,
            bias_ptr, pre_ptr, max_ptr, nonfinite_ptr, peaks_ptr,
            B, F, G, BLOCK_B, HALF, GROUP,
        )  # fmt: skip
        _epilogue(
            right, tile_b, 2 * tile_f + 1,
            bias_ptr, pre_ptr, max_ptr, nonfinite_ptr, peaks_ptr,
            B, F, G, BLOCK_B, HALF, GROUP,
        )  # fmt: skip


def _descriptors_serve(centred: Tensor, weight: Tensor) -> bool:
    """Whether the device has bulk tensor copies and the operands are laid out for them."""
    if centred.is_cuda:
        major, minor = torch.cuda.get_device_capability(centred.device)
        if 10 * major + minor not in DESCRIPTOR_CAPABILITIES:
            return False
    aligned = all(t.data_ptr() % 16 == 0 for t in (centred, weight))
    return aligned and centred.shape[1] * centred.element_size() % 16 == 0


def _encode_triton(
    centred: Tensor, weight: Tensor, bias: Tensor, with_peaks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, D), F = centred.shape, len(weight)
    centred, weight, bias = centred.contiguous(), weight.contiguous(), bias.contiguous()
    pre, maxima, nonfinite, _ = fake_encode(centred, weight, bias, False)
    nonfinite.zero_()
    packed = packed_peaks(pre, with_peaks)
    by_descriptors = _descriptors_serve(centred, weight)
    tile = (DESCRIPTORS if by_descriptors else POINTERS)[centred.element_size()]
    tiles = cdiv(B, tile.BLOCK_B) * cdiv(F, tile.BLOCK_F)
    shared = {"bias_ptr": bias, "pre_ptr": pre, "max_ptr": maxima, "nonfinite_ptr": nonfinite}
    shared |= {"peaks_ptr": packed}
    shared |= {"B": B, "F": F, "D": D, "G": maxima.shape[1]} | CONSTANTS | tile._asdict()
    if by_descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x = TensorDescriptor.from_tensor(centred, [tile.BLOCK_B, tile.BLOCK_D])
        w = TensorDescriptor.from_tensor(weight, [tile.BLOCK_F, tile.BLOCK_D])
        programs = PROGRAMS * multiprocessors(centred.device)
        encode_descriptors_kernel[(min(programs, tiles),)](
            x_descriptor=x, weight_descriptor=w, PROGRAMS=programs, **shared
        )
    else:
        even = D % tile.BLOCK_D == 0
        encode_pointers_kernel[(tiles,)](x_ptr=centred, weight_ptr=weight, EVEN_D=even, **shared)
    return pre, maxima, nonfinite, unpacked_peaks(packed, pre)


def fake_encode(
    centred: Tensor, weight: Tensor, bias: Tensor, with_peaks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pre = centred.new_empty(centred.shape[0], weight.shape[0], dtype=accumulator(centred.dtype))
    return pre, *empty_maxima(pre, with_peaks)


def _setup_context(ctx, inputs, output) -> None:
    centred, weight, bias, _ = inputs
    ctx.save_for_backward(centred, weight)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, gradient, *_):
    centred, weight = ctx.saved_tensors
    low = gradient.to(weight.dtype)
    needs_centred, needs_weight, needs_bias, _ = ctx.needs_input_grad
    return (
        low @ weight if needs_centred else None,
        low.T @ centred if needs_weight else None,
        gradient.sum(0).to(ctx.bias_dtype) if needs_bias else None,
        None,
    )


@register(fake=fake_encode, setup_context=_setup_context, backward=_backward)
def _encode(
    centred: Tensor, weight: Tensor, bias: Tensor, with_peaks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # What exact float32 would cost on matrix units that only know TF32 is left to the library.
    fusible = centred.element_size() == 2 or INTERPRETED or torch.backends.cuda.matmul.allow_tf32
    if fusible and 0 not in (*centred.shape, len(weight)) and implementation(centred) == "triton":
        return _encode_triton(centred, weight, bias, with_peaks)
    # Upcast rather than multiply in low precision: torch would round the sums to it.
    dtype = accumulator(centred.dtype)
    pre = linear(centred.to(dtype), weight.to(dtype), bias.to(dtype))
    maxima = group_max(pre, with_peaks)
    return pre, maxima.values, maxima.nonfinite, maxima.peaks


def check_shapes(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> None:
    fits = x.ndim == W_enc.ndim == 2 and x.shape[1] == W_enc.shape[0]
    fits = fits and b_enc.shape == W_enc.shape[1:]
    if not fits or (b_dec is not None and b_dec.shape != W_enc.shape[:1]):
        shapes = [tuple(t.shape) for t in (x, W_enc, b_enc, b_dec) if t is not None]
        raise ValueError(
            "encoder: expected x [B, D], W_enc [D, F], b_enc [F] and b_dec [D], got "
            f"{', '.join(map(str, shapes))}; flatten leading dimensions of x first"
        )


def centre(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """``x - b_dec`` in float32 (float64 for float64); ``x`` itself without ``b_dec``."""
    return x if b_dec is None else upcast(x) - b_dec.to(accumulator(x.dtype))


def encode_with_group_max(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    with_peaks: bool = False,
) -> Encoded:
    """``pre = (x - b_dec) @ W_enc + b_enc`` and the group maxima of ``pre``, for ``batch_topk``.

    ``x [B, D]``, ``W_enc [D, F]`` (best as the transposed view of a contiguous ``[F, D]``: any other
    layout is copied), ``b_enc [F]``, ``b_dec [D]`` or None where ``x`` is centred already. The dtype
    of ``W_enc`` is the operands'; the difference ``x - b_dec`` is taken in float32 before it is rounded
    to it. ``with_peaks`` the maxima hold the latents' peaks, which a latent quota takes. ``pre`` is
    differentiable in all four tensors; the maxima are not.

    Deterministic. Raises ValueError for shapes that do not fit.
    """
    check_shapes(x, W_enc, b_enc, b_dec)
    pre, *maxima = _encode(centre(x, b_dec).to(W_enc.dtype), W_enc.T, b_enc, with_peaks)
    return Encoded(pre, GroupMax(*maxima))
