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
columns, and gathering them would be slower. On CUDA the number of columns is a bound that the caller
chooses, so nothing waits for the device; on a CPU the number of dead latents costs nothing to know.

Deterministic, given deterministic matrix products. Five products of ``2·B·n·D`` FLOP; bytes besides:
``4·n·D`` weights and gradients, about ``20·B·n`` for ``Z``, ``A`` and ``dA``.

On a CPU where ``k_aux`` is a small part of ``n``, gathering at the selected entries beats the dense
product, if the tables it gathers from fit the cache: ``E = A @ W_dec[S]`` goes by narrow strips of
columns, the rest by blocks of latents. ``2·B·n·D`` FLOP for ``Z``, and four times ``2·B·k_aux·D``.
"""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .dispatch import implementation, jit, register, tl
from .dtypes import accumulator
from .products import linear, row_sums, sampled_products
from .reference import AuxNormalization
from .selection.torch_impl import keep_largest
from .transpose import csr_to_csc_torch
from .update.state import AuxGradients
from .update.torch_impl import BLOCK_LATENTS

BLOCK_COLUMNS = 1024
WARPS = 4
# On a CPU, so many times k_aux dead latents make A sparse enough to gather.
SPARSE_FROM = 4
# There: columns of a strip of W_dec, and tokens whose entries are selected together.
STRIP = 64
TOKENS_PER_SELECTION = 128


class AuxK(NamedTuple):
    loss: Tensor  # [] float32 (float64 for float64), before any coefficient
    gradients: AuxGradients  # of coefficient · loss


@jit
def keep_largest_kernel(
    z_ptr,
    columns, k,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
        keep_largest_kernel[(rows,)](
            z_ptr=z, columns=columns, k=k, BLOCK=BLOCK_COLUMNS, num_warps=WARPS
        )
        return z
    positive = torch.where(z > 0, z, 0)  # NaN is not
    return z.copy_(torch.where(keep_largest(positive, k, positive=True), positive, 0))


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated in float32 (float64 for float64) and returned in it."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def loss_and_error_gradient(
    E: Tensor, residual: Tensor, target: Tensor, n_dead: Tensor, k_aux: int, normalization: str
) -> tuple[Tensor, Tensor]:
    """``(aux [], dE [B, D])`` from ``E = A @ W_dec[S] - r``, which becomes ``dE`` in place."""
    scale = (n_dead.to(E.dtype) / max(k_aux, 1)).clamp(max=1) / max(len(E), 1)
    if normalization != "none":
        divisor = (residual if normalization == "residual_variance" else target).to(E.dtype)
        scale = scale / (divisor - divisor.mean(0)).square().sum(1).mean()
    some = n_dead > 0
    loss = torch.where(some, torch.nan_to_num(scale * E.square().sum(), 0.0, 0.0, 0.0), 0.0)
    dE = E.mul_(2 * scale).nan_to_num_(0.0, 0.0, 0.0)
    return loss, dE.masked_fill_(~some, 0.0)


def chosen_dead(tokens_since_active: Tensor, dead_after: int, max_dead: int) -> Tensor:
    """The dead latents ``[F]`` bool, of more than ``max_dead`` those that have been dead longest."""
    dead = tokens_since_active >= dead_after
    if max_dead >= len(dead):
        return dead
    longest = tokens_since_active.sort(descending=True, stable=True).indices[:max_dead]
    return dead & torch.zeros_like(dead).index_fill_(0, longest, True)


def _compact(dead: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """``latents [rows]`` ascending (0 where unused), ``slots [F]`` (-1: none), ``n_dead []``.

    ``dead [F]`` holds at most ``rows`` latents.
    """
    count = dead.cumsum(0)
    slots = torch.where(dead, count - 1, -1).to(torch.int32)
    # The latents that have no slot all write to one place beyond the others, which is cut off.
    place = torch.where(dead, count - 1, rows)
    latents = torch.zeros(rows + 1, dtype=torch.int64, device=dead.device)
    latents.scatter_(0, place, torch.arange(len(dead), device=dead.device))
    return latents[:rows], slots, dead.sum()


class ActiveDead(NamedTuple):
    """What ``n`` dead latents of a dictionary or of a part of it give on a batch, and what they gave it from."""

    A: Tensor  # [B, n], in the accumulator's dtype
    centred: Tensor  # [B, D], what the encoder multiplied
    w_dec: Tensor  # [n, D]
    slots: Tensor  # [F] int32: the column of each latent, -1 for none
    n_dead: Tensor  # [], so many of the columns are in use

    def reconstruction(self) -> Tensor:
        """``A @ w_dec [B, D]``, in the accumulator's dtype."""
        return _mm(self.A.to(self.w_dec.dtype), self.w_dec)

    def gradients(self, dE: Tensor) -> AuxGradients:
        """From that of the reconstruction, ``dE [B, D]`` in the operands' dtype."""
        dA = _mm(dE, self.w_dec.T).mul_(self.A > 0)
        dW_enc = _mm(dA.to(dE.dtype).T, self.centred)
        dW_dec = _mm(self.A.to(dE.dtype).T, dE)
        return AuxGradients(dW_enc, dA.sum(0), dW_dec, self.slots)


