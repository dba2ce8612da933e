"""Aux-k: the dead latents alone explain what the reconstruction left over.

With ``r = x - x̂ [B, D]``, not differentiated, and ``S`` the ``n`` dead latents (columns of ``Z``):

    Z     = (x - b_dec) @ W_enc[S]ᵀ + b_enc[S]              [B, n], of each row the k_aux largest
    A     = Z where selected and positive, else 0
    E     = A @ W_dec[S] - r
    aux   = s · Σ E² / B,   s = min(n / k_aux, 1) / denominator
    dE    = s · 2 E / B;    dA = (dE @ W_dec[S]ᵀ) where A > 0
    dW_dec[S] = Aᵀ dE,   dW_enc[S] = dAᵀ (x - b_dec),   db_enc[S] = Σ_b dA
    db_dec    = 0: of what latents share, b_dec is taken as given

The denominator is the mean over tokens of ``‖r - mean_B r‖²`` (``residual_variance``), that of ``x``
(``total_variance``), or 1 (``none``). Where it vanishes, or nothing is dead, all is zero.
Ties of ``Z`` go to the lower latent. Source: Gao et al. 2024 (arXiv:2406.04093), A.2.

Dense matrix products over the dead latents, compacted: a token selects ``k_aux`` (hundreds) of few
columns, a density at which gathering is an order of magnitude slower. On CUDA the number of columns is
a capacity that the caller chooses beforehand, so no shape depends on data and nothing waits for the
device; on a CPU a capacity equal to the number of dead latents costs nothing to know.

Deterministic, given deterministic matrix products. Five products of ``2·B·n·D`` FLOP; bytes besides:
``4·n·D`` weights and gradients, about ``20·B·n`` for ``Z``, ``A`` and ``dA``.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .aot import Case
from .aux_k_sparse import loss_and_error_gradient, sparse_gradients
from .dispatch import implementation, jit, register, tl
from .fused_update import ExtraGradient

Normalization = Literal["residual_variance", "total_variance", "none"]

BLOCK_COLUMNS = 1024
WARPS = 4
# On a CPU, so many times k_aux dead latents make A sparse enough to gather.
SPARSE_FROM = 4


class AuxK(NamedTuple):
    loss: Tensor  # [] float32 (float64 for float64), before any coefficient
    gradient: ExtraGradient  # of coefficient · loss


# --- the k_aux largest of each row --------------------------------------------------------------


@jit
def _keep_largest_kernel(z_ptr, columns, k, BLOCK: tl.constexpr):
    """One row a program, in place: all but the ``k`` largest positive entries become zero.

    The bits of positive floats are ordered as integers, so the k-th largest is found two bits at a
    time, from the top: three candidates a pass, 16 passes over a row that stays in the cache.
    """
    z_ptr += tl.program_id(0).to(tl.int64) * columns
    kth = 0
    for i in range(0, 16):
        shift = 30 - 2 * i
        kth *= 4
        reach1 = tl.zeros((BLOCK,), tl.int32)
        reach2 = tl.zeros((BLOCK,), tl.int32)
        reach3 = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + column, mask=column < columns, other=0.0)
            bits = tl.where(z > 0, z.to(tl.int32, bitcast=True), 0) >> shift
            reach1 += (bits > kth).to(tl.int32)
            reach2 += (bits > kth + 1).to(tl.int32)
            reach3 += (bits > kth + 2).to(tl.int32)
        kth += (tl.sum(reach1, 0) >= k).to(tl.int32)
        kth += (tl.sum(reach2, 0) >= k).to(tl.int32)
        kth += (tl.sum(reach3, 0) >= k).to(tl.int32)
    above = 0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < columns, other=0.0)
        bits = tl.where(z > 0, z.to(tl.int32, bitcast=True), 0)
        above += tl.sum((bits > kth).to(tl.int32), 0)
    ties = k - above
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < columns, other=0.0)
        bits = tl.where(z > 0, z.to(tl.int32, bitcast=True), 0)
        equal = ((bits == kth) & (bits > 0)).to(tl.int32)
        keep = (bits > kth) | ((equal > 0) & (tl.cumsum(equal, 0) <= ties))
        tl.store(z_ptr + column, tl.where(keep, z, 0.0), mask=column < columns)
        ties -= tl.sum(equal, 0)


def _keep_largest_(z: Tensor, k: int) -> Tensor:
    """``z [B, n]`` with all but each row's ``k`` largest positive entries set to zero, in place."""
    rows, columns = z.shape
    if k == 0:
        return z.zero_()
    if k >= columns or rows == 0:
        return z.nan_to_num_(0.0, float("inf"), 0.0).clamp_(min=0)
    if implementation(z) == "triton":
        _keep_largest_kernel[(rows,)](z, columns, k, BLOCK=BLOCK_COLUMNS, num_warps=WARPS)
        return z
    positive = torch.where(z > 0, z, 0)
    kth = positive.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = positive > kth, positive == kth
    quota = k - above.sum(1, keepdim=True)
    return z.copy_(positive * (above | (equal & (equal.cumsum(1) <= quota))))


