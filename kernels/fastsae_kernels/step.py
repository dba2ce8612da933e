"""What stands between the sparse operations of a training step: one launch each, where torch takes many.

    scaled  = x · c,   centred = scaled - b_dec            c: a constant, or 1
    error   = mean of the tokens' squared errors,   objective = log(error) + w · aux   or   error + w · aux
    dY_l    = Σ_{m >= l} residual_m · d objective / d error
    threshold += rate / (1 - (1 - rate)^n) · (smallest - threshold)     where anything was selected
    since[f] = 0 where latent f was selected, else since[f] + B

Shapes: ``x [B, D]``, ``residual [L, B, D]``, ``since [F]``. Arithmetic is float32 (float64 on torch for float64), rounded
once at the store. No atomics, fixed order of sums: bitwise reproducible. Nothing waits for the device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .dispatch import cdiv, implementation, jit, register, tl
from .dtypes import rounded
from .reference import Objective
from .sparse_decoder import column_block, nested_gradient

BLOCK_ERRORS = 4096
ERROR_WARPS = 8
BLOCK_LATENTS = 256


@jit
def centre_kernel(
    x_ptr, scale_ptr, b_dec_ptr, scaled_ptr, centred_ptr, operand_ptr,
    D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token and one tile of columns a program; what need not be written has no pointer."""
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    place = tl.program_id(0).to(tl.int64) * D + columns
    scaled = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scaled *= tl.load(scale_ptr)
    centred = scaled - tl.load(b_dec_ptr + columns, mask=inside, other=0.0)
    tl.store(centred_ptr + place, rounded(centred, centred_ptr.dtype.element_ty), mask=inside)
    if scaled_ptr is not None:
        tl.store(scaled_ptr + place, scaled, mask=inside)
    if operand_ptr is not None:
        tl.store(operand_ptr + place, rounded(scaled, operand_ptr.dtype.element_ty), mask=inside)