def active_dead(
    dead: Tensor, n: int, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
    k_aux: int,
) -> ActiveDead:  # fmt: skip
    """Of the latents ``dead [F]``, at most ``n``, each token's ``k_aux`` largest positive pre-activations."""
    latents, slots, n_dead = _compact(dead, n)
    used = torch.arange(n, device=x.device) < n_dead
    work = accumulator(x.dtype)
    centred = (x.to(work) - b_dec).to(W_enc.dtype)
    A = _mm(centred, W_enc[latents].T) + b_enc[latents].to(work)
    A = _keep_largest_(A.masked_fill_(~used, 0.0), k_aux)
    return ActiveDead(A, centred, W_dec[latents], slots, n_dead)


def _fake_gradients(x, residual, W_enc, b_enc, W_dec, b_dec, since, dead_after, max_dead, *_):
    new = lambda *shape: x.new_empty(shape, dtype=accumulator(x.dtype))
    slots = torch.empty_like(since, dtype=torch.int32)
    rows = (new(max_dead, weights.shape[1]) for weights in (W_enc, W_dec))
    return new(), next(rows), new(max_dead), next(rows), slots


@register(fake=_fake_gradients)
def _aux_k_gradients(
    x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
    tokens_since_active: Tensor, dead_after: int, max_dead: int,
    k_aux: int, normalization: str, coefficient: float, target: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dead = chosen_dead(tokens_since_active, dead_after, max_dead)
    # A CPU knows how many there are without waiting, and multiplies by no more than those.
    n = max_dead if implementation(x) == "triton" else int(dead.sum())
    gather = not x.is_cuda and implementation(x) == "torch" and 0 < SPARSE_FROM * k_aux < n
    run = _gathered_gradients if gather else _dense_gradients
    loss, slots, *gradients = run(
        dead, n, x, residual, W_enc, b_enc, W_dec, b_dec, k_aux, normalization, coefficient,
        x if target is None else target,
    )  # fmt: skip
    if n < max_dead:
        spare = (0, max_dead - n)
        fill = lambda t: torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1) + spare)
        gradients = [fill(gradient) for gradient in gradients]
    dW_enc, db_enc, dW_dec = gradients
    return loss, dW_enc, db_enc, dW_dec, slots