# --- the computation ----------------------------------------------------------------------------


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated in float32 (float64 for float64) and returned in it."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _chosen_dead(tokens_since_active: Tensor, dead_after: int, capacity: int) -> Tensor:
    """The dead latents ``[F]`` bool, of more than ``capacity`` those that have been dead longest."""
    dead = tokens_since_active >= dead_after
    if capacity >= len(dead):
        return dead
    longest = tokens_since_active.sort(descending=True, stable=True).indices[:capacity]
    return dead & torch.zeros_like(dead).index_fill_(0, longest, True)


def _compact(dead: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """``latents [capacity]`` ascending (0 where unused), ``slots [F]`` (-1: none), ``n_dead []``.

    ``dead [F]`` holds at most ``capacity`` latents.
    """
    count = dead.cumsum(0)
    slots = torch.where(dead, count - 1, -1).to(torch.int32)
    # The latents that have no slot all write to one place beyond the others, which is cut off.
    place = torch.where(dead, count - 1, capacity)
    latents = torch.zeros(capacity + 1, dtype=torch.int64, device=dead.device)
    latents.scatter_(0, place, torch.arange(len(dead), device=dead.device))
    return latents[:capacity], slots, dead.sum()


# --- gradients for the fused update -------------------------------------------------------------


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fake_gradients(
    x, residual, W_enc, b_enc, W_dec, b_dec, tokens_since_active, dead_after, capacity, *_
):
    new = lambda *shape: x.new_empty(shape, dtype=_accumulator(x))
    width = W_dec.shape[1]
    slots = tokens_since_active.new_empty(tokens_since_active.shape, dtype=torch.int32)
    return new(), new(capacity, width), new(capacity), new(capacity, width), slots


@register(fake=_fake_gradients)
def _aux_k_gradients(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    tokens_since_active: Tensor,
    dead_after: int,
    capacity: int,
    k_aux: int,
    normalization: str,
    coefficient: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dead = _chosen_dead(tokens_since_active, dead_after, capacity)
    if not x.is_cuda and implementation(x) == "torch" and 0 < SPARSE_FROM * k_aux < int(dead.sum()):
        return sparse_gradients(
            x,
            residual,
            W_enc,
            b_enc,
            W_dec,
            b_dec,
            dead,
            capacity,
            k_aux,
            normalization,
            coefficient,
        )
    # A CPU knows how many there are without waiting, and multiplies by no more than those.
    rows = capacity if implementation(x) == "triton" else int(dead.sum())
    latents, slots, n_dead = _compact(dead, rows)
    used = torch.arange(rows, device=x.device) < n_dead
    work = _accumulator(x)
    centred = (x.to(work) - b_dec).to(W_enc.dtype)
    w_enc, w_dec = W_enc[latents], W_dec[latents]

    A = _mm(centred, w_enc.T) + b_enc[latents].to(work)
    A = _keep_largest_(A.masked_fill_(~used, 0.0), k_aux)
    low = A.to(w_dec.dtype)
    E = _mm(low, w_dec).sub_(residual)
    loss, dE = loss_and_error_gradient(E, residual, x, n_dead, k_aux, normalization)
    # The coefficient first: with it the gradient is as large as the loss's own, and float16 holds it.
    dE = dE.mul_(coefficient).to(w_dec.dtype)
    dA = _mm(dE, w_dec.T).mul_(A > 0)
    fill = lambda gradient: F.pad(gradient, (0, 0) * (gradient.dim() - 1) + (0, capacity - rows))
    dW_enc, dW_dec = _mm(dA.to(centred.dtype).T, centred), _mm(low.T, dE)
    return loss, fill(dW_enc), fill(dA.sum(0)), fill(dW_dec), slots


def aux_k_gradients(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    tokens_since_active: Tensor,
    *,
    dead_after: int,
    capacity: int,
    k_aux: int,
    normalization: Normalization = "residual_variance",
    coefficient: float = 1.0,
) -> AuxK:
    """Aux-k's loss and the gradients of ``coefficient · loss``, as :func:`fused_update_` takes them.

    ``x``, ``residual [B, D]``; ``W_enc``, ``W_dec [F, D]`` (both one latent a row, both of one dtype:
    what the forward pass multiplied by), ``b_enc [F]``, ``b_dec [D]``; ``tokens_since_active [F]``
    int64: a latent is dead from ``dead_after`` on. ``capacity`` bounds how many dead latents take
    part, and is the number of rows of the buffers; beyond it the longest dead take part (the lower
    latent of equals), as if the others were alive. Nothing waits for the device.

    Sums are float32 (float64 for float64). Raises ValueError on an unknown normalization, on negative
    sizes and on shapes that do not fit. Not differentiable.
    """
    _check_options(k_aux, normalization)
    if capacity < 0:
        raise ValueError(f"capacity: expected 0 or more, got {capacity}")
    if W_enc.shape != W_dec.shape or W_enc.dtype != W_dec.dtype:
        raise ValueError(
            "W_enc and W_dec: expected two [F, D] tensors of one dtype, got "
            f"{list(W_enc.shape)} {W_enc.dtype} and {list(W_dec.shape)} {W_dec.dtype}"
        )
    if x.shape != residual.shape or x.shape[1:] != W_dec.shape[1:]:
        raise ValueError(
            f"x and residual: expected [B, {W_dec.shape[1]}], got "
            f"{list(x.shape)} and {list(residual.shape)}"
        )
    if tokens_since_active.shape != W_dec.shape[:1]:
        raise ValueError(
            f"tokens_since_active: expected [{len(W_dec)}], got {list(tokens_since_active.shape)}"
        )
    loss, *gradient = _aux_k_gradients(
        x,
        residual,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        tokens_since_active,
        dead_after,
        min(capacity, len(W_dec)),
        k_aux,
        normalization,
        coefficient,
    )
    return AuxK(loss, ExtraGradient(*gradient))


def _check_options(k_aux: int, normalization: str) -> None:
    if normalization not in get_args(Normalization):
        raise ValueError(
            f"normalization: expected one of {get_args(Normalization)}, got {normalization!r}"
        )
    if k_aux < 0:
        raise ValueError(f"k_aux: expected 0 or more, got {k_aux}")


# --- the differentiable loss --------------------------------------------------------------------


class _Parts(NamedTuple):
    latents: Tensor | slice  # which columns of pre take part
    w_dec: Tensor  # [n, D]
    A: Tensor  # [B, n]
    E: Tensor  # [B, D]


def _forward(pre: Tensor, residual: Tensor, W_dec: Tensor, dead: Tensor, k_aux: int) -> _Parts:
    # Where the number of the dead is on a device, all latents take part, the living as zeros.
    static = implementation(pre) == "triton" or dead.is_cuda
    latents = slice(None) if static else dead.nonzero().flatten()
    A = pre.masked_fill(~dead, 0.0) if static else pre[:, latents]
    A, w_dec = _keep_largest_(A.to(_accumulator(pre)), k_aux), W_dec[latents]
    return _Parts(latents, w_dec, A, _mm(A.to(w_dec.dtype), w_dec).sub_(residual))


def _save(ctx, inputs, output):
    pre, residual, W_dec, dead, x, ctx.k_aux, ctx.normalization = inputs
    ctx.save_for_backward(pre, residual, W_dec, dead, x)


def _backward(ctx, dloss):
    pre, residual, W_dec, dead, x = ctx.saved_tensors
    dpre, dW_dec = _aux_k_backward(
        dloss, pre, residual, W_dec, dead, x, ctx.k_aux, ctx.normalization
    )
    return dpre, None, dW_dec, None, None, None, None


@register(
    fake=lambda pre, *_: pre.new_empty((), dtype=_accumulator(pre)),
    setup_context=_save,
    backward=_backward,
)
def _aux_k(
    pre: Tensor,
    residual: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    x: Tensor | None,
    k_aux: int,
    normalization: str,
) -> Tensor:
    E = _forward(pre, residual, W_dec, dead, k_aux).E
    return loss_and_error_gradient(E, residual, x, dead.sum(), k_aux, normalization)[0]


@register(
    fake=lambda dloss, pre, residual, W_dec, *_: (
        torch.empty_like(pre, memory_format=torch.contiguous_format),
        torch.empty_like(W_dec, memory_format=torch.contiguous_format),
    )
)
def _aux_k_backward(
    dloss: Tensor,
    pre: Tensor,
    residual: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    x: Tensor | None,
    k_aux: int,
    normalization: str,
) -> tuple[Tensor, Tensor]:
    latents, w_dec, A, E = _forward(pre, residual, W_dec, dead, k_aux)
    dE = loss_and_error_gradient(E, residual, x, dead.sum(), k_aux, normalization)[1].mul_(dloss)
    dE = dE.to(w_dec.dtype)
    dpre = torch.zeros_like(pre, memory_format=torch.contiguous_format)
    dW_dec = torch.zeros_like(W_dec, memory_format=torch.contiguous_format)
    dpre[:, latents] = _mm(dE, w_dec.T).mul_(A > 0).to(pre.dtype)
    dW_dec[latents] = _mm(A.to(w_dec.dtype).T, dE).to(W_dec.dtype)
    return dpre, dW_dec


def aux_k(
    pre: Tensor,
    residual: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    k_aux: int,
    normalization: Normalization = "residual_variance",
    x: Tensor | None = None,
) -> Tensor:
    """Aux-k's loss ``[]`` as a differentiable operation, for training by autograd.

    ``pre [B, F]``, ``residual [B, D]`` (never differentiated), ``W_dec [F, D]``, ``dead [F]`` bool, and
    ``x [B, D]`` for ``total_variance``. Differentiable, once, in ``pre`` (hence in the encoder) and in
    ``W_dec``; the backward computes the forward again instead of keeping it. On a CPU the cost is that
    of the dead latents; on CUDA that of all of them, since their number is on the device.

    float32 (float64 for float64). Raises ValueError on an unknown normalization, or ``total_variance``
    without ``x``, and on shapes that do not fit.
    """
    _check_options(k_aux, normalization)
    if normalization == "total_variance" and x is None:
        raise ValueError("normalization 'total_variance' needs x, got None")
    expected = (len(residual), len(W_dec)), (len(pre), W_dec.shape[1]), (len(W_dec),)
    if (pre.shape, residual.shape, dead.shape) != expected:
        raise ValueError(
            "pre, residual and dead: expected [B, F], [B, D] and [F] of W_dec "
            f"{list(W_dec.shape)}, got {list(pre.shape)}, {list(residual.shape)}, {list(dead.shape)}"
        )
    return _aux_k(pre, residual.detach(), W_dec, dead, x, k_aux, normalization)


# --- ahead of time ------------------------------------------------------------------------------


def aot_cases() -> list[Case]:
    """The row selection; it knows no width."""
    signature = {"z_ptr": "*fp32", "columns": "i32", "k": "i32"}
    return [
        Case(
            "aux_k keep largest",
            _keep_largest_kernel,
            signature,
            {"BLOCK": BLOCK_COLUMNS},
            ("columns",),
            num_warps=WARPS,
            representative=True,
        )
    ]