@jit
def objective_kernel(
    squared_error_ptr, aux_ptr, out_ptr,
    length, coefficient,
    LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the tokens are few, and what follows waits for all of them."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(squared_error_ptr + place, mask=place < length, other=0.0)
    error = tl.sum(total, 0) / length
    value = error
    weight = 1.0
    if LOG:
        positive = tl.where(error > 0, error, 1.0)
        value = tl.log(positive)
        weight = 1.0 / positive
    tl.store(out_ptr, error)
    tl.store(out_ptr + 1, value + coefficient * tl.load(aux_ptr))
    tl.store(out_ptr + 2, weight)


@jit
def output_gradient_kernel(
    residual_ptr, weight_ptr, out_ptr,
    B, D,
    LEVELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token and one tile of columns a program, from the last level to the first."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    weight = tl.load(weight_ptr)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for after in range(LEVELS):
        place = (tl.cast(LEVELS - 1 - after, tl.int64) * B + token) * D + columns
        total += tl.load(residual_ptr + place, mask=inside, other=0.0)
        tl.store(out_ptr + place, rounded(total * weight, out_ptr.dtype.element_ty), mask=inside)


@jit
def track_selection_kernel(
    threshold_ptr, updates_ptr, since_ptr, smallest_ptr, offsets_ptr, counts_ptr,
    F, tokens,
    RATE: tl.constexpr, LOG_KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` latents a program; the first one sees to the threshold too."""
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = latent < F
    begin = tl.load(offsets_ptr + latent, mask=inside, other=0)
    count = tl.load(offsets_ptr + latent + 1, mask=inside, other=0) - begin
    tl.store(counts_ptr + latent, count, mask=inside)
    since = tl.load(since_ptr + latent, mask=inside, other=0) + tokens
    tl.store(since_ptr + latent, tl.where(count > 0, 0, since), mask=inside)
    if tl.program_id(0) == 0:
        smallest = tl.load(smallest_ptr).to(tl.float32)
        if tl.abs(smallest) < float("inf"):
            updates = tl.load(updates_ptr) + 1
            threshold = tl.load(threshold_ptr)
            weight = (RATE / (1.0 - tl.exp(updates.to(tl.float64) * LOG_KEPT))).to(tl.float32)
            tl.store(threshold_ptr, threshold + weight * (smallest - threshold))
            tl.store(updates_ptr, updates)


def _fake_centred(
    x: Tensor, scale: Tensor | None, b_dec: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``[0]`` in the place of what is there already: an operation cannot return its inputs."""
    work = b_dec.dtype
    there = {work} if scale is not None else {work, x.dtype}
    scaled, operand = b_dec.new_empty(0), b_dec.new_empty(0)
    if scale is not None or x.dtype != work:
        scaled = x.new_empty(x.shape, dtype=work)
    if dtype not in there:
        operand = x.new_empty(x.shape, dtype=dtype)
    return scaled, x.new_empty(x.shape, dtype=dtype), operand


@register(fake=_fake_centred)
def _centred_input(
    x: Tensor, scale: Tensor | None, b_dec: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    scaled, centred, operand = _fake_centred(x, scale, b_dec, dtype)
    if implementation(b_dec) == "torch":
        whole = x.to(b_dec.dtype) if scale is None else x.to(b_dec.dtype) * scale
        scaled = whole if scaled.ndim == 2 else scaled
        operand = whole.to(dtype) if operand.ndim == 2 else operand
        return scaled, (whole - b_dec).to(dtype), operand
    if x.numel():
        block = column_block(x.shape[1])
        centre_kernel[(len(x), cdiv(x.shape[1], block))](
            x_ptr=x, scale_ptr=scale, b_dec_ptr=b_dec,
            scaled_ptr=scaled if scaled.ndim == 2 else None, centred_ptr=centred,
            operand_ptr=operand if operand.ndim == 2 else None,
            D=x.shape[1],
            BLOCK_D=block, num_warps=max(1, block // 128),
            enable_fp_fusion=False,  # the bits of a product, then a difference, as elsewhere
        )  # fmt: skip
    return scaled, centred, operand


class CentredInput(NamedTuple):
    scaled: Tensor  # [B, D], the dtype of b_dec
    centred: Tensor  # [B, D], scaled - b_dec, rounded to operands
    operand: Tensor  # [B, D], scaled, rounded to operands


def centred_input(
    x: Tensor, scale: Tensor | None, b_dec: Tensor, dtype: torch.dtype
) -> CentredInput:
    """``x [B, D]`` of any float dtype times ``scale []`` (1 if absent), less ``b_dec [D]``, for products in ``dtype``.

    The arithmetic is in ``b_dec``'s dtype, which is ``scale``'s too. Not differentiable. Raises ValueError for shapes that
    do not fit.
    """
    if x.ndim != 2 or x.shape[1:] != b_dec.shape:
        raise ValueError(
            f"centred_input: expected x [B, {len(b_dec)}], as wide as b_dec, got {tuple(x.shape)}"
        )
    x = x.contiguous()
    scaled, centred, operand = _centred_input(x, scale, b_dec, dtype)
    scaled = scaled if scaled.ndim == 2 else x
    if operand.ndim != 2:
        operand = scaled if dtype == scaled.dtype else x
    return CentredInput(scaled, centred, operand)


@register(fake=lambda squared_error, aux, coefficient, log: squared_error.new_empty(3))
def _step_objective(squared_error: Tensor, aux: Tensor, coefficient: float, log: bool) -> Tensor:
    if implementation(squared_error) == "torch":
        error = squared_error.mean()
        value = reference.objective(error, aux, coefficient, "log" if log else "plain")
        weight = reference.error_weight(error) if log else torch.ones_like(error)
        return torch.stack([error, value, weight])
    out = squared_error.new_empty(3)
    objective_kernel[(1,)](
        squared_error_ptr=squared_error.contiguous(), aux_ptr=aux, out_ptr=out,
        length=squared_error.numel(), coefficient=coefficient,
        LOG=log, BLOCK=BLOCK_ERRORS, num_warps=ERROR_WARPS,
    )  # fmt: skip
    return out


class StepObjective(NamedTuple):
    error: Tensor  # []
    value: Tensor  # [], what is minimised
    weight: Tensor  # [], its derivative by the error


def step_objective(
    squared_error: Tensor, aux: Tensor, coefficient: float, kind: Objective
) -> StepObjective:
    """``reference.objective`` of the mean of ``squared_error`` (any shape, not empty; float32 or float64) and of
    ``aux []``, which weighs ``coefficient``. Not differentiable."""
    return StepObjective(*_step_objective(squared_error, aux, coefficient, kind == "log").unbind())


@register(fake=lambda residual, weight, dtype: torch.empty_like(residual, dtype=dtype))
def _output_gradient(residual: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if implementation(residual) == "torch":
        return (nested_gradient(residual) * weight).to(dtype)
    out = torch.empty_like(residual, dtype=dtype)
    levels, tokens, width = residual.shape
    if residual.numel():
        block = column_block(width)
        output_gradient_kernel[(tokens, cdiv(width, block))](
            residual_ptr=residual, weight_ptr=weight, out_ptr=out,
            B=tokens, D=width,
            LEVELS=levels, BLOCK_D=block, num_warps=max(1, block // 128),
        )  # fmt: skip
    return out


def output_gradient(residual: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`nested_gradient` of ``residual [L, B, D]`` (float32 or float64) times ``weight []``, rounded to
    ``dtype``. Not differentiable."""
    return _output_gradient(residual.contiguous(), weight, dtype)


def average_threshold_(threshold: Tensor, updates: Tensor, smallest: Tensor, rate: float) -> None:
    """Take a selection's threshold ``smallest []`` into the bias-corrected average ``threshold []`` of ``updates []``
    (int64) before it; +inf changes nothing. In place, on torch."""
    # Written without a branch on the data, so that nothing waits.
    smallest = smallest.to(threshold.dtype)
    selected = smallest.isfinite()
    after = updates + selected
    # The corrected average is the state: its newest value weighs rate / (1 - (1 - rate)^n).
    weight = rate / (1 - (1 - rate) ** after.clamp_min(1))
    moved = threshold + weight.to(threshold.dtype) * (smallest - threshold)
    threshold.copy_(torch.where(selected, moved, threshold))
    updates.copy_(after)


@register(
    fake=lambda threshold, updates, since, *_: since.new_empty(since.shape, dtype=torch.int32),
    mutates_args=("threshold", "updates", "since"),
)
def _track_selection_(
    threshold: Tensor, updates: Tensor, since: Tensor, smallest: Tensor, offsets: Tensor,
    tokens: int, rate: float,
) -> Tensor:  # fmt: skip
    if implementation(threshold) == "torch":
        average_threshold_(threshold, updates, smallest, rate)
        counts = offsets.diff()
        since += tokens
        since.masked_fill_(counts > 0, 0)
        return counts
    counts = offsets.new_empty(len(since))
    track_selection_kernel[(max(1, cdiv(len(since), BLOCK_LATENTS)),)](
        threshold_ptr=threshold, updates_ptr=updates, since_ptr=since, smallest_ptr=smallest,
        offsets_ptr=offsets, counts_ptr=counts,
        F=len(since), tokens=tokens,
        RATE=rate, LOG_KEPT=math.log(max(1 - rate, 1e-300)), BLOCK=BLOCK_LATENTS,
        num_warps=1,  # several would all read the threshold, and one of them write it
    )  # fmt: skip
    return counts


def track_selection_(
    threshold: Tensor,
    updates: Tensor,
    since: Tensor,
    smallest: Tensor,
    offsets: Tensor,
    tokens: int,
    rate: float,
) -> Tensor:
    """Note what a batch of ``tokens`` selected; returns how often each latent was, ``[F]`` int32.

    ``smallest []`` is the selection's threshold, taken into an average as by :func:`average_threshold_`; ``offsets
    [F + 1]`` (int32) are those of its CSC form; ``since [F]`` (int64) counts each latent's tokens since it was last
    selected. The first three are changed in place.
    """
    return _track_selection_(threshold, updates, since, smallest, offsets, tokens, rate)