def _dense_gradients(
    dead: Tensor, n: int, x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor,
    W_dec: Tensor, b_dec: Tensor, k_aux: int, normalization: str, coefficient: float, target: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``loss, slots, dW_enc, db_enc, dW_dec`` by dense products over ``n`` latents, the dead first."""
    active = active_dead(dead, n, x, W_enc, b_enc, W_dec, b_dec, k_aux)
    E = active.reconstruction().sub_(residual)
    loss, dE = loss_and_error_gradient(E, residual, target, active.n_dead, k_aux, normalization)
    # The coefficient first: with it the gradient is as large as the loss's own, and float16 holds it.
    *gradients, slots = active.gradients(dE.mul_(coefficient).to(W_dec.dtype))
    return loss, slots, *gradients


def _gathered_gradients(
    dead: Tensor, n: int, x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor,
    W_dec: Tensor, b_dec: Tensor, k_aux: int, normalization: str, coefficient: float, target: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What :func:`_dense_gradients` returns, from products at the selected entries of ``n`` latents."""
    work = accumulator(x.dtype)
    # Operands are rounded to what the forward pass multiplies by, products are in full precision.
    rounded = lambda t: t.to(W_dec.dtype).to(work)
    latents, slots, n_dead = _compact(dead, n)
    width = W_dec.shape[1]
    centred = rounded(x.to(work) - b_dec)

    Z = torch.empty(len(x), n, dtype=work, device=x.device)
    for first in range(0, n, 4 * BLOCK_LATENTS):
        at = slice(first, min(first + 4 * BLOCK_LATENTS, n))
        Z[:, at] = linear(centred, W_enc[latents[at]].to(work), b_enc[latents[at]].to(work))
    values, columns, offsets = _select(Z, k_aux)
    del Z
    values = rounded(values)

    E = torch.empty(residual.shape, dtype=work, device=x.device)
    for first in range(0, width, STRIP):
        strip = slice(first, min(first + STRIP, width))
        table = W_dec[:, strip].index_select(0, latents).to(work)
        E[:, strip] = row_sums(values, columns, offsets, table)
    E -= residual
    loss, dE = loss_and_error_gradient(E, residual, target, n_dead, k_aux, normalization)
    dE = rounded(dE.mul_(coefficient))

    rows, positions, starts = csr_to_csc_torch(columns, offsets, n)
    values = values[positions]
    dW_enc, dW_dec = (x.new_zeros(n, w.shape[1], dtype=work) for w in (W_enc, W_dec))
    db_enc = torch.zeros(n, dtype=work, device=x.device)
    ends = [*starts[::BLOCK_LATENTS].tolist(), len(values)]
    for i, first in enumerate(range(0, n, BLOCK_LATENTS)):
        at, entries = slice(first, min(first + BLOCK_LATENTS, n)), slice(ends[i], ends[i + 1])
        tokens, offsets = rows[entries], starts[at.start : at.stop + 1] - ends[i]
        dA = sampled_products(W_dec[latents[at]].to(work), dE, tokens, offsets)
        dW_dec[at] = row_sums(values[entries], tokens, offsets, dE)
        dW_enc[at] = row_sums(rounded(dA), tokens, offsets, centred)
        db_enc[at] = torch.segment_reduce(dA, "sum", offsets=offsets.long(), initial=0)
    return loss, slots, dW_enc, db_enc, dW_dec


def _select(Z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` largest positive entries of each row of ``Z [B, n]``: values, columns, offsets."""
    values, columns, counts = [], [], [Z.new_zeros(1, dtype=torch.int64)]
    for block in Z.split(TOKENS_PER_SELECTION):
        block = torch.where(block > 0, block, 0)  # NaN is not
        row, column = keep_largest(block, k, positive=True).nonzero(as_tuple=True)
        values.append(block[row, column])
        columns.append(column.int())
        counts.append(row.bincount(minlength=len(block)))
    return torch.cat(values), torch.cat(columns), torch.cat(counts).cumsum(0).int()


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
    max_dead: int,
    k_aux: int,
    normalization: AuxNormalization = "residual_variance",
    coefficient: float = 1.0,
    target: Tensor | None = None,
) -> AuxK:
    """Aux-k's loss and the gradients of ``coefficient · loss``, as :func:`fused_update_` takes them.

    ``x``, ``residual [B, D]``; ``W_enc``, ``W_dec [F, D]`` (both one latent a row, both of one dtype:
    what the forward pass multiplied by), ``b_enc [F]``, ``b_dec [D]``; ``tokens_since_active [F]``
    int64: a latent is dead from ``dead_after`` on. ``max_dead`` bounds how many dead latents take
    part, and is the number of rows of the buffers; beyond it the longest dead take part (the lower
    latent of equals), as if the others were alive. Nothing waits for the device.

    Of a transcoder, ``x`` and ``W_enc`` may have another width than ``residual`` and ``W_dec``, ``b_dec`` is a zero
    of the former's (``x`` is centred already), and ``target [B, D]`` is what ``total_variance`` is of.

    Sums are float32 (float64 for float64). Raises ValueError on an unknown normalization, on negative
    sizes and on shapes that do not fit. Not differentiable.
    """
    known = get_args(AuxNormalization)
    if normalization not in known:
        raise ValueError(f"normalization: expected one of {known}, got {normalization!r}")
    for name, size in (("k_aux", k_aux), ("max_dead", max_dead)):
        if size < 0:
            raise ValueError(f"{name}: expected 0 or more, got {size}")
    if len(W_enc) != len(W_dec) or W_enc.dtype != W_dec.dtype:
        raise ValueError(
            "W_enc and W_dec: expected two [F, D] tensors of one dtype, got "
            f"{list(W_enc.shape)} {W_enc.dtype} and {list(W_dec.shape)} {W_dec.dtype}"
        )
    if (x.shape[1:], *residual.shape) != (W_enc.shape[1:], len(x), W_dec.shape[1]):
        raise ValueError(
            f"x and residual: expected [B, {W_enc.shape[1]}] and [B, {W_dec.shape[1]}], got "
            f"{list(x.shape)} and {list(residual.shape)}"
        )
    if tokens_since_active.shape != W_dec.shape[:1]:
        raise ValueError(
            f"tokens_since_active: expected [{len(W_dec)}], got {list(tokens_since_active.shape)}"
        )
    loss, *gradients = _aux_k_gradients(
        x, residual, W_enc, b_enc, W_dec, b_dec,
        tokens_since_active, dead_after, min(max_dead, len(W_dec)),
        k_aux, normalization, coefficient, target,
    )  # fmt: skip
    return AuxK(loss, AuxGradients(*gradients))
